"""Latents are scaled as the pipelines of diffusers do it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rbln_vae.models.latents import LatentScaling

FACTORS = st.none() | st.floats(0.05, 20)
SHIFTS = st.none() | st.floats(-3, 3)
MEANS = st.none() | st.tuples(*[st.floats(-3, 3)] * 4)
SPREADS = st.none() | st.tuples(*[st.floats(0.05, 20)] * 4)
SCALINGS = st.builds(LatentScaling, FACTORS, SHIFTS, MEANS, SPREADS)


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(SCALINGS)
def test_unscale_is_the_inverse_of_scale(scaling: LatentScaling) -> None:
    z = latent(2, 4, 3, 5)
    torch.testing.assert_close(scaling.unscale(scaling.scale(z)), z)


def test_what_is_not_given_changes_nothing() -> None:
    z = latent(1, 4, 2, 2)
    assert LatentScaling().scale(z) is z
    assert LatentScaling().unscale(z) is z


def test_a_shift_is_subtracted_before_the_factor_is_applied() -> None:
    z = latent(1, 4, 2, 2)
    assert torch.equal(LatentScaling(0.3611, 0.1159).scale(z), (z - 0.1159) * 0.3611)
    assert torch.equal(LatentScaling(0.3611, 0.1159).unscale(z), z / 0.3611 + 0.1159)


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 4, 3, 5)])
def test_statistics_are_those_of_a_channel(shape: tuple[int, ...]) -> None:
    scaling = LatentScaling(latents_mean=(0.0, 1.0, 2.0, 3.0), latents_std=(1.0, 2.0, 4.0, 8.0))
    z = latent(*shape)
    for channel, (mean, std) in enumerate([(0, 1), (1, 2), (2, 4), (3, 8)]):
        found = scaling.scale(z)[..., channel, :, :]
        torch.testing.assert_close(found, (z[..., channel, :, :] - mean) / std)


@given(SCALINGS)
def test_a_log_variance_is_that_of_the_scaled_latents(scaling: LatentScaling) -> None:
    mean, log_variance = latent(1, 4, 2, 2), latent(1, 4, 2, 2) / 3
    above = scaling.scale(mean + torch.exp(0.5 * log_variance))
    spread = above - scaling.scale(mean)
    torch.testing.assert_close(scaling.scale_log_variance(log_variance), 2 * spread.log())


@pytest.mark.parametrize("values", [[0.5, -0.5], (0.5, -0.5)])
def test_constants_are_read_from_the_configuration_of_the_model(values: object) -> None:
    config = {"scaling_factor": 0.18215, "latents_mean": values, "block_out_channels": [8]}
    assert LatentScaling.of(config) == LatentScaling(0.18215, latents_mean=(0.5, -0.5))


@pytest.mark.parametrize("config", [{}, {"scaling_factor": None, "shift_factor": 0.1}])
def test_constants_that_a_configuration_lacks_are_not_taken_for_one_and_zero(config: dict) -> None:
    scaling = LatentScaling.of(config)
    for work in (scaling.scale, scaling.unscale, scaling.scale_log_variance, scaling.check_known):
        with pytest.raises(ValueError, match="isn't known"):
            work(*([] if work == scaling.check_known else [latent(1, 4, 2, 2)]))


def test_the_dtype_of_a_latent_is_kept() -> None:
    scaling = LatentScaling(0.5, 0.25, (0.0,) * 4, (1.0,) * 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        z = latent(1, 4, 2, 2).to(dtype)
        assert scaling.scale(z).dtype == scaling.unscale(z).dtype == dtype
        assert scaling.scale_log_variance(z).dtype == dtype
        assert math.isfinite(float(scaling.scale(z).sum()))
