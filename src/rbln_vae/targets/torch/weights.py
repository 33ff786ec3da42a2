"""The weights of a graph as PyTorch's kernels take them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.ir import Conv2d, Graph, Norm, RMSNorm
from .rules import Machine


class Weights:
    """The weights of a graph on a device.

    Args:
        graph: An optimised graph; the weights of that of the first run are taken, too.
        machine: The device, and the dtype of kernels and biases.
    """

    def __init__(self, graph: Graph, machine: Machine) -> None:
        self._tensors: dict[str, Tensor] = {}
        for each in (graph.start, graph):
            self._add_all(each, machine)

    def _add_all(self, graph: Graph, machine: Machine) -> None:
        for operation in graph.operations:
            norm = getattr(operation, "norm", None)
            if isinstance(norm, Norm):
                self._add(norm.weight, graph, machine, torch.float32)
                self._add(norm.bias, graph, machine, torch.float32)
            elif isinstance(norm, RMSNorm):
                self._add(norm.weight, graph, machine, torch.float32)
            if isinstance(operation, Conv2d):
                name, kernel = kernel_name(operation, graph), graph.weights[operation.weight]
                if name not in self._tensors:
                    kernel = kernel if name == operation.weight else doubling_kernel(kernel)
                    if operation.has_phases(graph.weights):
                        kernel = kernel.flatten(0, 2)
                    elif machine.fused and name == operation.weight:
                        # cuDNN is slow with output channels that fill no 16 bytes.
                        kernel = F.pad(kernel, (0,) * 7 + (-len(kernel) % 8,))
                    self._tensors[name] = kernel.to(machine.device, machine.dtype).contiguous(
                        memory_format=torch.channels_last
                    )
                if operation.bias is not None:
                    self._add(operation.bias, graph, machine, machine.dtype)

    def _add(self, name: str, graph: Graph, machine: Machine, dtype: torch.dtype) -> None:
        key = f"{name} {dtype}"
        if key not in self._tensors:
            self._tensors[key] = graph.weights[name].to(machine.device, dtype).flatten()

    def on(self, device: torch.device) -> Weights:
        """The same on another device."""
        copies = copy.copy(self)
        copies._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return copies

    def kernel(self, operation: Conv2d, graph: Graph) -> Tensor:
        """The kernel of a convolution.

        Of one that doubles the image it is that of a transposed convolution, `(in, out, 4, 4)`.
        One that has phases has them before its output channels, `(4 * out, in, 3, 3)`. There
        may be more output channels, of zeros.
        """
        return self._tensors[kernel_name(operation, graph)]

    def vector(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights of a norm in float32, or a bias in the dtype of the machine."""
        return self._tensors[f"{name} {dtype}"]


def kernel_name(operation: Conv2d, graph: Graph) -> str:
    """The name of a kernel, which may differ between operations that share a weight."""
    return f"{operation.weight}{' doubling' if operation.doubles(graph.weights) else ''}"


def doubling_kernel(kernel: Tensor) -> Tensor:
    """The kernel of the transposed convolution that doubles an image and convolves it.

    An even row `2i` of the doubled image meets rows `i - 1`, `i` and `i` of the image, and an
    odd row `2i + 1` meets `i`, `i` and `i + 1`. In a transposed convolution of stride 2 and
    padding 1, row `i` meets the output row `o` by the tap `o + 1 - 2i`.

    Args:
        kernel: `(out, in, 3, 3)`.

    Returns:
        `(in, out, 4, 4)` in float64.
    """
    sums = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    return torch.einsum("oikl,pk,ql->iopq", kernel.double(), sums, sums)
