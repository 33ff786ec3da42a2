"""What is to be scheduled, and what all schedules of it have in common."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

from ..graph.ir import (
    Conv2d,
    Graph,
    Modulate,
    Norm,
    Operation,
    Shuffle,
    Slot,
    Unstack,
    Value,
)
from .arena import ALIGNMENT
from .rules import Rules
from .sweep import Import, Sweep

PASSING_BYTES = 2**28
"""The size of a stack of frames, in bytes, from which on a sweep makes it, if one can."""

MOST_STRIPS = 128
"""About the most strips of a sweep that rematerialises nothing."""


class Problem:
    """A graph, the shape of its input, and the rules of a target.

    Args:
        graph: The optimised graph; its weights may be on the meta device.
        input_shape: `(N, input_channels, H, W)`.
        rules: The target's rules for this graph and shape.

    Attributes:
        shapes: The shape of every value.
        heights: The height of every value.
        norms: The norms that read each value.
        makers: The producers of all values, in order.
        positions: The index of the operation of the graph that produces each value.
        flops: Floating-point operations that produce each value.

    Raises:
        GraphError: The operations do not fit the input.
        RBLNCompileError: The target can't run an operation.
    """

    def __init__(self, graph: Graph, input_shape: Iterable[int], rules: Rules) -> None:
        self.graph = graph
        self.rules = rules
        self.shapes = graph.infer_shapes(input_shape)
        self.heights = {value: shape[2] for value, shape in self.shapes.items()}
        self.makers: tuple[Operation, ...] = (*map(Import, graph.inputs), *graph.operations)
        self.positions = {o.output: index for index, o in enumerate(graph.operations)}
        self.norms: dict[Value, list[Norm]] = {}
        for operation in graph.operations:
            rules.require(operation)
            norm = operation.group_norm
            if norm is not None:
                norms = self.norms.setdefault(operation.inputs[0], [])
                if norm not in norms:
                    norms.append(norm)
        self.flops = {o.output: o.flops(self.shapes, graph.weights) for o in graph.operations}
        self._row_bytes = {
            value: rules.row_bytes(shape[1], shape[3]) for value, shape in self.shapes.items()
        }
        self._kernel_heights = {
            operation.output: operation.kernel(graph.weights)[2]
            for operation in graph.operations
            if isinstance(operation, Conv2d)
        }
        self._multiples = {o.output: self.rows_at_once(o, summed=False) for o in graph.operations}
        self._sweeps: dict[tuple[tuple[Value, ...], ...], Sweep] = {}

    def row_bytes(self, value: Value) -> int:
        """Bytes of one row of a value."""
        return self._row_bytes[value]

    def bytes_of(self, value: Value) -> int:
        """Bytes of a value."""
        return self.shapes[value][0] * self.heights[value] * self.row_bytes(value)

    def rows_at_once(self, operation: Operation, *, summed: bool) -> int:
        """Rows of the output that a strip must not cut."""
        if isinstance(operation, Conv2d):
            return self.rules.rows_at_once(operation, summed=summed)
        if isinstance(operation, Modulate):  # the squares that one pixel modulates
            return self.heights[operation.input] // self.heights[operation.scale]
        if isinstance(operation, Shuffle):  # the rows of a cell
            return 2 if operation.way == "up" else 1
        return 1

    @functools.cached_property
    def homes(self) -> dict[str, tuple[Value, int]]:
        """The value that each slot of the state gets, and the offset at which it lies.

        The graphs of the first run and of the others give the same offsets.
        """
        found, end = {}, 0
        for slot in self.graph.state:
            found[slot.name] = slot.left, end
            size = self.bytes_of(slot.left)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def state_bytes(self) -> int:
        """The bytes of the state."""
        if not self.homes:
            return 0
        value, begin = list(self.homes.values())[-1]
        size = self.bytes_of(value)
        return begin + -(-size // ALIGNMENT) * ALIGNMENT

    @functools.cached_property
    def readers(self) -> dict[Value, list[Operation]]:
        """The operations that read each value."""
        return self.graph.consumers()

    @functools.cached_property
    def passing(self) -> dict[Value, Value]:
        """The stacks that are never whole, and for each the value whose sweep makes it.

        They are large, and one sweep reads all of them: so it holds rows of them only, and brings
        the frames that the run leaves to their places in the state, row by row, once the rows
        there are no longer read.
        """
        found: dict[Value, Value] = {}
        if not any(slot.read for slot in self.graph.state):
            return found  # The first run makes single frames, in their places.
        for maker in reversed(self.graph.operations):
            value = maker.output
            if (
                isinstance(maker, Conv2d)
                and maker.stride == 1
                and self.bytes_of(value) >= PASSING_BYTES
            ):
                sweeps = {
                    found.get(reader.output, reader.output)
                    for reader in self.readers[value]
                    if not isinstance(reader, Unstack)
                }
                if len(sweeps) == 1 and self._passes(value):
                    (found[value],) = sweeps
        return found

    def _passes(self, value: Value) -> bool:
        """Whether convolutions alone read a value, and its frames are only left in the state."""
        frames = [reader.output for reader in self.readers[value] if isinstance(reader, Unstack)]
        return (
            value not in self.norms
            and value not in self.graph.outputs
            and value not in self.graph.carried
            and all(
                isinstance(reader, Unstack) or (isinstance(reader, Conv2d) and not reader.upsample)
                for reader in self.readers[value]
            )
            and not any(self.readers[frame] or frame in self.graph.outputs for frame in frames)
            and all(
                self._followed(slot) == value for slot in self.graph.state if slot.left in frames
            )
        )

    def _followed(self, slot: Slot) -> Value | None:
        """The stack that the only reader of a slot reads as the frames after it, row by row."""
        others = [other for other in self.graph.state if slot.read in (other.read, other.left)]
        if slot.read is None or others != [slot] or len(self.readers[slot.read]) != 1:
            return None
        (reader,) = self.readers[slot.read]
        if not isinstance(reader, Conv2d) or slot.read not in reader.earlier:
            return None
        return reader.input if self.heights[reader.output] == self.heights[reader.input] else None

    def strip_unit(self, targets: Iterable[Operation]) -> int:
        """The number of which the rows of a strip must be a multiple."""
        return math.lcm(*(self.rows_at_once(o, summed=o.output in self.norms) for o in targets))

    def sweep(self, members: Sequence[Operation], targets: Sequence[Operation]) -> Sweep:
        """The sweep that computes the targets in strips of the right height."""
        key = tuple(m.output for m in members), tuple(t.output for t in targets)
        if key not in self._sweeps:
            sweep = Sweep(
                members, targets, self.heights, self._kernel_heights, self._multiples, step=1
            )
            unit, wanted = self.strip_unit(targets), self.rules.strip_rows(sweep)
            if not members:
                # Only few rows lie between what is read and what is written over it.
                wanted = max(wanted, sweep.height // MOST_STRIPS)
            step = unit * max(1, round(wanted / unit))
            self._sweeps[key] = dataclasses.replace(sweep, step=step)
        return self._sweeps[key]
