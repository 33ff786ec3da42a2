"""Parses and formats numbers, sizes and times for people."""

from __future__ import annotations

import math
import numbers
import re

_UNITS = {
    **{"": 1, "B": 1},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


def positive_int(value: object) -> int:
    """The value as a positive `int`; raises a `ValueError` for anything else, also for `True`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value <= 0:
        raise ValueError("expected a positive integer")
    return int(value)


def positive_number(value: object) -> int | float:
    """The value as a positive `int` if it is whole, else as a positive `float`.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError("expected a number")
    number = float(value)
    if not number > 0:
        raise ValueError("expected a positive number")
    return int(number) if number.is_integer() else number


def byte_count(value: object) -> int:
    """A number of bytes from an `int` or from a text such as `"2GiB"` or `"512MB"`.

    Raises:
        ValueError: The value is not a positive number of bytes.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        number = float(match[1]) if match is not None else math.inf
        if match is None or match[2] not in _UNITS or math.isinf(number):
            raise ValueError("expected a number of bytes, such as 2147483648 or '2GiB'")
        value = int(number * _UNITS[match[2]])
    return positive_int(value)


def optional_byte_count(value: object) -> int | None:
    """`byte_count(value)`, or `None` for `None` or an empty text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return byte_count(value)


def format_bytes(size: float) -> str:
    """A number of bytes for people: `3.0 MiB` for 3145728.

    Sizes up to 10 GiB are in MiB, so that most comparisons use the same unit.
    """
    if size < 2**10:
        return f"{size:g} bytes"
    if size < 2**20:
        return f"{size / 2**10:,.1f} KiB"
    if size < 10 * 2**30:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / 2**30:,.1f} GiB"


def format_seconds(seconds: float) -> str:
    """A time for people: `35 ms`, `1.6 s`, `2 min 5 s` or `25 h 30 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
