"""Packs weights in the order in which the engine's kernels read them.

Packing depends only on the dtype, not on the instruction set. So a file that was compiled on
one machine can be mapped and used on any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import config
from ...graph.ir import Conv2d, Graph, Operation, RMSNorm, Shuffle, Weights

BLOCK = 32
"""Channels of a block: images have the memory layout `[N][H][blocks][W][32]`."""

PANEL = 16
"""Output channels of a panel, which a kernel computes together."""

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}
"""In which images and kernels are stored."""


def pack(graph: Graph, dtype: str) -> dict[str, Tensor]:
    """Pack all weights of a part.

    Args:
        graph: The optimised graph; the weights of that of the first run are packed, too.
        dtype: The dtype in which images and kernels are stored, one of `DTYPES`.

    Returns:
        A tensor for each weight of the part, under its name (that of an RMS norm padded with
        zeros to whole blocks of channels; kernels under `kernels_name`), and a bias of zeros
        for each convolution without one, under `bias_name`. In float16 kernels are divided by
        a power of two that makes the most of its range, which stands under `factor_name`.
    """
    packed: dict[str, Tensor] = {}
    weights = graph.all_weights
    for operation in graph.all_operations:
        for name in _vectors(operation):
            packed[name] = weights[name].detach().to(torch.float32).contiguous()
    for operation in graph.all_operations:
        if isinstance(operation, Conv2d):
            if kernels_name(operation) not in packed:
                packed |= _packed_kernels(operation, weights, dtype)
            outputs = operation.kernel(weights)[0]
            phases = 4 if operation.has_phases(weights) else 1
            bias = torch.zeros(phases, -(-outputs // PANEL) * PANEL, dtype=torch.float32)
            if operation.bias is not None:
                bias[:, :outputs] = weights[operation.bias].detach().view(phases, outputs)
            packed[bias_name(operation)] = bias.flatten()
            if isinstance(operation.norm, RMSNorm):
                name = operation.norm.weight
                packed[name] = F.pad(packed[name], (0, -len(packed[name]) % BLOCK))
        elif isinstance(operation, Shuffle):
            packed[order_name(operation)] = torch.tensor(operation.order, dtype=torch.int32)
    return packed


def check_packed(graph: Graph, packed: Mapping[str, Tensor], dtype: str) -> None:
    """Raise a `ValueError` unless the tensors have the names, shapes and dtypes of `pack`.

    The engine reads the tensors by address, so this check keeps it within their memory.

    Args:
        graph: The graph; only the shapes of its weights are read.
        packed: The tensors to check.
        dtype: The dtype of the computation.
    """
    weights = graph.all_weights
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (tuple(weights[name].shape), torch.float32)
        for operation in graph.all_operations
        for name in _vectors(operation)
    }
    for operation in graph.all_operations:
        if isinstance(operation, Conv2d):
            outputs, inputs, height, width = operation.kernel(weights)
            frame_blocks = -(-inputs // operation.frames // BLOCK)
            panels, blocks = -(-outputs // PANEL), operation.frames * frame_blocks
            phases = 4 if operation.has_phases(weights) else 1
            doubles = operation.doubles(weights)
            matrices = DOUBLING_PRODUCTS if doubles else phases * height * width
            size = panels * PANEL * matrices * blocks * BLOCK
            expected[kernels_name(operation)] = ((size,), DTYPES[dtype])
            if dtype == "float16":
                expected[factor_name(operation)] = ((1,), torch.float32)
            expected[bias_name(operation)] = ((phases * panels * PANEL,), torch.float32)
            if isinstance(operation.norm, RMSNorm):
                expected[operation.norm.weight] = ((frame_blocks * BLOCK,), torch.float32)
        elif isinstance(operation, Shuffle):
            expected[order_name(operation)] = ((len(operation.order),), torch.int32)
    if packed.keys() != expected.keys():
        odd = sorted(packed.keys() ^ expected.keys())
        raise ValueError(f"the packed weights are not those of the graph: {', '.join(odd)}")
    for name, (shape, wanted) in expected.items():
        tensor = packed[name]
        if tuple(tensor.shape) != shape or tensor.dtype != wanted or not tensor.is_contiguous():
            raise ValueError(
                f"{name!r} is packed as {tuple(tensor.shape)} of {tensor.dtype}, expected {shape} "
                f"of {wanted}"
            )


def _packed_kernels(operation: Conv2d, weights: Weights, dtype: str) -> dict[str, Tensor]:
    """The packed kernels of a convolution, and in float16 their factor."""
    kernels = _by_frame(weights[operation.weight].detach(), operation.frames)
    if operation.doubles(weights):
        kernels = doubling_kernels(kernels)
    packed = {}
    if dtype == "float16":
        factor = _factor(kernels)
        kernels = kernels / factor
        packed[factor_name(operation)] = torch.tensor([factor], dtype=torch.float32)
    return packed | {kernels_name(operation): pack_kernels(kernels, DTYPES[dtype])}


def _by_frame(kernels: Tensor, frames: int) -> Tensor:
    """Kernels in which the channels of each frame fill whole blocks, with zeros."""
    if frames == 1:
        return kernels
    *before, inputs, height, width = kernels.shape
    apart = kernels.reshape(*before, frames, inputs // frames, height, width)
    return F.pad(apart, (0, 0, 0, 0, 0, -apart.shape[-3] % BLOCK)).flatten(-4, -3)


def _vectors(operation: Operation) -> tuple[str, ...]:
    """The names of all weights but kernels."""
    kernels = operation.weight if isinstance(operation, Conv2d) else None
    return tuple(name for name in operation.weights if name != kernels)


def kernels_name(operation: Conv2d) -> str:
    """The name of a convolution's packed kernels: with `upsample` they are packed otherwise."""
    return f"{operation.weight}.upsample" if operation.upsample else operation.weight


def bias_name(operation: Conv2d) -> str:
    """The name of a convolution's padded bias."""
    return operation.bias if operation.bias is not None else f"{operation.weight}.no_bias"


def factor_name(operation: Conv2d) -> str:
    """The name of the number by which a convolution's kernels were divided."""
    return f"{kernels_name(operation)}.factor"


def _factor(kernels: Tensor) -> float:
    """The power of two that brings the largest weight between 2^14 and 2^15.

    So none is beyond the range of float16, and only those are denormal that are less than 2^-28
    of the largest.
    """
    largest = float(kernels.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1] - 15, -100)


def in_bfloat16(graph: Graph, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that `pack` packed in float16, in bfloat16 for the same steps."""
    result = dict(packed)
    for operation in graph.operations:
        if isinstance(operation, Conv2d):
            name, factor = kernels_name(operation), factor_name(operation)
            pairs = packed[name].view(-1, BLOCK // 2, 2, PANEL).transpose(2, 3)
            kernels = (pairs.float() * packed[factor]).to(torch.bfloat16)
            result[name] = kernels.contiguous().view(-1)
            result[factor] = torch.ones(1, dtype=torch.float32)
    return result


def order_name(operation: Shuffle) -> str:
    """The name of the order of a shuffle's channels."""
    return f"{operation.output}.order"


DOUBLING = torch.tensor(
    [[1, 0, 0], [0.5, 0.5, 0.5], [-0.5, -0.5, 0.5], [-0.5, 0.5, 0.5], [0, 0, 1]],
    dtype=torch.float64,
)
"""What each product for an image that is doubled takes of three taps, in one direction.

The engine's `kernels/conv2d/doubling.h` says of which pixels the products are.
"""

DOUBLING_PRODUCTS = len(DOUBLING) ** 2


def doubling_kernels(kernels: Tensor) -> Tensor:
    """Transform the kernels `(out, in, 3, 3)` for a doubled image to `(25, out, in, 1, 1)`."""
    products = torch.einsum("oikl,pk,ql->pqoi", kernels.double(), DOUBLING, DOUBLING)
    return products.flatten(0, 1)[..., None, None].float()


def pack_kernels(kernels: Tensor, dtype: torch.dtype) -> Tensor:
    """Pack the kernels of one convolution as `[panels][phases][input blocks][taps][512]`.

    The last axis holds 32 input by 16 output channels: as `[32][16]` in float32 and float16,
    and as `[16][16][2]`, with pairs of input channels together, in bfloat16.

    Args:
        kernels: The kernels `(out, in, height, width)`, with any axes of phases before.
        dtype: The dtype of the result.
    """
    outputs, inputs, height, width = kernels.shape[-4:]
    phases, taps = kernels.shape[:-4].numel(), height * width
    panels, blocks = -(-outputs // PANEL), -(-inputs // BLOCK)
    padded = torch.zeros(phases, panels * PANEL, blocks * BLOCK, taps, dtype=dtype)
    padded[:, :outputs, :inputs] = kernels.detach().reshape(phases, outputs, inputs, taps)
    pair = 2 if dtype == torch.bfloat16 else 1
    split = padded.view(phases, panels, PANEL, blocks, BLOCK // pair, pair, taps)
    return split.permute(1, 0, 3, 6, 4, 2, 5).contiguous().view(-1)
