"""Random-looking numbers that depend only on names, not on order or time."""

from __future__ import annotations

import hashlib


def seed_of(*names: object) -> int:
    """A 63-bit number that depends only on the texts of the names.

    Example:
        >>> seed_of(0, "crop", "a.jpg") == seed_of(0, "crop", "a.jpg")
        True
    """
    text = "\0".join(map(str, names)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
