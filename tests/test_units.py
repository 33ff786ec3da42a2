"""How numbers of bytes are read and written."""

from __future__ import annotations

import pytest

from rbln_vae.units import byte_count, format_bytes, format_seconds, optional_byte_count


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (3, "3 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (72093696, "68.8 MiB"),
        (2743000000, "2,615.9 MiB"),
        (10 * 2**30, "10.0 GiB"),
        (5 * 2**40, "5,120.0 GiB"),
    ],
)
def test_a_size_is_written_in_units_of_two_to_the_tenth(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0 ms"),
        (0.0354, "35 ms"),
        (1.58, "1.6 s"),
        (59.4, "59.4 s"),
        (125, "2 min 5 s"),
        (3600, "1 h 0 min"),
        (92000, "25 h 33 min"),
    ],
)
def test_a_time_is_written_in_at_most_two_units(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_nothing_is_no_limit(nothing):
    assert optional_byte_count(nothing) is None


def test_what_is_given_is_checked_whether_it_may_be_left_out_or_not():
    for read in (byte_count, optional_byte_count):
        assert read("1.5MiB") == 1572864
        for wrong in ("much", 0, -1, True, 1.5):
            with pytest.raises(ValueError, match="expected a"):
                read(wrong)
