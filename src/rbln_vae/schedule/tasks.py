"""The tasks of a schedule as they are made, and the memory that they take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from ..graph.ir import Conv2d, Graph, Norm, Operation, Shape, Value
from .arena import ALIGNMENT, Buffer, Place, View
from .rules import Rules
from .schedule import Kind, Task
from .sweep import Rows


class TaskList:
    """Tasks in order, where their values lie, and from when to when.

    Args:
        graph: Whose tasks they are.
        input_shape: `(N, C, H, W)`.
        rules: Of the target.
        sketch: Whether a task in a strip stands for the work of all strips.

    Attributes:
        images: Where each value lies that is held whole.
        norms: For each value, the norms that read it.
        sweep: The number of the sweep that tasks are added to; 0 is none.
    """

    def __init__(self, graph: Graph, input_shape: Shape, rules: Rules, sketch: bool) -> None:
        self.graph = graph
        self.rules = rules
        self.sketch = sketch
        self.shapes = graph.infer_shapes(input_shape)
        self.heights = {value: shape[2] for value, shape in self.shapes.items()}
        self.batch = input_shape[0]
        self.tasks: list[Task] = []
        self.buffers: list[Buffer] = []
        self.images: dict[Value, View] = {}
        self.norms: dict[Value, list[Norm]] = {}
        self.sweep = 0
        self._coefficients: dict[tuple[Value, Norm], Buffer] = {}
        for operation in graph.operations:
            norm = getattr(operation, "norm", None)
            if norm is not None:
                norms = self.norms.setdefault(operation.inputs[0], [])
                if norm not in norms:
                    norms.append(norm)

    def times(self) -> list[int]:
        """When each task happens, and what follows the last; a sweep is one moment.

        A sketch has fewer tasks in its sweeps, and is to have the same memory.
        """
        sweeps = [task.sweep for task in self.tasks]
        passes = [int(not (a and a == b)) for a, b in itertools.pairwise([0, *sweeps])]
        return [*itertools.accumulate(passes), len(sweeps)]

    def flops(self, operation: Operation) -> int:
        """Of an operation on the whole image."""
        return operation.flops(self.shapes, self.graph.weights)

    # Memory.

    def buffer(self, name: str, size: int) -> Buffer:
        """A buffer that the next task is the first to use."""
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        result = Buffer(name, rounded, len(self.tasks), len(self.tasks))
        self.buffers.append(result)
        return result

    def row_bytes(self, value: Value) -> int:
        """Bytes of a row of a value."""
        _, channels, _, width = self.shapes[value]
        return self.rules.row_bytes(channels, width)

    def rows_of(self, value: Value, rows: int) -> View:
        """A buffer of its own that holds so many rows of a value."""
        _, channels, _, width = self.shapes[value]
        buffer = self.buffer(value, self.batch * rows * self.row_bytes(value))
        return View(buffer, channels, rows, width, (channels, rows))

    def image(self, value: Value, over: View | None = None) -> View:
        """An image for a value that the next task makes, in a new buffer or an old one."""
        if over is None:
            self.images[value] = self.rows_of(value, self.heights[value])
        else:
            self.images[value] = dataclasses.replace(over, channels=self.shapes[value][1])
        return self.images[value]

    def beside(self, value: Value, output: Value, offset: int) -> View:
        """An image that lies from an offset of another one on, and follows it with this sweep."""
        made = self.rows_of(output, self.heights[value])
        made.buffer.bytes = self.heights[value] * self.row_bytes(output)
        made.buffer.over = Place(self.images[value].buffer, offset)
        return made

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
        flops: int = 0,
    ) -> None:
        """Add a task, which keeps what it reads and writes alive; by default of all rows."""
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
            operation: What to compute.
            rows: Which; they begin where the rules allow.
            source_row: The first row of the first input that is given.
            inputs: The rows that they read.
            output: For the rows themselves.
            sums: Of the whole output.
            prepared: What `prepare` gave.
        """
        flops = self.flops(operation)
        if not self.sketch:
            flops = flops * (rows[1] - rows[0]) // self.heights[operation.output]
        buffers = dict(prepared)
        if sums is not None:
            buffers["sums"] = sums
        norm = getattr(operation, "norm", None)
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
        """Where a convolution sums what the norms of its output need, if there are any."""
        if operation.output not in self.norms:
            return None
        return self.buffer(f"{operation.output} statistics", self.rules.sums_bytes(operation))

    def prepare(self, operation: Operation, inputs: tuple[View, ...] = ()) -> Mapping[str, Buffer]:
        """Make what an operation needs besides before it runs: of its weights, or of inputs."""
        prepared = {
            name: self.buffer(f"{operation.output} {name}", size)
            for name, size in self.rules.prepared(operation).items()
        }
        if prepared:
            self.add(Kind.PREPARE, operation, inputs=inputs, buffers=prepared)
        return prepared

    def prepare_norms(self, operation: Operation, sums: Buffer | None) -> None:
        """Prepare every norm that reads a value, right after it was made."""
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
            size = self.rules.coefficients_bytes(self.shapes[value][1])
            buffer = self.buffer(f"{value} coefficients", size)
            self._coefficients[value, norm] = buffer
            buffers = {"sums": sums, "coefficients": buffer}
            self.add(Kind.NORM, operation, buffers=buffers, norm=norm)

    def move_window(
        self, operation: Operation, window: View, before: Rows | None, after: Rows
    ) -> None:
        """Move the rows that a window keeps to its beginning."""
        if before is None or before[0] == after[0] or before[1] == after[0]:
            return
        kept = (after[0] - before[0], before[1] - before[0])
        self.add(Kind.MOVE, operation, rows=kept, output=window)
