"""Measures of the difference between two image tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SSIM_WINDOW = 11
"""The side in pixels of the window of SSIM, and of the smallest image that SSIM accepts."""

_SSIM_SIGMA = 1.5
_SSIM_RANGE = 2.0  # from black to white
_SSIM_K1, _SSIM_K2 = 0.01, 0.03


def psnr(image: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in decibels; infinite if the tensors are equal.

    Args:
        image: A tensor of any shape.
        reference: A tensor of the same shape.
        data_range: The range of values, by default 2, for samples in `[-1, 1]`.

    Raises:
        ValueError: The shapes differ, or the tensors are empty.
    """
    image, reference = _pair(image, reference)
    error = float((image - reference).square().mean())
    if math.isnan(error):
        return math.nan
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity: 1 for equal images, about 0 for unrelated images.

    The index of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error
    visibility to structural similarity" (2004), with a Gaussian window of 11x11 and sigma 1.5
    at all positions within the image, averaged over pixels, channels and batch.

    Args:
        image: Images `(N, C, H, W)` in `[-1, 1]`, at least 11x11.
        reference: Images of the same shape.

    Raises:
        ValueError: The shapes differ, are not those of images, or are smaller than the window.
    """
    image, reference = _pair(image, reference)
    if image.ndim != 4 or min(image.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM compares images (N, C, H, W) of at least {SSIM_WINDOW}x{SSIM_WINDOW}, "
            f"found {tuple(image.shape)}"
        )
    # The index also compares means, so black must be 0.
    image, reference = image + 1, reference + 1
    # One channel at a time, because the memory is many times that of the input.
    planes = zip(image.flatten(0, 1), reference.flatten(0, 1), strict=True)
    values = [_ssim_plane(a, b) for a, b in planes]
    return math.fsum(values) / len(values)


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The L2 norm of the difference divided by the L2 norm of the reference.

    Raises:
        ValueError: The shapes differ, or the tensors are empty.
    """
    value, reference = _pair(value, reference)
    error, length = float((value - reference).norm()), float(reference.norm())
    if length:
        return error / length
    return math.inf if error else 0.0


def largest_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference of two elements.

    Raises:
        ValueError: The shapes differ, or the tensors are empty.
    """
    value, reference = _pair(value, reference)
    return float((value - reference).abs().max())


def _pair(value: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors in double precision, so that the measure adds no error of its own."""
    if value.shape != reference.shape or not value.numel():
        raise ValueError(
            f"expected two tensors of one shape and not empty, found {tuple(value.shape)} "
            f"and {tuple(reference.shape)}"
        )
    return value.detach().to("cpu", torch.float64), reference.detach().to("cpu", torch.float64)


def _ssim_plane(a: torch.Tensor, b: torch.Tensor) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (_SSIM_K1 * _SSIM_RANGE) ** 2, (_SSIM_K2 * _SSIM_RANGE) ** 2
    index = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return float(index.mean())


def _blur(plane: torch.Tensor) -> torch.Tensor:
    """Filter a plane `(H, W)` with the Gaussian window, one direction after the other."""
    distance = torch.arange(SSIM_WINDOW, dtype=plane.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (distance / _SSIM_SIGMA) ** 2)
    window /= window.sum()
    down = F.conv2d(plane[None, None], window.view(1, 1, -1, 1))
    return F.conv2d(down, window.view(1, 1, 1, -1))[0, 0]
