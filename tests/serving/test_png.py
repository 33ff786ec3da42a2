"""PNG files that every reader takes, of every size."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from skimage import data

from rbln_vae.serving.png import encode_png

PICTURES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])).flatmap(
    lambda shape: arrays.arrays(np.uint8, shape)
)


def read(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.verify()  # the checksums
    return Image.open(io.BytesIO(file))


@given(PICTURES)
def test_what_is_written_is_read_again(levels: np.ndarray) -> None:
    image = read(encode_png(levels))
    assert image.format == "PNG"
    assert image.mode == ("RGB" if levels.shape[2] == 3 else "L")
    assert np.array_equal(np.asarray(image).reshape(levels.shape), levels)


def test_strides_do_not_matter() -> None:
    levels = np.arange(2 * 30 * 20 * 3, dtype=np.uint8).reshape(3, 60, 20)[:, ::2]
    shown = levels.transpose(1, 2, 0)
    assert np.array_equal(np.asarray(read(encode_png(shown))), shown)


def test_a_photograph_takes_no_more_than_from_pillow_at_its_fastest() -> None:
    photograph = data.astronaut()
    file = io.BytesIO()
    Image.fromarray(photograph).save(file, format="PNG", compress_level=1)
    assert len(encode_png(photograph)) <= 1.02 * len(file.getvalue())


@pytest.mark.parametrize(
    "levels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
    ],
)
def test_other_arrays_are_refused(levels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 1\)"):
        encode_png(levels)
