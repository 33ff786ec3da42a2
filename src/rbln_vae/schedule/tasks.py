"""Collects the tasks of a schedule and the buffers that they use."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ..graph.ir import Conv2d, Norm, Operation, Value
from .arena import ALIGNMENT, Buffer, Place, View
from .problem import Problem
from .schedule import Kind, Task
from .sweep import Rows


class TaskList:
    """The tasks of a schedule in order, with the places and lifetimes of their buffers.

    Args:
        problem: What is scheduled.
        sketch: Whether a task in a strip counts the work of all strips.

    Attributes:
        images: The view of each value that is held whole.
        sweep: The number of the sweep that tasks are added to; 0 for none.
    """

    def __init__(self, problem: Problem, sketch: bool) -> None:
        self.problem = problem
        self.rules = problem.rules
        self.sketch = sketch
        self.shapes, self.heights, self.norms = problem.shapes, problem.heights, problem.norms
        self.tasks: list[Task] = []
        self.buffers: list[Buffer] = []
        self.images: dict[Value, View] = {}
        self.sweep = 0
        self._homes: dict[str, Buffer] = {}
        self._coefficients: dict[tuple[Value, Norm], Buffer] = {}

    def times(self) -> list[int]:
        """The time of each task, and the time after the last; all tasks of a sweep share one.

        So a sketch, which has fewer tasks in its sweeps, gets the same memory.
        """
        sweeps = [task.sweep for task in self.tasks]
        passes = [int(not (a and a == b)) for a, b in itertools.pairwise([0, *sweeps])]
        return [*itertools.accumulate(passes), len(sweeps)]

    # Memory.

    def buffer(self, name: str, size: int) -> Buffer:
        """A new buffer, whose life begins with the next task."""
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        result = Buffer(name, rounded, len(self.tasks), len(self.tasks))
        self.buffers.append(result)
        return result

    def rows_of(self, value: Value, rows: int) -> View:
        """A view of a new buffer for some rows of a value."""
        batch, channels, _, width = self.shapes[value]
        row = self.problem.row_bytes(value)
        buffer = self.buffer(value, batch * rows * row)
        buffer.holds[value] = buffer.first
        return View(buffer, channels, rows, width, row, rows * row)

    def image(self, value: Value, over: View | None = None) -> View:
        """A view for a value that the next task produces.

        Args:
            value: The value.
            over: The image to overwrite; by default a new buffer is made.
        """
        if over is None:
            self.images[value] = self.rows_of(value, self.heights[value])
        else:
            self.images[value] = over.of_channels(self.shapes[value][1])
            over.buffer.holds[value] = len(self.tasks)
        return self.images[value]

    def home(self, slot: str) -> View:
        """A view of where the state has the image of a slot."""
        value, offset = self.problem.homes[slot]
        _, channels, height, width = self.shapes[value]
        row = self.problem.row_bytes(value)
        size = -(-self.problem.bytes_of(value) // ALIGNMENT) * ALIGNMENT
        if slot not in self._homes:
            self._homes[slot] = Buffer(slot, size, 0, 0, offset=offset)
        return View(self._homes[slot], channels, height, width, row, height * row)

    def is_home(self, view: View) -> bool:
        """Whether a view is of the state."""
        return any(view.buffer is buffer for buffer in self._homes.values())

    def place_state(self, arena: int) -> None:
        """Put the state behind an arena of that size, which has been laid out."""
        for slot, buffer in self._homes.items():
            buffer.offset = arena + self.problem.homes[slot][1]

    def beside(self, values: Sequence[Value], place: Place) -> Buffer:
        """Give several values a common buffer at a place, row beside row; batches of one."""
        row = sum(self.problem.row_bytes(value) for value in values)
        _, _, height, width = self.shapes[values[0]]
        buffer = self.buffer(" and ".join(values), height * row)
        buffer.holds, buffer.over = dict.fromkeys(values, buffer.first), place
        offset = 0
        for value in values:
            channels = self.shapes[value][1]
            self.images[value] = View(buffer, channels, height, width, row, height * row, offset)
            offset += self.problem.row_bytes(value)
        return buffer

    # Tasks.

    def add(
        self,
        kind: Kind,
        operation: Operation,
        *,
        value: Value | None = None,
        rows: Rows | None = None,
        source_row: int = 0,
        inputs: tuple[View, ...] = (),
        output: View | None = None,
        buffers: Mapping[str, Buffer] | None = None,
        norm: Norm | None = None,
        tensor: int = 0,
        flops: int = 0,
    ) -> None:
        """Add a task, which extends the lives of its buffers; by default for all rows."""
        value = value or operation.output or operation.inputs[0]
        views = (*inputs, *([output] if output is not None else []))
        for buffer in (*(view.buffer for view in views), *(buffers or {}).values()):
            buffer.last = len(self.tasks)
        self.tasks.append(
            Task(
                kind,
                value,
                operation,
                rows or (0, self.heights[value]),
                source_row,
                inputs,
                output,
                buffers or {},
                norm,
                tensor,
                flops,
                self.sweep,
            )
        )

    def compute(
        self,
        operation: Operation,
        rows: Rows,
        source_row: int,
        inputs: tuple[View, ...],
        output: View,
        sums: Buffer | None,
        prepared: Mapping[str, Buffer],
    ) -> None:
        """Compute some rows of an output.

        Args:
            operation: The operation.
            rows: The rows to compute; they begin where the rules allow.
            source_row: The row of the image at which the view of the first input begins.
            inputs: The rows to read.
            output: The rows to write.
            sums: The sums of the whole output, if norms need them.
            prepared: The result of `prepare`.
        """
        flops = self.problem.flops[operation.output]
        if not self.sketch:
            flops = flops * (rows[1] - rows[0]) // self.heights[operation.output]
        buffers = dict(prepared)
        if sums is not None:
            buffers["sums"] = sums
        norm = operation.group_norm
        if norm is not None:
            buffers["coefficients"] = self._coefficients[operation.inputs[0], norm]
        self.add(
            Kind.COMPUTE,
            operation,
            rows=rows,
            source_row=source_row,
            inputs=inputs,
            output=output,
            buffers=buffers,
            flops=flops,
        )

    def sums(self, operation: Conv2d) -> Buffer | None:
        """A buffer for the sums that the norms of an output need, or `None` without norms."""
        if operation.output not in self.norms:
            return None
        return self.buffer(f"{operation.output} statistics", self.rules.sums_bytes(operation))

    def prepare(self, operation: Operation, inputs: tuple[View, ...] = ()) -> Mapping[str, Buffer]:
        """Prepare what an operation needs before it runs, from its weights or its inputs."""
        prepared = {
            name: self.buffer(f"{operation.output} {name}", size)
            for name, size in self.rules.prepared(operation).items()
        }
        if prepared:
            self.add(Kind.PREPARE, operation, inputs=inputs, buffers=prepared)
        return prepared

    def prepare_norms(self, operation: Operation, sums: Buffer | None) -> None:
        """Prepare every norm that reads a value, right after the value was produced."""
        value = operation.output
        norms = self.norms.get(value, [])
        if norms and sums is None:
            size = self.rules.statistics_bytes(self.shapes[value])
            sums = self.buffer(f"{value} statistics", size)
            self.add(
                Kind.STATISTICS, operation, inputs=(self.images[value],), buffers={"sums": sums}
            )
        for norm in norms:
            assert sums is not None
            size = self.rules.coefficients_bytes(self.shapes[value])
            buffer = self.buffer(f"{value} coefficients", size)
            self._coefficients[value, norm] = buffer
            buffers = {"sums": sums, "coefficients": buffer}
            self.add(Kind.NORM, operation, buffers=buffers, norm=norm)

    def move_window(
        self, operation: Operation, window: View, before: Rows | None, after: Rows
    ) -> None:
        """Move the rows that a window still needs to its beginning."""
        if before is None or before[0] == after[0] or before[1] == after[0]:
            return
        kept = (after[0] - before[0], before[1] - before[0])
        self.add(Kind.MOVE, operation, rows=kept, output=window)
