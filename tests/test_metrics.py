"""PSNR and SSIM are those of scikit-image; the errors are those of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rbln_vae import metrics


def photo(noise: float = 0) -> torch.Tensor:
    pixels = torch.from_numpy(data.astronaut()[100:228, 100:260].copy()).permute(2, 0, 1)[None]
    generator = torch.Generator().manual_seed(1)
    return pixels / 127.5 - 1 + noise * torch.randn(pixels.shape, generator=generator)


def for_skimage(image: torch.Tensor) -> np.ndarray:
    return image[0].double().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
def test_psnr_is_that_of_scikit_image(noise: float) -> None:
    a, b = photo(noise), photo()
    expected = peak_signal_noise_ratio(for_skimage(b), for_skimage(a), data_range=2)
    assert metrics.psnr(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
def test_ssim_is_that_of_scikit_image(noise: float) -> None:
    a, b = photo(noise), photo()
    expected = structural_similarity(  # of levels from 0 to 255, as everybody computes it
        (for_skimage(a) + 1) * 127.5,
        (for_skimage(b) + 1) * 127.5,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert metrics.ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_ssim_of_a_batch_is_the_mean_of_its_images() -> None:
    a, b = photo(0.1), photo(0.5)
    both = metrics.ssim(torch.cat([a, b]), torch.cat([photo(), photo()]))
    alone = (metrics.ssim(a, photo()) + metrics.ssim(b, photo())) / 2
    assert both == pytest.approx(alone, abs=1e-12)


def test_equal_images_are_infinitely_close() -> None:
    assert metrics.psnr(photo(), photo()) == math.inf
    assert metrics.ssim(photo(), photo()) == pytest.approx(1, abs=1e-12)
    assert metrics.relative_l2(photo(), photo()) == 0
    assert metrics.largest_error(photo(), photo()) == 0


def test_data_range_is_the_peak_of_psnr() -> None:
    a, b = torch.zeros(4), torch.full((4,), 0.5)
    assert metrics.psnr(a, b, data_range=1) == pytest.approx(10 * math.log10(1 / 0.25))


def test_errors_follow_their_definitions() -> None:
    value, reference = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 4.0])
    assert metrics.relative_l2(value, reference) == pytest.approx(3 / 5)
    assert metrics.largest_error(value, reference) == 3


def test_relative_error_to_nothing_is_infinite() -> None:
    assert metrics.relative_l2(torch.ones(2), torch.zeros(2)) == math.inf
    assert metrics.relative_l2(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize(
    "measure", [metrics.psnr, metrics.relative_l2, metrics.largest_error, metrics.ssim]
)
def test_nan_is_never_a_good_result(measure) -> None:
    broken = photo()
    broken[0, 0, 50, 50] = math.nan
    assert math.isnan(measure(broken, photo()))


@pytest.mark.parametrize(
    "measure", [metrics.psnr, metrics.relative_l2, metrics.largest_error, metrics.ssim]
)
@pytest.mark.parametrize("shapes", [((1, 3, 16, 16), (3, 16, 16)), ((0, 3, 16, 16),) * 2])
def test_what_cannot_be_compared_is_an_error(measure, shapes) -> None:
    with pytest.raises(ValueError, match="one shape and not empty"):
        measure(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_ssim_needs_images_that_hold_its_window() -> None:
    metrics.ssim(torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11))
    for shape in [(1, 1, 10, 64), (3, 64, 64)]:
        with pytest.raises(ValueError, match="at least 11x11"):
            metrics.ssim(torch.zeros(shape), torch.zeros(shape))
