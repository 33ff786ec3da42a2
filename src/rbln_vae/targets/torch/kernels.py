"""What PyTorch does with the rows of images, besides convolutions and attention.

Images are `(N, C, H, W)`, with channels last in memory. Statistics, norms and activations are
computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = tuple[int, int, int, int]
"""Rows of zeros above and below, and columns left and right."""


class Kernels(Protocol):
    """What this module and `fused` both do; see the functions below."""

    def read(self, image: Tensor, reading: Reading, padding: Padding = ...) -> Tensor: ...
    def apply(self, image: Tensor, reading: Reading, out: Tensor) -> None: ...
    def write(
        self,
        result: Tensor,
        out: Tensor,
        bias: Tensor | None = ...,
        residual: Tensor | None = ...,
        activation: str | None = ...,
        sums: Tensor | None = ...,
    ) -> None: ...
    def sum_up(self, chunk: Tensor, sums: Tensor) -> None: ...
    def coefficients(
        self,
        sums: Tensor,
        counts: Tensor,
        groups: int,
        eps: float,
        weight: Tensor,
        bias: Tensor,
        out: Tensor,
    ) -> None: ...
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Reading:
    """What is done with an image while it is read.

    Attributes:
        scale: The factors of its channels, `(N, C, 1, 1)`, of a group norm.
        shift: What is added after that.
        pixel_weight: The weights of an RMS norm of each pixel, `(1, C, 1, 1)`.
        eps: Of that norm.
        activation: The function that is applied last.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    pixel_weight: Tensor | None = None
    eps: float = 0.0
    activation: str | None = None

    @property
    def changes(self) -> bool:
        """Whether it changes an image."""
        return (
            self.scale is not None or self.pixel_weight is not None or self.activation is not None
        )


def activate_(image: Tensor, function: str) -> Tensor:
    """Apply one of the graph's activation functions in place."""
    result: Tensor = getattr(torch.ops.aten, f"{function}_")(image)
    return result


def read(image: Tensor, reading: Reading, padding: Padding = (0, 0, 0, 0)) -> Tensor:
    """Read an image, with zeros around it.

    Args:
        image: The image; rows may lie apart.
        reading: What is done with it.
        padding: The zeros, which `reading` leaves as they are.

    Returns:
        A dense image with channels last; `image` itself if nothing changes.
    """
    if not reading.changes and not any(padding):
        return image.contiguous(memory_format=torch.channels_last)
    above, _, left, _ = padding
    height, width = image.shape[2:]
    block = around(image, padding)
    block[:, :, :above].zero_()
    block[:, :, above + height :].zero_()
    block[..., :left].zero_()
    block[..., left + width :].zero_()
    apply(image, reading, block[:, :, above : above + height, left : left + width])
    return block


def around(image: Tensor, padding: Padding) -> Tensor:
    """Memory for an image and what is around it, with channels last."""
    above, below, left, right = padding
    batch, channels, height, width = image.shape
    return torch.empty(
        (batch, channels, height + above + below, width + left + right),
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )


def apply(image: Tensor, reading: Reading, out: Tensor) -> None:
    """Write what `reading` makes of an image."""
    if not reading.changes or image.dtype == torch.float32:
        work = out.copy_(image)
    else:
        work = image.float()
    if reading.scale is not None and reading.shift is not None:
        work.mul_(reading.scale).add_(reading.shift)
    if reading.pixel_weight is not None:
        lengths = torch.linalg.vector_norm(work, dim=1, keepdim=True)
        lengths.square_().div_(work.shape[1]).add_(reading.eps)
        work.mul_(lengths.rsqrt_()).mul_(reading.pixel_weight)
    if reading.activation is not None:
        activate_(work, reading.activation)
    if work is not out:
        out.copy_(work)


def write(
    result: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    sums: Tensor | None = None,
) -> None:
    """Write what an operation has computed.

    Args:
        result: What was computed; it is overwritten.
        out: Where to write it.
        bias: `(C,)`, added to it.
        residual: What is added to it; it may be `out`.
        activation: The function that is applied last.
        sums: Gets the statistics of what is written; see `sum_up`.
    """
    if bias is not None:
        result.add_(bias[:, None, None])
    if residual is not None:
        result.add_(residual)
    if activation is not None:
        activate_(result, activation)
    out.copy_(result)
    if sums is not None:
        _sum_up(result.float(), sums)


def sum_up(chunk: Tensor, sums: Tensor) -> None:
    """Write the mean of each channel, and the sum of squared differences from it.

    Args:
        chunk: An image.
        sums: `(N, 1, 2, C)` in float32: those of all rows.
    """
    _sum_up(chunk.to(torch.float32, copy=True), sums)


def _sum_up(work: Tensor, sums: Tensor) -> None:
    """Do so, and overwrite the image."""
    mean = work.mean((2, 3), keepdim=True)
    work.sub_(mean)
    sums[:, 0, 0] = mean[:, :, 0, 0]
    sums[:, 0, 1] = torch.linalg.vector_norm(work, dim=(2, 3)).square_()


def coefficients(
    sums: Tensor,
    counts: Tensor,
    groups: int,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
) -> None:
    """Write the factors and offsets of channels that a group norm amounts to.

    Args:
        sums: The statistics of all parts of an image, `(N, parts, 2, C)`.
        counts: The pixels of each part, in float64.
        groups: Of the norm, as the following.
        eps: Added to the variance.
        weight: `(C,)`.
        bias: `(C,)`.
        out: `(N, 2, C)` in float32.
    """
    batch, parts, _, channels = sums.shape
    # (N, groups, parts * channels of a group), in float64
    means, squares = (
        sums[:, :, i]
        .double()
        .view(batch, parts, groups, -1)
        .transpose(1, 2)
        .reshape(batch, groups, -1)
        for i in (0, 1)
    )
    pixels = counts.double().repeat_interleave(channels // groups)
    total = pixels.sum()
    mean = (means * pixels).sum(2, keepdim=True) / total
    spread = ((means - mean).square() * pixels + squares).sum(2, keepdim=True) / total
    factor = weight.double().view(groups, -1) * (spread + eps).rsqrt()
    offset = bias.double().view(groups, -1) - mean * factor
    out[:, 0] = factor.view(batch, channels)
    out[:, 1] = offset.view(batch, channels)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of some queries over all pixels.

    Args:
        queries: `(N, heads, queries, channels)`.
        keys: `(N, heads, pixels, channels)`.
        values: `(N, heads, pixels, channels)`.
        scale: The factor of scores.

    Returns:
        `(N, heads, queries, channels)`.
    """
    return F.scaled_dot_product_attention(queries, keys, values, scale=scale)
