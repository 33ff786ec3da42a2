"""Sizes of pictures: how they are written, which a model takes, and how a picture comes to one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbln_vae.sizes import Placement, check_image_size, format_size, nearest_multiples, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("512", (512, 512)), ("512x768", (512, 768)), ("8X16", (8, 16))]
)
def test_a_size_is_written_height_first(text, size) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "x", "0", "8x0", "-8", "8.5", "8x8x8", "big"])
def test_what_is_no_size_is_an_error(text) -> None:
    with pytest.raises(ValueError, match="such as 512 or 512x768"):
        parse_size(text)


@given(size=st.integers(1, 5000), factor=st.integers(1, 64))
def test_the_nearest_sizes_are_multiples_on_both_sides(size, factor):
    near = nearest_multiples(size, factor)
    assert all(n > 0 and n % factor == 0 and abs(n - size) < factor for n in near)
    assert near == [size] if size % factor == 0 else max(near) > size


@given(height=st.integers(1, 999), width=st.integers(1, 999), factor=st.integers(1, 16))
def test_a_size_is_refused_if_a_side_leaves_a_remainder(height, width, factor):
    if height % factor == width % factor == 0:
        check_image_size((height, width), factor)
    else:
        with pytest.raises(ValueError, match=rf"{height}x{width} .*multiples of {factor}\."):
            check_image_size((height, width), factor)


def test_the_offset_of_the_mirrored_image_is_that_from_the_other_side() -> None:
    place = Placement((100, 200), (64, 128), (0, 10), (64, 64))
    assert place.mirrored_offset == (0, 54)
