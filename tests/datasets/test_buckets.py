"""Which size an image is given, and what is cut off."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbln_vae.datasets.buckets import Sizing

sides = st.integers(1, 5000)
sizings = st.builds(
    Sizing.make,
    st.lists(st.integers(1, 8).map(lambda n: (64 * n, 64 * n)), min_size=1, max_size=3),
    aspect=st.booleans(),
    step=st.sampled_from([8, 32, 64]),
    max_aspect=st.floats(1, 4),
)


@given(sizings, sides, sides, st.sampled_from(["center", "random"]), st.integers())
def test_an_image_is_covered_and_not_stretched(
    sizing: Sizing, height: int, width: int, crop: str, seed: int
) -> None:
    place = sizing.place((height, width), "key", crop, seed)
    assert place.size in sizing.sizes
    assert all(s >= t for s, t in zip(place.scaled, place.size, strict=True))
    # One side fits; and the proportions are kept to a pixel.
    assert place.scaled[0] == place.size[0] or place.scaled[1] == place.size[1]
    ratio = max(place.size[0] / height, place.size[1] / width)
    assert all(
        abs(s - max(t, side * ratio)) <= 0.5 + 1e-6
        for s, t, side in zip(place.scaled, place.size, (height, width), strict=True)
    )
    for offset, scaled, size in zip(place.offset, place.scaled, place.size, strict=True):
        assert 0 <= offset <= scaled - size


@given(sizings, sides, sides)
def test_no_other_bucket_of_its_area_is_nearer_in_proportion(
    sizing: Sizing, height: int, width: int
) -> None:
    size = sizing.choose((height, width))
    (group,) = [g for g in sizing.groups if size in g][-1:]

    def distance(other: tuple[int, int]) -> float:
        return abs(math.log(other[1] / other[0]) - math.log(width / height))

    assert distance(size) <= min(map(distance, group)) + 1e-12


@given(st.integers(1, 20), st.floats(1, 4))
def test_rectangles_have_about_the_area_of_the_square(side: int, max_aspect: float) -> None:
    sizes = Sizing.make([(64 * side,) * 2], aspect=True, max_aspect=max_aspect).sizes
    assert (64 * side, 64 * side) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= (64 * side) ** 2
        assert max(height, width) / min(height, width) <= max_aspect
        assert (width, height) in sizes
        # As large as that allows.
        assert max(height, width) * (min(height, width) + 64) > (64 * side) ** 2 or height == width


def test_the_buckets_of_1024_are_those_that_trainers_use() -> None:
    sizes = Sizing.make([(1024, 1024)], aspect=True).sizes
    assert {(832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832)} <= set(sizes)


def test_an_image_is_not_enlarged_where_a_smaller_size_is_there() -> None:
    sizing = Sizing.make([(256, 256), (512, 512)])
    assert sizing.choose((400, 400)) == (256, 256)
    assert sizing.choose((512, 512)) == (512, 512)
    assert sizing.choose((3000, 4000)) == (512, 512)
    assert sizing.choose((10, 10)) == (256, 256)


def test_a_random_crop_depends_on_seed_and_key_alone() -> None:
    sizing = Sizing.make([(64, 64)])

    def offsets(seed: int) -> list[tuple[int, int]]:
        return [sizing.place((64, 640), f"{n}", "random", seed).offset for n in range(100)]

    assert offsets(0) == offsets(0) != offsets(1)
    lefts = [left for _, left in offsets(0)]
    assert min(lefts) < 60 and max(lefts) > 516 and len(set(lefts)) > 80


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, "found none"),
        ([(100, 100)], {}, "multiples of 8"),
        ([(64, 128)], {"aspect": True}, "square"),
        ([(64, 64)], {"aspect": True, "step": 12}, "multiple of 8"),
        ([(64, 64)], {"aspect": True, "max_aspect": 0.5}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(sizes, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sizing.make(sizes, **options)
