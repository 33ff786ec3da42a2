"""Builds the two graphs of a network that is causal in time, frame by frame.

A layer is a function from a frame to the frames that it makes of it, an iterator. So a network
makes each of its results before it begins the next, and only a few frames are in memory besides
the state. What a layer must remember, it keeps in a `Past`.
"""

from __future__ import annotations

import itertools
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
    Upsample,
    Value,
)

Layer: TypeAlias = Callable[[Value], Iterator[Value]]
"""Makes frames of a frame: one, several, or none until more have come."""


def chain(layers: Sequence[Layer]) -> Layer:
    """Layers one after the other, as a layer."""
    if not layers:
        return lambda frame: iter((frame,))
    rest = chain(layers[1:])
    return lambda frame: itertools.chain.from_iterable(map(rest, layers[0](frame)))


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

    def followed_by(self, *frames: Value) -> list[Value]:
        """What is remembered and the frames that come now, which are remembered from now on."""
        window = [*self.frames, *frames]
        self.frames = window[-self.length :]
        return window

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
        outputs = tuple(itertools.chain.from_iterable(map(layer, inputs)))
        slots = [slot for path, past in self._pasts.items() for slot in past.left(path)]
        if not self.is_first:
            slots = [Slot(slot.name, slot.name, slot.left) for slot in slots]
        return Graph(
            self.part,
            inputs,
            self.channels,
            outputs,
            tuple(self.operations),
            self.weights,
            tuple(slots),
            self.first,
        ).verify()

    def weight(self, name: str, weight: Tensor) -> str:
        """Add a weight, unless it is there."""
        if name not in self.weights:
            self.weights[name] = weight.detach().float().cpu().contiguous()
        return name

    def _add(self, path: str, make: Callable[[Value], Operation]) -> Value:
        count = self._counts.setdefault(path, 0)
        self._counts[path] = count + 1
        operation = make(f"{path}@{count}")
        self.operations.append(operation)
        return operation.output

    # Operations

    def convolution(
        self,
        path: str,
        frames: Sequence[Value],
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        upsample: bool = False,
        norm: RMSNorm | None = None,
        activation: str | None = None,
    ) -> Value:
        """A convolution of a frame and those before it.

        Args:
            path: The name of the layer.
            frames: The frames, the last one last. Where the kernel has more, zeros come before.
            weight: `(out, in, frames, height, width)`; with `upsample` after two axes of phases.
            bias: By default none.
            stride: As of `Conv2d`; by default 1.
            padding: As of `Conv2d`; by default none.
            upsample: As of `Conv2d`; by default `False`.
            norm: Of each frame, by default none.
            activation: Applied after it, by default none.
        """
        taps = weight.shape[-3]
        used = frames[-taps:]
        flat = weight.movedim(-3, -4).flatten(-4, -3)
        return self._add(
            path,
            lambda output: Conv2d(
                output,
                used[-1],
                self.weight(f"{path}.weight", flat),
                None if bias is None else self.weight(f"{path}.bias", bias),
                stride,
                padding,
                upsample,
                norm,
                activation,
                earlier=tuple(used[:-1]),
                left_out=taps - len(used),
            ),
        )

    def pixel_norm(self, path: str, gamma: Tensor) -> RMSNorm:
        """The norm of `torch.nn.functional.normalize` over channels, times root and weights."""
        # The norm is at least 1e-12 there: such an eps changes no other pixel's result.
        return RMSNorm(1e-24 / gamma.numel(), self.weight(f"{path}.gamma", gamma.flatten()))

    def add(self, path: str, left: Value, right: Value) -> Value:
        """The sum of two frames."""
        return self._add(path, lambda output: Add(output, left, right))

    def upsample(self, path: str, frame: Value) -> Value:
        """A frame doubled by nearest neighbours."""
        return self._add(path, lambda output: Upsample(output, frame))

    def shuffle(self, path: str, frame: Value, order: Tensor) -> Value:
        """A frame of twice the size, whose cells have the given elements of its pixels."""
        elements = tuple(order.tolist())
        return self._add(path, lambda output: Shuffle(output, frame, "up", elements))

    def mixed(self, path: str, query: Value, key: Value, value: Value, scale: float) -> Value:
        """Attention between the pixels of a frame, with one head."""
        return self._add(path, lambda output: Attention(output, query, key, value, 1, scale))


def reading_cells(kernels: Tensor, order: Tensor) -> Tensor:
    """The kernels of twice the size that read the pixels of 2x2 cells where they are.

    Args:
        kernels: `(out, in, frames, height, width)`, of an image whose cells are channels.
        order: Which element of a cell each channel is, in the order channel, row, column.
    """
    cells = torch.zeros_like(kernels).index_copy_(1, order, kernels)
    shuffled = torch.nn.functional.pixel_shuffle(cells.movedim(2, 1), 2)
    return shuffled.movedim(1, 2)
