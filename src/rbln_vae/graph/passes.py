"""Rewrites of a Graph, one function each; all are exact up to float32 rounding.

`optimise` runs the passes in order. Set `RBLN_VAE_DEBUG=1` to print the graph after each.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F

from ..debug import debugging
from .ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GroupNorm,
    Modulate,
    Operation,
    Pad,
    PixelNorm,
    Scale,
    Shuffle,
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
    if graph.first is not None:
        graph = dataclasses.replace(graph, first=optimise(graph.first))
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
        and operation.frames == 1
        and not any(operation.padding)
        and operation.kernel(graph.weights)[2:] == (1, 1)
    )


def _reads_as_it_is(operation: Conv2d) -> bool:
    """Whether a convolution reads its input alone, and applies neither norm nor activation."""
    return operation.norm is None and operation.activation is None and operation.frames == 1


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
    with summed taps: 4/9 of the multiplications, or fewer.
    """
    made = graph.producers()
    consumers = graph.consumers()
    operations: list[Operation] = []
    for operation in graph.operations:
        source = made.get(operation.inputs[0])
        if (
            isinstance(operation, Conv2d)
            and not operation.upsample
            and isinstance(source, Upsample)
            and consumers[source.output] == [operation]
            and operation.kernel(graph.weights)[2:] == (3, 3)
            and operation.stride == 1
            and operation.padding == (1, 1, 1, 1)
            and _reads_as_it_is(operation)
        ):
            operation = dataclasses.replace(operation, input=source.input, upsample=True)
        operations.append(operation)
    return _rebuild(graph, operations)


def fold_scale(graph: Graph) -> Graph:
    """Fold scales into each other, and into the convolution before them."""
    consumers = graph.consumers()
    weights = dict(graph.weights)
    operations: dict[Value, Operation] = {}
    for operation in graph.operations:
        source = operations.get(operation.inputs[0])
        if (
            isinstance(operation, Scale)
            and source is not None
            and source.output not in graph.results
            and len(consumers[source.output]) == 1
            and (folded := _scaled(source, operation, weights)) is not None
        ):
            del operations[source.output]
            operation = folded
        operations[operation.output] = operation
    return _rebuild(graph, operations.values(), weights=weights)


def _scaled(
    source: Operation, scale: Scale, weights: dict[str, torch.Tensor]
) -> Scale | Conv2d | None:
    """A scale and the operation before it as one, or `None`."""
    if isinstance(source, Scale):
        offset = source.offset * scale.factor + scale.offset
        return Scale(scale.output, source.input, source.factor * scale.factor, offset)
    if (
        not isinstance(source, Conv2d)
        or source.residual is not None
        or source.output_activation is not None
    ):
        return None
    weight, bias = f"{scale.output}.weight", f"{scale.output}.bias"
    weights[weight] = weights[source.weight] * scale.factor
    before = torch.zeros(source.kernel(weights)[0], dtype=torch.float32)
    if source.bias is not None:
        before = weights[source.bias]
    weights[bias] = before * scale.factor + scale.offset
    return dataclasses.replace(source, output=scale.output, weight=weight, bias=bias)


def fold_shuffle(graph: Graph) -> Graph:
    """Fold orders of channels into shuffles of pixels, and these into convolutions.

    A convolution before a shuffle that doubles the image writes the pixels where they belong,
    by a kernel for each phase. One after a shuffle that halves the image reads the pixels where
    they are, by a kernel of twice the size.
    """
    shapes = graph.probe_shapes()
    consumers = graph.consumers()
    weights = dict(graph.weights)
    operations: dict[Value, Operation] = {}
    for operation in graph.operations:
        folded: Operation | None = operation
        while folded is not None:
            operation, folded = folded, None
            value = operation.inputs[0]
            if value in graph.results or len(consumers[value]) > 1:
                break
            match operations.get(value), operation:
                case Shuffle() as source, Shuffle():
                    folded = _one_shuffle(source, operation)
                case Conv2d() as source, Shuffle():
                    folded = _writing_phases(source, operation, weights)
                case Shuffle() as source, Conv2d():
                    channels = shapes[source.input][1]
                    folded = _reading_cells(source, channels, operation, weights)
            if folded is not None:
                del operations[value]
        operations[operation.output] = operation
    return _rebuild(graph, operations.values(), weights=weights)


def _one_shuffle(first: Shuffle, second: Shuffle) -> Shuffle | None:
    """Two shuffles as one, if one of them only orders channels; else `None`."""
    if first.way == "channels" and second.way == "down":
        order = tuple(4 * first.order[e // 4] + e % 4 for e in second.order)
        return Shuffle(second.output, first.input, "down", order)
    if second.way == "channels" and first.way != "up":
        way = first.way
    elif first.way == "channels" and second.way == "up":
        way = "up"
    else:
        return None
    order = tuple(first.order[element] for element in second.order)
    return Shuffle(second.output, first.input, way, order)


def _writing_phases(
    conv: Conv2d, shuffle: Shuffle, weights: dict[str, torch.Tensor]
) -> Conv2d | None:
    """A 3x3 convolution that writes the output of a doubling shuffle, or `None`."""
    if (
        shuffle.way != "up"
        or weights[conv.weight].shape[2:] != (3, 3)
        or conv.stride != 1
        or conv.padding != (1, 1, 1, 1)
        or conv.residual is not None
        or conv.output_activation is not None
        or conv.frames > 1
    ):
        return None
    # The elements of a cell of the output, as (row, column, channel).
    order = torch.tensor(shuffle.order).view(-1, 2, 2).permute(1, 2, 0)
    weight, bias = f"{shuffle.output}.weight", None
    weights[weight] = weights[conv.weight][order]
    if conv.bias is not None:
        bias = f"{shuffle.output}.bias"
        weights[bias] = weights[conv.bias][order]
    return dataclasses.replace(conv, output=shuffle.output, weight=weight, bias=bias, upsample=True)


MOST_READ_IN_CELLS = 8
"""The most channels of an image whose cells a convolution reads by a kernel of twice the size.

That has four times the taps for a quarter of the channels: no loss where the cells have no more
channels than the engine multiplies together.
"""


def _reading_cells(
    shuffle: Shuffle, channels: int, conv: Conv2d, weights: dict[str, torch.Tensor]
) -> Conv2d | None:
    """A convolution that reads the input of a halving shuffle, or `None`."""
    kernel = weights[conv.weight]
    if (
        shuffle.way != "down"
        or channels > MOST_READ_IN_CELLS
        or conv.upsample
        or conv.residual == shuffle.output
        or not _reads_as_it_is(conv)
    ):
        return None
    cells = kernel.new_zeros(kernel.shape[0], 4 * channels, *kernel.shape[2:])
    cells.index_add_(1, torch.tensor(shuffle.order), kernel)
    weight = f"{conv.output}.weight.cells"
    weights[weight] = F.pixel_shuffle(cells, 2)
    above, below, left, right = (2 * amount for amount in conv.padding)
    return dataclasses.replace(
        conv,
        input=shuffle.input,
        weight=weight,
        stride=2 * conv.stride,
        padding=(above, below, left, right),
    )


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


def fuse_modulation(graph: Graph) -> Graph:
    """Fuse the sum after a modulation into it, and modulate by images that aren't yet doubled.

    A 1x1 convolution of a doubled image is the convolution of the image, doubled.
    """
    made = graph.producers()
    consumers = graph.consumers()
    shapes = graph.probe_shapes()
    operations = graph.producers()
    for add in graph.operations:
        if not isinstance(add, Add):
            continue
        for value, shift in ((add.left, add.right), (add.right, add.left)):
            modulate = made.get(value)
            if (
                isinstance(modulate, Modulate)
                and modulate.shift is None
                and consumers[value] == [add]
                and value != shift
                and value not in graph.results
                and shapes[shift] == shapes[modulate.scale]
            ):
                del operations[value]
                operations[add.output] = dataclasses.replace(
                    modulate, output=add.output, shift=shift
                )
                small = [_undoubled(each, graph) for each in (modulate.scale, shift)]
                if small[0] is not None and small[1] is not None and small[0][1] == small[1][1]:
                    operations.update((conv.output, conv) for conv, _ in filter(None, small))
                break
    return _rebuild(graph, operations.values())


def _undoubled(value: Value, graph: Graph) -> tuple[Conv2d, int] | None:
    """A 1x1 convolution of a doubled image, without the doublings, and their number.

    `None` if the value isn't one, or more than one operation reads it.
    """
    made = graph.producers()
    conv = made.get(value)
    if (
        not isinstance(conv, Conv2d)
        or not _is_pointwise(conv, graph)
        or not _reads_as_it_is(conv)
        or conv.residual is not None
        or len(graph.consumers()[value]) != 1
        or value in graph.results
    ):
        return None
    image, times = conv.input, 0
    while isinstance(source := made.get(image), Upsample):
        image, times = source.input, times + 1
    return dataclasses.replace(conv, input=image), times


def fuse_norm(graph: Graph) -> Graph:
    """Fuse norms and activations into the operations that read them.

    A convolution can take a norm, an activation, or a norm and then an activation; a modulation
    can take a group norm. A value that another operation also reads is not fused, since it must be
    computed anyway.
    """
    operations = graph.producers()
    # In reverse order, so that a convolution takes the activation before the norm.
    for source in reversed(graph.operations):
        if (
            not isinstance(source, (GroupNorm, PixelNorm, Activation))
            or source.output in graph.results
        ):
            continue
        readers = [o for o in operations.values() if source.output in o.inputs]
        fused = [found for reader in readers if (found := _applying(source, reader)) is not None]
        if len(fused) == len(readers):
            del operations[source.output]
            operations.update((reader.output, reader) for reader in fused)
    return _rebuild(graph, operations.values())


def _applying(source: GroupNorm | PixelNorm | Activation, reader: Operation) -> Operation | None:
    """The reader with a norm or an activation fused into it, or `None` if it can't take it."""
    if isinstance(reader, Modulate):
        takes = reader.norm is None and source.output not in (reader.scale, reader.shift)
        if not takes or not isinstance(source, GroupNorm):
            return None
        return dataclasses.replace(reader, input=source.input, norm=source.norm)
    if (
        not isinstance(reader, Conv2d)
        or reader.norm is not None
        or reader.residual == source.output
        or (reader.frames > 1 and not reader.over_clip)
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
            and value not in graph.results
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
            and activation.input not in graph.results
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
    fold_scale,
    fold_shuffle,
    fold_pad,
    fuse_modulation,
    fuse_norm,
    fuse_residual,
    fuse_output_activation,
)
"""The passes in the order in which `optimise` runs them."""
