"""A schedule: the tasks of a run for one input shape, in order, and their memory."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..graph.ir import Norm, Operation, Shape, Value
from .arena import Buffer, View, live_bytes
from .sweep import Rows


class Kind(enum.Enum):
    """The kinds of tasks."""

    IMPORT = "Import"
    """Copy rows of the caller's tensor to an input."""
    EXPORT = "Export"
    """Copy rows of an output to the caller's tensor."""
    COPY = "Copy"
    """Copy an image: to where the state of a video has it, or to its place in a stack."""
    MOVE = "MoveRows"
    """Move the rows that a window still needs to its beginning."""
    PREPARE = "Prepare"
    """Make the buffers that `Rules.prepared` names."""
    COMPUTE = "Compute"
    """Compute rows of an operation's output."""
    STATISTICS = "Statistics"
    """Sum an image for its norms."""
    NORM = "Norm"
    """Turn sums into the coefficients of a norm."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a run.

    Attributes:
        kind: The kind of task.
        value: The value of the graph that the task belongs to.
        operation: The producer of the value.
        rows: The rows of the value; for `Kind.MOVE`, the rows of the window that it keeps.
        source_row: The row of the image at which the view of the first input begins.
        inputs: The rows that the task reads, in the order of the operation's inputs.
        output: The rows that the task writes, if any.
        buffers: Other buffers that it reads or writes, by name: prepared ones, `"sums"` and
            `"coefficients"`.
        norm: The norm, for `Kind.NORM`.
        tensor: The number of the input or output of the graph, for an import or export.
        flops: Floating-point operations of the task; a product and its sum count as two.
        sweep: The number of the task's sweep, from 1; 0 outside sweeps.
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
    tensor: int = 0
    flops: int = 0
    sweep: int = 0


@dataclass(frozen=True)
class Schedule:
    """The tasks of a run for one input shape.

    Attributes:
        input_shape: `(N, C, H, W)` of each input.
        output_shape: `(N, C, H, W)` of each output.
        inputs: The number of inputs.
        outputs: The number of outputs.
        tasks: The tasks, in order.
        buffers: All buffers of the arena.
        arena_bytes: The size of the arena.
        state_bytes: The size of the state of a video, which is not a part of the arena. In the
            addresses of buffers it follows the arena.
        recomputed: The rematerialised values: never held whole, but computed in strips
            wherever they are needed. All other values are computed once.
        needed_flops: Floating-point operations of a run that keeps all values.
    """

    input_shape: Shape
    output_shape: Shape
    inputs: int
    outputs: int
    tasks: tuple[Task, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    state_bytes: int
    recomputed: tuple[Value, ...]
    needed_flops: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a run."""
        return sum(task.flops for task in self.tasks)

    @property
    def extra_work(self) -> float:
        """The recomputed work as a fraction of the needed work."""
        return self.flops / self.needed_flops - 1 if self.needed_flops else 0.0

    def parts_of(self, batch: int) -> int:
        """The parts in which a batch of so many images is run."""
        return -(-batch // self.input_shape[0])

    def live_bytes(self) -> list[int]:
        """The bytes of all live buffers at each task."""
        return live_bytes(self.buffers, len(self.tasks))
