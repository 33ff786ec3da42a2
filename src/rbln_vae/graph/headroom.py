"""Keeps images within the range of float16, by a factor that what reads them undoes.

The residual stream of a model is a value that sums are added to, block after block, so that it
grows: in SDXL's decoder beyond 65504, the largest number of float16. Norms read it, and a norm
gives the same for a multiple of its input. So an image may be stored times any factor, if norms
read it, or convolutions that divide their weights by the factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from .ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GroupNorm,
    Identity,
    Modulate,
    Norm,
    Operation,
    Pad,
    PixelNorm,
    RMSNorm,
    Scale,
    Shuffle,
    Upsample,
    Value,
)

HEADROOM = 2.0**-8
"""The factor of images. It admits values up to 1.6e7, and costs no precision as long as an image
spreads more than 0.03 about zero: of smaller values too many are denormal in float16. A power of
two, so that it is exact."""


def give_headroom(graph: Graph, factor: float = HEADROOM) -> Graph:
    """Multiply images by a factor, and undo that wherever they are read.

    The result is exact for a power of two, but for numbers that become denormal. An image is
    left as it is if something reads it that can't undo the factor, such as most activations.

    Args:
        graph: An optimised graph.
        factor: By default `HEADROOM`.

    Returns:
        An equivalent graph. It shares the weights that didn't change.
    """
    together = _Together()
    fixed = {*graph.inputs, *graph.outputs}
    for operation in graph.operations:
        output = operation.output
        match operation:
            case Conv2d():
                if operation.norm is None and operation.activation not in (None, "relu"):
                    fixed.add(operation.input)
                if operation.residual is not None:
                    together.join(output, operation.residual)
                if operation.output_activation not in (None, "relu"):
                    fixed.add(output)
            case Attention():
                together.join(output, operation.value)
                if operation.residual is not None:
                    together.join(output, operation.residual)
            case Add():
                together.join(output, operation.left)
                together.join(output, operation.right)
            case Identity() | Upsample() | Pad() | Shuffle():
                together.join(output, operation.input)
            case Modulate():
                fixed.add(operation.scale)
                if operation.norm is None:
                    together.join(output, operation.input)
                else:
                    fixed.add(output)
                if operation.shift is not None:
                    together.join(output, operation.shift)
            case Activation():
                together.join(output, operation.input)
                if operation.function != "relu":
                    fixed.add(output)
            case GroupNorm() | PixelNorm():
                fixed.add(output)
    left = {together.root(value) for value in fixed}

    def of(value: Value) -> float:
        return 1.0 if together.root(value) in left else factor

    weights = dict(graph.weights)
    operations = tuple(_scaled(operation, of, weights) for operation in graph.operations)
    return dataclasses.replace(graph, operations=operations, weights=weights).pruned().verify()


def _scaled(
    operation: Operation, of: Callable[[Value], float], weights: dict[str, torch.Tensor]
) -> Operation:
    """An operation whose inputs and output have been multiplied by factors."""
    makes = of(operation.output)
    match operation:
        case Conv2d():
            reads = of(operation.input)
            norm = operation.norm and _undoing(operation.norm, reads)
            into = makes if norm is not None else makes / reads
            weight, bias = operation.weight, operation.bias
            if into != 1:
                weight = f"{operation.output}.weight.scaled"
                weights[weight] = weights[operation.weight] * into
            if bias is not None and makes != 1:
                bias = f"{operation.output}.bias.scaled"
                weights[bias] = weights[operation.bias or ""] * makes
            return dataclasses.replace(operation, weight=weight, bias=bias, norm=norm)
        case Attention():
            scale = operation.scale / (of(operation.query) * of(operation.key))
            return dataclasses.replace(operation, scale=scale)
        case Scale():
            through = operation.factor * makes / of(operation.input)
            return dataclasses.replace(operation, factor=through, offset=operation.offset * makes)
        case GroupNorm() | Modulate(norm=Norm()):
            assert operation.norm is not None
            return dataclasses.replace(
                operation, norm=_undoing(operation.norm, of(operation.input))
            )
        case PixelNorm():
            return dataclasses.replace(
                operation, norm=_undoing(operation.norm, of(operation.input))
            )
        case _:
            return operation


AnyNorm = TypeVar("AnyNorm", bound=Norm | RMSNorm)


def _undoing(norm: AnyNorm, factor: float) -> AnyNorm:
    """The norm of an image that has been multiplied by a factor."""
    return dataclasses.replace(norm, eps=norm.eps * factor**2)


class _Together:
    """Sets of values that have the same factor."""

    def __init__(self) -> None:
        self._parents: dict[Value, Value] = {}

    def root(self, value: Value) -> Value:
        while (parent := self._parents.get(value, value)) != value:
            value = parent
        return value

    def join(self, value: Value, other: Value) -> None:
        self._parents[self.root(value)] = self.root(other)
