"""What `kernels` does with the rows of images, in one pass over memory each, by Triton.

Each pass is bound by memory: it reads an image once and writes it once, and does everything else
in registers. A program takes some pixels and a block of channels, which lie side by side.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import Padding, Reading, around

_log = logging.getLogger(__name__)

_PROGRAM = 4096
"""Values that a program holds at once: 32 for each of its 128 threads."""


@functools.cache
def works(device: torch.device) -> bool:
    """Whether Triton compiles and runs these kernels on a device; why not is logged."""
    try:
        image = torch.zeros(1, 8, 1, 1, device=device)
        apply(image, Reading(activation="silu"), torch.empty_like(image))
    except Exception as error:  # of any kind: a driver, a C compiler, or Triton itself
        _log.warning(
            "Triton's kernels don't run on %s, so PyTorch's take their place, which are slower: %s",
            device,
            error,
        )
        return False
    return True


# Kernels.


@triton.jit
def _activated(value, FUNCTION: tl.constexpr):
    """One of the graph's activation functions, in float32."""
    if FUNCTION == "silu":
        value = value / (1 + tl.exp(-value))
    elif FUNCTION == "relu":
        value = tl.maximum(value, 0)
    elif FUNCTION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif FUNCTION == "tanh":
        value = _tanh(value)
    elif FUNCTION == "mish":
        # log1p(exp(v)) without overflow
        softplus = tl.maximum(value, 0) + tl.log(1 + tl.exp(-tl.abs(value)))
        value = value * _tanh(softplus)
    return value


@triton.jit
def _tanh(value):
    small = tl.exp(-2 * tl.abs(value))
    size = (1 - small) / (1 + small)
    return tl.where(value < 0, -size, size)


# One machine code serves all sizes of images: steps in memory alone are compiled in, as far as
# they allow wide loads.
_SIZES = ["height", "width", "out_height", "out_width", "above", "left", "coefficients_batch"]


@triton.jit(do_not_specialize=_SIZES)
def _read_kernel(
    image,
    out,
    scale,
    shift,
    pixel_weight,
    eps,
    channels,
    height,
    width,
    image_batch,
    image_row,
    image_pixel,
    out_height,
    out_width,
    out_batch,
    out_row,
    out_pixel,
    coefficients_batch,
    above,
    left,
    AFFINE: tl.constexpr,
    PIXEL: tl.constexpr,
    FUNCTION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(2)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    out_y, out_x = pixel // out_width, pixel % out_width
    y, x = out_y - above, out_x - left
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    known = channel < channels
    begin = n.to(tl.int64) * image_batch + y.to(tl.int64) * image_row + x * image_pixel
    mask = inside[:, None] & known[None, :]
    value = tl.load(image + begin[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if AFFINE:
        factors = n * coefficients_batch + channel
        value *= tl.load(scale + factors, mask=known, other=0.0)[None, :]
        value += tl.load(shift + factors, mask=known, other=0.0)[None, :]
    if PIXEL:
        square = tl.sum(value * value, 1) / channels
        value *= (1 / tl.sqrt(square + eps))[:, None]
        value *= tl.load(pixel_weight + channel, mask=known, other=0.0)[None, :]
    value = _activated(value, FUNCTION)
    value = tl.where(mask, value, 0.0)
    begin = n.to(tl.int64) * out_batch + out_y.to(tl.int64) * out_row + out_x * out_pixel
    mask = (pixel < out_height * out_width)[:, None] & known[None, :]
    tl.store(out + begin[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _written(
    result,
    bias,
    residual,
    out,
    x,
    known,
    channel,
    result_pixel,
    residual_pixel,
    mask,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
):
    """Pixels of a row as they are written, in float32 but rounded to the dtype of `out`."""
    value = tl.load(result + x[:, None] * result_pixel + channel[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32) + bias[None, :]
    if RESIDUAL:
        more = residual + x[:, None] * residual_pixel + channel[None, :]
        value += tl.load(more, mask=mask, other=0.0).to(tl.float32)
    return _activated(value, FUNCTION).to(out.dtype.element_ty)


@triton.jit(do_not_specialize=["height", "width", "sums_batch"])
def _write_kernel(
    result,
    bias,
    residual,
    out,
    sums,
    channels,
    height,
    width,
    result_batch,
    result_row,
    result_pixel,
    residual_batch,
    residual_row,
    residual_pixel,
    out_batch,
    out_row,
    out_pixel,
    sums_batch,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STORES: tl.constexpr,
    SUMS: tl.constexpr,
    FUNCTION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n, y = tl.program_id(0) // height, tl.program_id(0) % height
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    result += n.to(tl.int64) * result_batch + y.to(tl.int64) * result_row
    residual += n.to(tl.int64) * residual_batch + y.to(tl.int64) * residual_row
    out += n.to(tl.int64) * out_batch + y.to(tl.int64) * out_row
    offset = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    # Differences from the first pixel, so that a mean far from zero costs no digits.
    origin = tl.zeros((CHANNELS,), tl.float32)
    if SUMS:
        start = _written(
            result,
            offset,
            residual,
            out,
            tl.arange(0, 1),
            known,
            channel,
            result_pixel,
            residual_pixel,
            known[None, :],
            RESIDUAL,
            FUNCTION,
        )
        origin = tl.sum(start.to(tl.float32), 0)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for begin in range(0, width, PIXELS):
        x = begin + tl.arange(0, PIXELS)
        mask = (x < width)[:, None] & known[None, :]
        value = _written(
            result,
            offset,
            residual,
            out,
            x,
            known,
            channel,
            result_pixel,
            residual_pixel,
            mask,
            RESIDUAL,
            FUNCTION,
        )
        if STORES:
            tl.store(out + x[:, None] * out_pixel + channel[None, :], value, mask=mask)
        if SUMS:
            difference = tl.where(mask, value.to(tl.float32) - origin[None, :], 0.0)
            total += difference
            squares += difference * difference
    if SUMS:
        mean = tl.sum(total, 0) / width
        sums += n * sums_batch + y * 2 * channels + channel
        tl.store(sums, origin + mean, mask=known)
        tl.store(sums + channels, tl.sum(squares, 0) - mean * mean * width, mask=known)


@triton.jit(do_not_specialize=["chunks", "channels", "members"])
def _coefficients_kernel(
    sums,
    counts,
    weight,
    bias,
    out,
    chunks,
    channels,
    members,
    eps,
    MEMBERS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    n, group = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, MEMBERS)
    channel = group * members + member
    known = member < members
    sums += n.to(tl.int64) * chunks * 2 * channels + channel[None, :]
    pixels = tl.zeros((CHUNKS,), tl.float32)
    weighted = tl.zeros((CHUNKS, MEMBERS), tl.float32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & known[None, :]
        count = tl.load(counts + chunk, mask=chunk < chunks, other=0.0).to(tl.float32)
        pixels += count
        means = tl.load(sums + chunk[:, None] * 2 * channels, mask=mask, other=0.0)
        weighted += means * count[:, None]
    values = tl.sum(pixels, 0) * members
    mean = tl.sum(tl.sum(weighted, 1), 0) / values
    squares = tl.zeros((CHUNKS, MEMBERS), tl.float32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & known[None, :]
        count = tl.load(counts + chunk, mask=chunk < chunks, other=0.0).to(tl.float32)
        here = sums + chunk[:, None] * 2 * channels
        difference = tl.where(mask, tl.load(here, mask=mask, other=0.0) - mean, 0.0)
        squares += difference * difference * count[:, None]
        squares += tl.load(here + channels, mask=mask, other=0.0)
    variance = tl.sum(tl.sum(squares, 1), 0) / values
    factor = tl.load(weight + channel, mask=known, other=0.0) / tl.sqrt(variance + eps)
    offset = tl.load(bias + channel, mask=known, other=0.0) - mean * factor
    out += n * 2 * channels + channel
    tl.store(out, factor, mask=known)
    tl.store(out + channels, offset, mask=known)


@triton.jit(do_not_specialize=["columns"])
def _softmax_kernel(scores, scale, out, columns, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * columns
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = tl.load(scores + begin + column, mask=column < columns, other=float("-inf")) * scale
        before = most
        most = tl.maximum(most, score)
        # A place that has seen no score yet has nothing to scale.
        total = tl.where(before == most, total, total * tl.exp(before - most))
        total += tl.where(column < columns, tl.exp(score - most), 0.0)
    highest = tl.max(most, 0)
    factor = 1 / tl.sum(tl.where(most == float("-inf"), 0.0, total * tl.exp(most - highest)), 0)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = tl.load(scores + begin + column, mask=column < columns, other=float("-inf")) * scale
        weight = tl.exp(score - highest) * factor
        tl.store(out + begin + column, weight.to(out.dtype.element_ty), mask=column < columns)


# The functions of `kernels`.


def read(image: Tensor, reading: Reading, padding: Padding = (0, 0, 0, 0)) -> Tensor:
    """See `kernels.read`."""
    if not reading.changes and not any(padding):
        return image.contiguous(memory_format=torch.channels_last)
    above, _, left, _ = padding
    block = around(image, padding)
    _read(image, reading, block, above, left)
    return block


def apply(image: Tensor, reading: Reading, out: Tensor) -> None:
    """See `kernels.apply`."""
    _read(image, reading, out, 0, 0)


def _read(image: Tensor, reading: Reading, out: Tensor, above: int, left: int) -> None:
    batch, channels, height, width = image.shape
    out_height, out_width = out.shape[2:]
    whole = reading.pixel_weight is not None
    block = _channels_at_once(channels, whole=whole)
    pixels = max(1, _PROGRAM // block)
    grid = (triton.cdiv(out_height * out_width, pixels), triton.cdiv(channels, block), batch)
    none = image  # an argument that isn't read
    _called(_read_kernel, grid, image)(
        image,
        out,
        none if reading.scale is None else reading.scale,
        none if reading.shift is None else reading.shift,
        none if reading.pixel_weight is None else reading.pixel_weight,
        reading.eps,
        channels,
        height,
        width,
        *_steps(image),
        out_height,
        out_width,
        *_steps(out),
        0 if reading.scale is None else reading.scale.stride(0),
        above,
        left,
        AFFINE=reading.scale is not None,
        PIXEL=whole,
        FUNCTION=reading.activation or "",
        PIXELS=pixels,
        CHANNELS=block,
    )


def write(
    result: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    sums: Tensor | None = None,
) -> None:
    """See `kernels.write`; `sums` has a row for each row of the image."""
    _write(result, out, bias, residual, activation, sums, stores=True)


def sum_up(chunk: Tensor, sums: Tensor) -> None:
    """See `kernels.sum_up`; `sums` has a row for each row of the image."""
    _write(chunk, chunk, None, None, None, sums, stores=False)


def _write(
    result: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    sums: Tensor | None,
    *,
    stores: bool,
) -> None:
    batch, channels, height, width = out.shape
    block = _channels_at_once(channels)
    added = result if residual is None else residual
    grid = (batch * height, triton.cdiv(channels, block))
    _called(_write_kernel, grid, result)(
        result,
        result if bias is None else bias,
        added,
        out,
        result if sums is None else sums,
        channels,
        height,
        width,
        *_steps(result),
        *_steps(added),
        *_steps(out),
        0 if sums is None else sums.stride(0),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        STORES=stores,
        SUMS=sums is not None,
        FUNCTION=activation or "",
        PIXELS=_PROGRAM // block,
        CHANNELS=block,
    )


def coefficients(
    sums: Tensor,
    counts: Tensor,
    groups: int,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
) -> None:
    """See `kernels.coefficients`; computed in float32."""
    batch, chunks, _, channels = sums.shape
    members = channels // groups
    block = max(16, triton.next_power_of_2(members))
    _called(_coefficients_kernel, (batch, groups), sums)(
        sums,
        counts,
        weight,
        bias,
        out,
        chunks,
        channels,
        members,
        eps,
        MEMBERS=block,
        CHUNKS=max(1, _PROGRAM // block),
    )


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """See `kernels.attend`; by two products and a softmax, with scores in float32."""
    q, k, v = (each.flatten(0, 1) for each in (queries, keys, values))
    exact = () if q.dtype == torch.float32 else (torch.float32,)
    scores = torch.bmm(q, k.mT, *exact)
    weights = torch.empty_like(scores, dtype=v.dtype)
    softmax(scores, scale, weights)
    return torch.bmm(weights, v).view(queries.shape)


def softmax(scores: Tensor, scale: float, out: Tensor) -> None:
    """Write the softmax of each row of dense scores, times a positive scale."""
    columns = scores.shape[-1]
    grid = (scores.numel() // columns,)
    _called(_softmax_kernel, grid, scores)(scores, scale, out, columns, BLOCK=2048)


def _called(kernel: Any, grid: tuple[int, ...], tensor: Tensor) -> Callable[..., object]:
    """What calls a kernel; for a tensor without memory, it compiles it alone (`rehearsal`)."""
    return functools.partial(kernel.warmup, grid=grid) if tensor.is_meta else kernel[grid]


def _channels_at_once(channels: int, *, whole: bool = False) -> int:
    """Channels of a program: all for a norm of pixels, else as many as fill lines of caches."""
    every = triton.next_power_of_2(channels)
    return int(every if whole else min(128, every))


def _steps(image: Tensor) -> tuple[int, int, int]:
    """What lies between two images, two rows and two pixels; channels lie side by side."""
    assert image.stride(1) == 1 or image.shape[1] == 1
    return image.stride(0), image.stride(2), image.stride(3)
