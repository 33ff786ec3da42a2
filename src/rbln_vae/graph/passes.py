"""Rewrites of a Graph, one function each; all are exact up to float32 rounding.

`optimise` runs the passes in order. Set `RBLN_VAE_DEBUG=1` to print the graph after each.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping

import torch

from ..debug import debugging
from .ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GroupNorm,
    Operation,
    Pad,
    PixelNorm,
    Upsample,
    Value,
)

Pass = Callable[[Graph], Graph]


def optimise(graph: Graph) -> Graph:
    """Run every pass.

    Args:
        graph: A captured graph.

    Returns:
        An equivalent graph with fewer operations and fewer multiplications.
    """
    for rewrite in PASSES:
        graph = rewrite(graph)
        if debugging():
            sys.stderr.write(f"after {rewrite.__name__}:\n{graph}\n\n")
    return graph


def fold_value_projection(graph: Graph) -> Graph:
    """Multiply the output projection of attention into its value projection.

    The rows of a softmax sum to one, so `(P (x Vᵀ + v)) Oᵀ + o = P (x (O V)ᵀ + O v + o)`.
    """
    made = graph.producers()
    consumers = graph.consumers()
    weights = dict(graph.weights)
    replaced: dict[Value, Operation | None] = {}
    for attention in graph.operations:
        if not isinstance(attention, Attention) or attention.heads != 1:
            continue
        value = made.get(attention.value)
        readers = consumers[attention.output]
        if not (
            attention.residual is None
            and _is_pointwise(value, graph)
            and consumers[attention.value] == [attention]
            and len(readers) == 1
            and _is_pointwise(readers[0], graph)
        ):
            continue
        assert isinstance(value, Conv2d) and isinstance(readers[0], Conv2d)
        out = readers[0]
        if value.residual is not None or not _reads_as_it_is(out):
            continue
        if attention.value in (attention.query, attention.key) or out.residual == out.input:
            continue
        # Named after the value: value names are unique, but two values may share a weight.
        folded, bias = f"{value.output}.folded.weight", f"{value.output}.folded.bias"
        weights[folded], weights[bias] = _product(out, value, weights)
        replaced[value.output] = dataclasses.replace(value, weight=folded, bias=bias)
        replaced[attention.output] = None
        replaced[out.output] = dataclasses.replace(
            attention, output=out.output, residual=out.residual
        )
    operations = [replaced.get(o.output, o) for o in graph.operations]
    return _rebuild(graph, [o for o in operations if o is not None], weights=weights)


def _is_pointwise(operation: Operation | None, graph: Graph) -> bool:
    return (
        isinstance(operation, Conv2d)
        and not operation.upsample
        and operation.stride == 1
        and not any(operation.padding)
        and operation.kernel(graph.weights)[2:] == (1, 1)
    )


def _reads_as_it_is(operation: Conv2d) -> bool:
    """Whether a convolution applies neither norm nor activation to its input."""
    return operation.norm is None and operation.activation is None


def _product(
    second: Conv2d, first: Conv2d, weights: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a 1x1 convolution that is equivalent to two in sequence."""
    outer = weights[second.weight].double().flatten(1)
    inner = weights[first.weight].double().flatten(1)
    bias = torch.zeros(outer.shape[0], dtype=torch.float64)
    if first.bias is not None:
        bias = bias + outer @ weights[first.bias].double()
    if second.bias is not None:
        bias = bias + weights[second.bias].double()
    return (outer @ inner)[:, :, None, None].float(), bias.float()


def fold_upsample(graph: Graph) -> Graph:
    """Fold nearest-neighbour doubling into the 3x3 convolution after it.

    Each output pixel then reads 2x2 pixels of the small image, through one of four kernels
    with summed taps. That takes 4/9 of the multiplications.
    """
    made = graph.producers()
    consumers = graph.consumers()
    weights = dict(graph.weights)
    operations: list[Operation] = []
    for operation in graph.operations:
        source = made.get(operation.inputs[0])
        if (
            isinstance(operation, Conv2d)
            and isinstance(source, Upsample)
            and consumers[source.output] == [operation]
            and operation.kernel(weights)[2:] == (3, 3)
            and operation.stride == 1
            and operation.padding == (1, 1, 1, 1)
            and _reads_as_it_is(operation)
        ):
            folded = f"{operation.weight}.phases"
            weights[folded] = _phases(weights[operation.weight])
            operation = dataclasses.replace(
                operation, input=source.input, weight=folded, upsample=True
            )
        operations.append(operation)
    return _rebuild(graph, operations, weights=weights)


def _phases(weight: torch.Tensor) -> torch.Tensor:
    """Turn a kernel `(out, in, 3, 3)` into `(row phase, column phase, out, in, 2, 2)`.

    An even row 2i reads rows 2i-1, 2i and 2i+1 of the doubled image, which are rows i-1, i
    and i of the small image. An odd row 2i+1 reads rows i, i and i+1 of the small image.
    """
    gather = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64
    )  # (phase, small tap, tap)
    phases = torch.einsum("oikl,pak,qbl->pqoiab", weight.double(), gather, gather)
    return phases.float().contiguous()


def fold_pad(graph: Graph) -> Graph:
    """Fold the padding of an image into the convolution that reads it."""
    made = graph.producers()
    operations: list[Operation] = []
    for operation in graph.operations:
        source = made.get(operation.inputs[0])
        while (
            isinstance(operation, Conv2d)
            and isinstance(source, Pad)
            and _reads_as_it_is(operation)
            and not operation.upsample
        ):
            above, below, left, right = (
                a + b for a, b in zip(operation.padding, source.padding, strict=True)
            )
            operation = dataclasses.replace(
                operation, input=source.input, padding=(above, below, left, right)
            )
            source = made.get(source.input)
        operations.append(operation)
    return _rebuild(graph, operations)


def fuse_norm(graph: Graph) -> Graph:
    """Fuse norms and activations into the convolutions that read them.

    A convolution can take a norm, an activation, or a norm and then an activation. A value
    that another operation also reads is not fused, since it must be computed anyway.
    """
    operations = graph.producers()
    # In reverse order, so that a convolution takes the activation before the norm.
    for source in reversed(graph.operations):
        if (
            not isinstance(source, (GroupNorm, PixelNorm, Activation))
            or source.output == graph.output
        ):
            continue
        readers = [o for o in operations.values() if source.output in o.inputs]
        fused = [conv for reader in readers if (conv := _applying(source, reader)) is not None]
        if len(fused) == len(readers):
            del operations[source.output]
            operations.update((conv.output, conv) for conv in fused)
    return _rebuild(graph, operations.values())


def _applying(source: GroupNorm | PixelNorm | Activation, reader: Operation) -> Conv2d | None:
    """The reader with a norm or an activation fused into it, or `None` if it can't take it."""
    if (
        not isinstance(reader, Conv2d)
        or reader.norm is not None
        or reader.residual == source.output
    ):
        return None
    if isinstance(source, (GroupNorm, PixelNorm)):
        return dataclasses.replace(reader, input=source.input, norm=source.norm)
    if reader.activation is not None:
        return None
    return dataclasses.replace(reader, input=source.input, activation=source.function)


def fuse_residual(graph: Graph) -> Graph:
    """Fuse an addition into the convolution or attention that produces one of its operands."""
    made = graph.producers()
    consumers = graph.consumers()
    operations = list(graph.operations)
    for add in graph.operations:
        if not isinstance(add, Add) or add.left == add.right:
            continue
        candidates = [
            operation
            for value in (add.left, add.right)
            if isinstance(operation := made.get(value), (Conv2d, Attention))
            and operation.residual is None
            and consumers[value] == [add]
            and value != graph.output
        ]
        if not candidates:
            continue
        # The one with the most taps, so that a shortcut is computed first and its input freed.
        producer = max(candidates, key=lambda operation: _taps(operation, graph))
        other = add.left if producer.output == add.right else add.right
        fused = dataclasses.replace(producer, output=add.output, residual=other)
        operations[operations.index(add)] = fused
        operations.remove(producer)
        made[add.output] = fused
    return _rebuild(graph, operations)


def fuse_output_activation(graph: Graph) -> Graph:
    """Fuse an activation into the convolution before it, where no convolution after it took it."""
    made = graph.producers()
    consumers = graph.consumers()
    operations: dict[Value, Operation] = dict(made)
    for activation in graph.operations:
        if not isinstance(activation, Activation):
            continue
        producer = operations.get(activation.input)
        if (
            isinstance(producer, Conv2d)
            and producer.output_activation is None
            and consumers[activation.input] == [activation]
            and activation.input != graph.output
        ):
            del operations[activation.input]
            operations[activation.output] = dataclasses.replace(
                producer, output=activation.output, output_activation=activation.function
            )
    return _rebuild(graph, operations.values())


def _taps(operation: Operation, graph: Graph) -> int:
    if not isinstance(operation, Conv2d):
        return 1
    rows, columns = operation.kernel(graph.weights)[2:]
    return rows * columns


def _rebuild(
    graph: Graph,
    operations: Iterable[Operation],
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Graph:
    """The graph with other operations, pruned and verified."""
    return (
        dataclasses.replace(
            graph,
            operations=tuple(operations),
            weights=graph.weights if weights is None else weights,
        )
        .pruned()
        .verify()
    )


PASSES: tuple[Pass, ...] = (
    fold_value_projection,
    fold_upsample,
    fold_pad,
    fuse_norm,
    fuse_residual,
    fuse_output_activation,
)
"""The passes in the order in which `optimise` runs them."""
