"""Makes a schedule from a graph and the rules of a target.

This module decides everything except how a task is carried out: the order of tasks, the rows
and buffers that each reads and writes, and the strips in which values are rematerialised.
Strips begin only where the rules allow, so no decision changes a bit of the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from ..graph.ir import Attention, Conv2d, Graph, Identity, Modulate, Operation, Shuffle, Value
from .arena import Buffer, View, lay_out
from .rules import Rules
from .schedule import Kind, Schedule
from .sweep import SWEPT, Export, Import, Keep, Rows, Sweep
from .tasks import TaskList

REPLACED_BYTES = 2**28
"""The smallest value, in bytes, that a sweep overwrites with its results."""

LARGEST_UNIT = 64
"""The largest multiple of rows that strips with several targets may need."""


def make_schedule(
    graph: Graph,
    input_shape: Iterable[int],
    rules: Rules,
    recomputed: Iterable[Value] = (),
    *,
    sketch: bool = False,
    over: bool = True,
) -> Schedule:
    """Schedule a run.

    Args:
        graph: The optimised graph; its weights may be on the meta device.
        input_shape: `(N, input_channels, H, W)`.
        rules: The target's rules for this graph and shape.
        recomputed: Values to rematerialise, a subset of `droppable(graph)`, by default none;
            only for a batch of one.
        sketch: Whether to include only the first strip of each sweep, whose tasks then count
            the work of all strips. That is enough to know memory and work. By default
            all strips are included.
        over: Whether a sweep may overwrite the value that all its targets read (default).
            Without effect if values are rematerialised.

    Raises:
        GraphError: The operations do not fit the input.
        RBLNCompileError: The target can't run an operation.
    """
    shape = tuple(input_shape)
    chosen = frozenset(recomputed)
    return _Scheduler(graph, shape, rules, chosen, sketch, over and not chosen).schedule()


def droppable(graph: Graph) -> frozenset[Value]:
    """The values that can be rematerialised in strips."""
    readers = graph.consumers()
    readers[graph.output].append(Export("", graph.output))
    makers: list[Operation] = [Import(graph.input), *graph.operations]
    return frozenset(
        maker.output
        for maker in makers
        if isinstance(maker, (Import, *SWEPT))
        and all(
            isinstance(reader, (Export, *SWEPT))
            # What a modulation multiplies by and adds is small.
            and not (isinstance(reader, Modulate) and maker.output in reader.inputs[1:])
            for reader in readers[maker.output]
        )
        # No convolution sums the statistics of these.
        and not (
            not isinstance(maker, Conv2d)
            and any(
                r.group_norm is not None and r.inputs[0] == maker.output
                for r in readers[maker.output]
            )
        )
    )


class _Scheduler:
    def __init__(
        self,
        graph: Graph,
        input_shape: tuple[int, ...],
        rules: Rules,
        recomputed: frozenset[Value],
        sketch: bool,
        over: bool,
    ) -> None:
        self.graph = graph
        self.rules = rules
        self.recomputed = recomputed
        self.sketch = sketch
        self.over = over and input_shape[0] == 1
        self.tasks = TaskList(graph, input_shape, rules, sketch)
        self.shapes, self.heights = self.tasks.shapes, self.tasks.heights
        self.images, self.norms = self.tasks.images, self.tasks.norms
        self.sweeps = 0
        for operation in graph.operations:
            rules.require(operation)
        self.needed_until = self.last_needs()

    def last_needs(self) -> dict[Value, int]:
        """The index of the last operation that needs each value.

        A rematerialised value needs its inputs for as long as it is needed itself.
        """
        until = {self.graph.output: len(self.graph.operations)}
        for index, operation in reversed(list(enumerate(self.graph.operations))):
            again = operation.output in self.recomputed
            needed = max(index, until.get(operation.output, -1)) if again else index
            for value in operation.inputs:
                until[value] = max(until.get(value, -1), needed)
        return until

    def schedule(self) -> Schedule:
        graph = self.graph
        if graph.input not in self.recomputed:
            arrival = Import(graph.input)
            self.tasks.add(Kind.IMPORT, arrival, output=self.tasks.image(graph.input))
            self.tasks.prepare_norms(arrival, None)
        for index, operation in enumerate(graph.operations):
            if operation.output in self.images:
                continue  # made in one sweep with another
            if operation.output in self.recomputed:
                if operation.output in self.norms:
                    self.sweep([operation])
            elif self.recomputed.intersection(operation.inputs):
                self.sweep([operation, *self.partners(index)])
            elif readers := self.replacing(index, operation):
                self.sweep(readers, kept=readers[0].inputs[0])
            else:
                self.compute_whole(index, operation)
        departure = Export("", graph.output)
        if graph.output in self.recomputed:
            self.sweep([departure])
        else:
            self.tasks.add(Kind.EXPORT, departure, inputs=(self.images[graph.output],))
        arena = lay_out(self.tasks.buffers, self.tasks.times())
        return Schedule(
            self.shapes[graph.input],
            self.shapes[graph.output],
            tuple(self.tasks.tasks),
            tuple(self.tasks.buffers),
            arena,
            tuple(o.output for o in self.makers() if o.output in self.recomputed),
            sum(self.tasks.flops(operation) for operation in graph.operations),
        )

    def makers(self) -> Sequence[Operation]:
        return (Import(self.graph.input), *self.graph.operations)

    def replaceable(self, index: int, value: Value | None, *read: Value) -> View | None:
        """The image of a value, if the operation may overwrite it with its output."""
        if value is None or value in read or self.needed_until[value] != index:
            return None
        if not self.rules.overwrites:
            return None
        image = self.images[value]
        # Another value may be stored in the same buffer, as after an identity.
        others = (
            other.buffer
            for name, other in self.images.items()
            if name != value and self.needed_until.get(name, -1) >= index
        )
        return None if any(b is image.buffer for b in others) else image

    def compute_whole(self, index: int, operation: Operation) -> None:
        """Compute all rows of an operation at once."""
        value = operation.output
        if isinstance(operation, Identity):
            self.images[value] = self.images[operation.input]
            self.tasks.prepare_norms(operation, None)
            return
        inputs = tuple(self.images[each] for each in operation.inputs)
        sums = None
        # A value that is only added, or taken pixel by pixel, may be overwritten.
        added = getattr(operation, "residual", None)
        if isinstance(operation, Conv2d):
            over = self.replaceable(index, added, operation.input)
            if over is None and self.rules.runs_in_place(operation):
                over = self.replaceable(index, operation.input)
            target = self.tasks.image(value, over)
            sums = self.tasks.sums(operation)
            prepared = self.tasks.prepare(operation)
        else:
            prepared = {}
            if isinstance(operation, Attention):
                query, key, other, *rest = inputs
                prepared = self.tasks.prepare(operation, (key, other))
                inputs = (query, *rest)
            over = self.replaceable(index, added, *operation.inputs[:-1])
            if isinstance(operation, Modulate):
                over = self.replaceable(index, operation.input, *operation.inputs[1:])
            target = self.tasks.image(value, over)
        self.tasks.compute(operation, (0, self.heights[value]), 0, inputs, target, sums, prepared)
        self.tasks.prepare_norms(operation, sums)

    # Strips.

    def partners(self, index: int) -> list[Operation]:
        """Later operations that need the same recomputed values, and can join the sweep."""
        operation = self.graph.operations[index]
        members = {member.output for member in self.members([operation])}
        found: list[Operation] = []
        for other in self.graph.operations[index + 1 :]:
            shared = members.intersection(other.inputs)
            if (
                shared
                and isinstance(other, Conv2d)
                and other.output not in self.recomputed
                and other.output not in self.images
                and {m.output for m in self.members([other])} <= members
                and all(v in members or v in self.images for v in other.inputs)
                and self.heights[other.output] == self.heights[operation.output]
                and self.strip_unit([operation, *found, other]) <= LARGEST_UNIT
            ):
                found.append(other)
        return found

    def members(self, targets: Sequence[Operation]) -> list[Operation]:
        """The producers of the recomputed values that the targets need, in order."""
        makers = {maker.output: maker for maker in self.makers()}
        needed: set[Value] = set()
        waiting = [value for target in targets for value in target.inputs]
        while waiting:
            value = waiting.pop()
            if value in self.recomputed and value not in needed:
                needed.add(value)
                waiting.extend(makers[value].inputs)
        return [maker for maker in self.makers() if maker.output in needed]

    def strip_unit(self, targets: Iterable[Operation]) -> int:
        """The number of which the rows of a strip must be a multiple."""
        return math.lcm(*(self.rows_at_once(o, summed=o.output in self.norms) for o in targets))

    def rows_at_once(self, operation: Operation, *, summed: bool) -> int:
        """Rows of the output that a strip must not cut."""
        if isinstance(operation, Conv2d):
            return self.rules.rows_at_once(operation, summed=summed)
        if isinstance(operation, Modulate):  # the squares that one pixel modulates
            return self.heights[operation.input] // self.heights[operation.scale]
        if isinstance(operation, Shuffle):  # the rows of a cell
            return 2 if operation.way == "up" else 1
        return 1

    def strip_height(self, sweep: Sweep) -> int:
        """Rows of a strip."""
        wanted = self.rules.strip_rows(sweep)
        if any(isinstance(member, Keep) for member in sweep.members):
            # The whole value is in memory anyway, so a few more rows matter little, and fewer
            # strips cost less.
            wanted = max(wanted, sweep.height // 16)
        unit = self.strip_unit(sweep.targets)
        return unit * max(1, round(wanted / unit))

    def replacing(self, index: int, operation: Operation) -> list[Operation]:
        """All readers of an operation's input, if they can overwrite it in one sweep.

        An example are the first convolution of a residual block and its shortcut, if they
        halve the channels. Computed in one sweep over the value itself, they need no memory
        besides it except for a few rows.

        Returns:
            The readers, or an empty list if they can't.
        """
        if not self.over or not isinstance(operation, Conv2d):
            return []
        value = operation.input
        readers = [other for other in self.graph.operations[index:] if value in other.inputs]
        image = self.images[value]
        if (
            len(readers) < 2
            or value == self.graph.output
            or image.height * self.tasks.row_bytes(value) < REPLACED_BYTES
            or sum(self.tasks.row_bytes(o.output) for o in readers) > self.tasks.row_bytes(value)
            or self.strip_unit(readers) > LARGEST_UNIT
        ):
            return []
        for reader in readers:
            if (
                not isinstance(reader, Conv2d)
                or reader.residual is not None
                or self.shapes[reader.output][2:] != (image.height, image.width)
            ):
                return []
        if self.replaceable(self.graph.operations.index(readers[-1]), value) is None:
            return []
        return readers

    def sweep(self, targets: Sequence[Operation], kept: Value | None = None) -> None:
        """Compute targets strip by strip, with the recomputed values that they need.

        A target that is itself recomputed is computed only for its sums.

        Args:
            targets: The operations to compute.
            kept: The value that the targets overwrite, next to each other; by default none.
        """
        self.sweeps += 1
        self.tasks.sweep = self.sweeps
        convolutions = [o for o in self.graph.operations if isinstance(o, Conv2d)]
        sweep = Sweep(
            self.members(targets) if kept is None else [Keep(kept)],
            targets,
            self.heights,
            {o.output: o.kernel(self.graph.weights)[2] for o in convolutions},
            {o.output: self.rows_at_once(o, summed=False) for o in self.graph.operations},
            step=1,
        )
        sweep = dataclasses.replace(sweep, step=self.strip_height(sweep))
        windows = {
            value: self.tasks.rows_of(value, rows) for value, rows in sweep.window_heights().items()
        }
        sums: dict[Value, Buffer | None] = {}
        dropped: dict[Value, View] = {}
        taken = 0
        for target in targets:
            if isinstance(target, Export):
                continue
            if kept is not None:
                self.images[target.output] = self.tasks.beside(kept, target.output, taken)
                taken += self.images[target.output].buffer.bytes
            elif target.output in self.recomputed:
                most = min(sweep.step, sweep.height)
                dropped[target.output] = self.tasks.rows_of(target.output, most)
            else:
                self.tasks.image(target.output, self.overwritten(sweep))
            if isinstance(target, Conv2d):
                sums[target.output] = self.tasks.sums(target)
        prepared = {
            operation.output: self.tasks.prepare(operation)
            for operation in (*sweep.members, *targets)
            if isinstance(operation, Conv2d)
        }
        held: dict[Value, Rows] = {}

        def view_of(value: Value, rows: Rows) -> View:
            if value in windows:
                first = held[value][0]
                return windows[value].rows(rows[0] - first, rows[1] - first)
            return self.images[value].rows(*rows)

        for strip in itertools.islice(sweep.strips(), 1 if self.sketch else None):
            for operation in (*sweep.members, *targets):
                value, rows = operation.output, strip.computed[operation.output]
                if value in windows:
                    self.tasks.move_window(
                        operation, windows[value], held.get(value), strip.held[value]
                    )
                    held[value] = strip.held[value]
                if rows[0] == rows[1]:
                    continue
                match operation:
                    case Import():
                        self.tasks.add(
                            Kind.IMPORT, operation, rows=rows, output=view_of(value, rows)
                        )
                    case Keep():
                        source = self.images[value].rows(*rows)
                        output = view_of(value, rows)
                        self.tasks.add(
                            Kind.KEEP, operation, rows=rows, inputs=(source,), output=output
                        )
                    case Export(input=result):
                        view = view_of(result, rows)
                        self.tasks.add(Kind.EXPORT, operation, rows=rows, inputs=(view,))
                    case Conv2d() | Modulate() | Shuffle():
                        read = list(sweep.read(operation, rows))
                        if value in dropped:
                            output = dropped[value].rows(0, rows[1] - rows[0])
                        else:
                            output = view_of(value, rows)
                        self.tasks.compute(
                            operation,
                            rows,
                            read[0][1][0],
                            tuple(view_of(each, of) for each, of in read),
                            output,
                            sums.get(value),
                            prepared.get(value, {}),
                        )
        self.tasks.sweep = 0
        if kept is not None:
            self.images[kept].buffer.last = len(self.tasks.tasks) - 1
            for target in targets:
                self.images[target.output].buffer.first = len(self.tasks.tasks)
        for target in targets:
            if not isinstance(target, Export):
                self.tasks.prepare_norms(target, sums.get(target.output))

    def overwritten(self, sweep: Sweep) -> View | None:
        """The image of a value that the only target of a sweep may overwrite, if any."""
        (target, *others) = sweep.targets
        if others:
            return None
        index = self.graph.operations.index(target)
        _, _, height, width = self.shapes[target.output]
        read = dict.fromkeys(v for o in (*sweep.members, target) for v in o.inputs)
        for value in read:
            image = self.images.get(value)
            if (
                image is not None
                and (image.height, image.width) == (height, width)
                and self.tasks.row_bytes(target.output) <= self.tasks.row_bytes(value)
                and self.replaceable(index, value)
                and sweep.may_overwrite(value)
            ):
                return image
        return None
