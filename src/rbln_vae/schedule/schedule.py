"""A schedule: the tasks of a run for one shape of its input, in order, and their memory."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..graph.ir import Norm, Operation, Shape, Value
from .arena import Buffer, View
from .sweep import Rows


class Kind(enum.Enum):
    """What a task does."""

    IMPORT = "Import"
    """Rows of the caller's tensor become rows of the input."""
    EXPORT = "Export"
    """Rows of the output become rows of the caller's tensor."""
    KEEP = "Keep"
    """Rows of a value are copied, before something is written over it."""
    MOVE = "MoveRows"
    """The rows that a window keeps are moved to its beginning."""
    PREPARE = "Prepare"
    """What the rules call `prepared` is made."""
    COMPUTE = "Compute"
    """Rows of an operation's output are computed."""
    STATISTICS = "Statistics"
    """An image is summed for its norms."""
    NORM = "Norm"
    """Sums become the coefficients of a norm."""


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        kind: What.
        value: The value of the graph that it is done for.
        operation: What makes the value.
        rows: Which of its rows; those that a window keeps, for `Kind.MOVE`.
        source_row: The first row of the first input that is given.
        inputs: Where the rows lie that it reads, in the order of the operation's inputs.
        output: Where those lie that it writes.
        buffers: What else it reads and writes, by name: what is prepared, `"sums"` and
            `"coefficients"`.
        norm: For `Kind.NORM`.
        flops: Products and sums that it does; two each.
        sweep: The number of the sweep that it is in a strip of, from 1; else 0.
    """

    kind: Kind
    value: Value
    operation: Operation
    rows: Rows
    source_row: int = 0
    inputs: tuple[View, ...] = ()
    output: View | None = None
    buffers: Mapping[str, Buffer] = field(default_factory=dict)
    norm: Norm | None = None
    flops: int = 0
    sweep: int = 0


@dataclass(frozen=True)
class Schedule:
    """The tasks of a run for one shape of its input.

    Attributes:
        input_shape: `(N, C, H, W)`.
        output_shape: `(N, C, H, W)`.
        tasks: In order.
        buffers: Everything in the arena.
        arena_bytes: The size of the arena.
        recomputed: The values that are never held whole, but computed in strips wherever
            they are needed; the others are computed once.
        needed_flops: Floating-point operations that a run does where all values are kept.
    """

    input_shape: Shape
    output_shape: Shape
    tasks: tuple[Task, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    recomputed: tuple[Value, ...]
    needed_flops: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a run."""
        return sum(task.flops for task in self.tasks)

    @property
    def extra_work(self) -> float:
        """What is computed again, as a share of what is needed."""
        return self.flops / self.needed_flops - 1 if self.needed_flops else 0.0

    def live_bytes(self) -> list[int]:
        """For each task, the bytes of the buffers that hold something then."""
        changes = [0] * (len(self.tasks) + 1)
        for buffer in self.buffers:
            changes[buffer.first] += buffer.bytes
            changes[buffer.last + 1] -= buffer.bytes
        return list(itertools.accumulate(changes[:-1]))
