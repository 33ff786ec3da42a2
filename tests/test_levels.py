"""Levels are those that diffusers' VaeImageProcessor makes, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rbln_vae.levels import levels_of, sample_of

HALVES = (torch.float16, torch.bfloat16)


def shown(sample: torch.Tensor) -> torch.Tensor:
    """What diffusers shows of `(N, C, H, W)`: uint8 `(N, H, W, C)`."""
    images: np.ndarray = VaeImageProcessor().postprocess(sample, output_type="np")
    return torch.from_numpy((images * 255).round().astype("uint8"))


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a dtype of 16 bits, NaN and infinities included."""
    return torch.arange(-(2**15), 2**15).short().view(dtype)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_a_dtype_of_16_bits_is_shown_as_by_diffusers(dtype: torch.dtype) -> None:
    sample = every(dtype).view(1, 1, 256, 256)
    assert torch.equal(levels_of(sample), shown(sample).permute(0, 3, 1, 2))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_numbers_of_32_bits_are_shown_as_by_diffusers(bits: list[int]) -> None:
    sample = torch.tensor(bits, dtype=torch.int32).view(torch.float32).view(1, 1, 1, -1)
    assert torch.equal(levels_of(sample), shown(sample).permute(0, 3, 1, 2))


def test_what_is_not_finite_has_a_level() -> None:
    sample = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert levels_of(sample).tolist() == [0, 255, 0]


def test_a_sample_stays_as_it_is() -> None:
    sample = torch.tensor([0.25])
    levels_of(sample)
    assert sample.item() == 0.25


def test_every_level_is_read_as_by_diffusers() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    image = Image.fromarray(levels.view(16, 16, 1).expand(-1, -1, 3).numpy())
    expected = VaeImageProcessor(vae_scale_factor=1).preprocess(image)
    assert torch.equal(sample_of(levels), expected[0, 0].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_level_is_read_and_shown_again(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(levels_of(sample_of(levels).to(dtype)), levels)
