"""Builds the two graphs of a network that is causal in time.

A layer is a function from the frames that a run gives it to those that it makes of them. Several
frames are a stack, one value: so a convolution over frames has all of them before it, and shares
products between them. What a layer must remember, it keeps in a `Past`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..graph.ir import (
    Add,
    Attention,
    Conv2d,
    Graph,
    Operation,
    RMSNorm,
    Shuffle,
    Slot,
    Stack,
    Unstack,
    Upsample,
    Value,
)

Layer: TypeAlias = Callable[[Value], Value]
"""Makes frames of frames: a stack of a stack, or a single one."""


def chain(layers: Sequence[Layer]) -> Layer:
    """Layers one after the other, as a layer."""
    return lambda frames: functools.reduce(lambda value, layer: layer(value), layers, frames)


class Past:
    """The frames that a layer remembers, the oldest first; zeros come before them.

    Args:
        read: Those that are read from the state; none in the first run.
        length: How many are remembered.
        forgets: Whether the first run leaves zeros instead.
    """

    def __init__(self, read: list[Value], length: int, forgets: bool) -> None:
        self.frames = read
        self.length = length
        self.forgets = forgets

    def followed_by(self, frames: Sequence[Value]) -> list[Value]:
        """What is remembered; the last of the frames that come now are from now on.

        Args:
            frames: At least the last ones, as many as are remembered.
        """
        before = self.frames
        self.frames = [*before, *frames][-self.length :]
        return before

    def left(self, name: str) -> Iterator[Slot]:
        """The slots in which it is left; they have the names of those that were read."""
        missing = self.length - len(self.frames)
        for index in range(self.length):
            absent = index < missing or self.forgets
            value = self.frames[max(0, index - missing)]
            yield Slot(f"{name}[{index}]", None, value, zeros=absent)


class Unrolled:
    """A graph in the making: of the first run, or of those that follow.

    Args:
        part: The name of the part.
        channels: Of its inputs.
        first: The graph of the first run, if this is that of the others. By default it is
            that of the first run.
    """

    def __init__(self, part: str, channels: int, first: Graph | None = None) -> None:
        self.part = part
        self.channels = channels
        self.first = first
        self.operations: list[Operation] = []
        self.weights: dict[str, Tensor] = {}
        self._pasts: dict[str, Past] = {}
        self._counts: dict[str, int] = {}
        self._frames: dict[Value, list[Value | None]] = {}

    @property
    def is_first(self) -> bool:
        """Whether nothing comes before the run."""
        return self.first is None

    def past(self, path: str, length: int, *, forgets: bool = False) -> Past:
        """What a layer remembers.

        Args:
            path: The name of the layer.
            length: How many frames.
            forgets: Whether the first run leaves zeros. By default `False`.
        """
        read = [] if self.is_first else [f"{path}[{index}]" for index in range(length)]
        self._pasts[path] = past = Past(read, length, forgets and self.is_first)
        return past

    def graph(self, layer: Layer, frames: int) -> Graph:
        """The graph that a network makes of so many frames."""
        inputs = tuple(f"frame@{index}" for index in range(frames))
        results = layer(self.stack("frames", inputs))
        outputs = tuple(self.unstack(results, index) for index in range(self.count(results)))
        slots = [slot for path, past in self._pasts.items() for slot in past.left(path)]
        if not self.is_first:
            slots = [Slot(slot.name, slot.name, slot.left) for slot in slots]
        graph = Graph(
            self.part,
            inputs,
            self.channels,
            outputs,
            tuple(self.operations),
            self.weights,
            tuple(slots),
            self.first,
        )
        return graph.pruned().verify()  # of some stacks only the frames are read

    def weight(self, name: str, weight: Tensor) -> str:
        """Add a weight, unless it is there."""
        if name not in self.weights:
            self.weights[name] = weight.detach().float().cpu().contiguous()
        return name

    def _add(self, path: str, make: Callable[[Value], Operation], *, of: Value) -> Value:
        """Add an operation, which gives as many frames as a value has."""
        count = self._counts.setdefault(path, 0)
        self._counts[path] = count + 1
        operation = make(f"{path}@{count}")
        self.operations.append(operation)
        self._frames[operation.output] = [None] * self.count(of)
        return operation.output

    # Frames

    def count(self, value: Value) -> int:
        """The frames of a value."""
        return len(self._frames.get(value, (value,)))

    def stack(self, path: str, frames: Sequence[Value]) -> Value:
        """Single frames as one value."""
        if len(frames) == 1:
            return frames[0]
        stack = self._add(path, lambda output: Stack(output, tuple(frames)), of=frames[0])
        self._frames[stack] = list(frames)
        return stack

    def unstack(self, value: Value, index: int) -> Value:
        """One of the frames of a value."""
        if self.count(value) == 1:
            return value
        frames = self._frames[value]
        single = frames[index]
        if single is None:
            operation = Unstack(f"{value}[{index}]", value, index, len(frames))
            self.operations.append(operation)
            single = frames[index] = operation.output
        return single

    def last(self, value: Value, count: int) -> list[Value]:
        """The last frames of a value, at most so many."""
        frames = self.count(value)
        return [self.unstack(value, index) for index in range(max(0, frames - count), frames)]

    def in_turn(self, path: str, values: Sequence[Value]) -> Value:
        """The frames of several values in turn: the first of each, then the second, and so on."""
        if len(values) == 1:
            return values[0]
        count = self.count(values[0])
        return self.stack(path, [self.unstack(v, i) for i in range(count) for v in values])

    # Operations

    def convolution(
        self,
        path: str,
        frames: Value,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        earlier: Sequence[Value] = (),
        stride: int = 1,
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        upsample: bool = False,
        norm: RMSNorm | None = None,
        activation: str | None = None,
    ) -> Value:
        """A convolution of each of some frames and those before it.

        Args:
            path: The name of the layer.
            frames: The frames.
            weight: `(out, in, frames, height, width)`; with `upsample` after two axes of phases.
            bias: By default none.
            earlier: Frames before them, the last one last, by default none. Where the kernel has
                more, zeros come before a single frame.
            stride: As of `Conv2d`; by default 1.
            padding: As of `Conv2d`; by default none.
            upsample: As of `Conv2d`; by default `False`.
            norm: Of each frame, by default none.
            activation: Applied after it, by default none.
        """
        taps = weight.shape[-3]
        used = tuple(earlier[max(0, len(earlier) - taps + 1) :])
        flat = weight.movedim(-3, -4).flatten(-4, -3)
        return self._add(
            path,
            lambda output: Conv2d(
                output,
                frames,
                self.weight(f"{path}.weight", flat),
                None if bias is None else self.weight(f"{path}.bias", bias),
                stride,
                padding,
                upsample,
                norm,
                activation,
                earlier=used,
                left_out=taps - 1 - len(used),
            ),
            of=frames,
        )

    def pixel_norm(self, path: str, gamma: Tensor) -> RMSNorm:
        """The norm of `torch.nn.functional.normalize` over channels, times root and weights."""
        # The norm is at least 1e-12 there: such an eps changes no other pixel's result.
        return RMSNorm(1e-24 / gamma.numel(), self.weight(f"{path}.gamma", gamma.flatten()))

    def add(self, path: str, left: Value, right: Value) -> Value:
        """The sum of two frames."""
        return self._add(path, lambda output: Add(output, left, right), of=left)

    def upsample(self, path: str, frame: Value) -> Value:
        """A frame doubled by nearest neighbours."""
        return self._add(path, lambda output: Upsample(output, frame), of=frame)

    def shuffle(self, path: str, frame: Value, order: Tensor) -> Value:
        """A frame of twice the size, whose cells have the given elements of its pixels."""
        elements = tuple(order.tolist())
        return self._add(path, lambda output: Shuffle(output, frame, "up", elements), of=frame)

    def mixed(self, path: str, query: Value, key: Value, value: Value, scale: float) -> Value:
        """Attention between the pixels of a frame, with one head."""
        return self._add(
            path, lambda output: Attention(output, query, key, value, 1, scale), of=query
        )


def reading_cells(kernels: Tensor, order: Tensor) -> Tensor:
    """The kernels of twice the size that read the pixels of 2x2 cells where they are.

    Args:
        kernels: `(out, in, frames, height, width)`, of an image whose cells are channels.
        order: Which element of a cell each channel is, in the order channel, row, column.
    """
    cells = torch.zeros_like(kernels).index_copy_(1, order, kernels)
    shuffled = torch.nn.functional.pixel_shuffle(cells.movedim(2, 1), 2)
    return shuffled.movedim(1, 2)
