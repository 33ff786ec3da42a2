"""Weights in the order in which the engine's kernels read them.

Packing depends on the element type alone, not on the instruction set: a file that was
compiled on one machine is mapped and used on any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...graph.ir import Conv2d, Graph

BLOCK = 32
"""Channels of a block: an image lies in memory as `[N][blocks][H][W][32]`."""

PANEL = 16
"""Output channels that a kernel makes at once."""

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pack(graph: Graph, dtype: str) -> dict[str, Tensor]:
    """Pack all weights of a graph.

    Args:
        graph: What the passes made of it.
        dtype: In what to compute, `"float32"` or `"bfloat16"`.

    Returns:
        A tensor for each weight of the graph, under its name, and a bias for each
        convolution that has none, under `bias_name`.
    """
    packed: dict[str, Tensor] = {}
    for operation in graph.operations:
        for name in operation.weights:
            if name not in packed:
                packed[name] = graph.weights[name].detach().to(torch.float32).contiguous()
    for operation in graph.operations:
        if isinstance(operation, Conv2d):
            kernels = graph.weights[operation.weight]
            packed[operation.weight] = pack_kernels(kernels, DTYPES[dtype])
            outputs = operation.kernel(graph.weights)[0]
            bias = torch.zeros(-(-outputs // PANEL) * PANEL)
            if operation.bias is not None:
                bias[:outputs] = graph.weights[operation.bias].detach()
            packed[bias_name(operation)] = bias
    return packed


def check_packed(graph: Graph, packed: Mapping[str, Tensor], dtype: str) -> None:
    """Raise a `ValueError` unless the tensors are just those that `pack` makes.

    The engine reads them by address, so this is what keeps it within them.

    Args:
        graph: Whose weights were packed; their shapes alone are read.
        packed: What is to be checked.
        dtype: For what they were packed.
    """
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (tuple(graph.weights[name].shape), torch.float32)
        for operation in graph.operations
        for name in operation.weights
    }
    for operation in graph.operations:
        if isinstance(operation, Conv2d):
            outputs, inputs, height, width = operation.kernel(graph.weights)
            panels, blocks = -(-outputs // PANEL), -(-inputs // BLOCK)
            phases = 4 if operation.upsample else 1
            size = panels * PANEL * phases * blocks * BLOCK * height * width
            expected[operation.weight] = ((size,), DTYPES[dtype])
            expected[bias_name(operation)] = ((panels * PANEL,), torch.float32)
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


def bias_name(operation: Conv2d) -> str:
    """Under what name the padded bias of a convolution is packed."""
    return operation.bias if operation.bias is not None else f"{operation.weight}.no_bias"


def pack_kernels(kernels: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels of one convolution, `[panels][phases][input blocks][taps][512]`.

    The last axis holds 32 input by 16 output channels, as `[32][16]` in float32; in
    bfloat16 pairs of input channels lie together, as `[16][16][2]`.

    Args:
        kernels: `(out, in, height, width)`, or with four phases
            `(2, 2, out, in, 2, 2)`.
        dtype: Of the result.
    """
    outputs, inputs, height, width = kernels.shape[-4:]
    phases, taps = kernels.shape[:-4].numel(), height * width
    panels, blocks = -(-outputs // PANEL), -(-inputs // BLOCK)
    padded = torch.zeros(phases, panels * PANEL, blocks * BLOCK, taps, dtype=dtype)
    padded[:, :outputs, :inputs] = kernels.detach().reshape(phases, outputs, inputs, taps)
    pair = 2 if dtype == torch.bfloat16 else 1
    split = padded.view(phases, panels, PANEL, blocks, BLOCK // pair, pair, taps)
    return split.permute(1, 0, 3, 6, 4, 2, 5).contiguous().view(-1)
