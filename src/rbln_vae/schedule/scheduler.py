"""Makes a schedule from a graph and the rules of a target.

This module decides everything except how a task is carried out: the order of tasks, the rows
and buffers that each reads and writes, and the strips in which values are rematerialised.
Strips begin only where the rules allow, so no decision changes a bit of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ..graph.ir import (
    Attention,
    Conv2d,
    Graph,
    Identity,
    Modulate,
    Operation,
    Shuffle,
    Stack,
    Unstack,
    Value,
)
from .arena import ALIGNMENT, Buffer, Place, View, lay_out, live_bytes
from .problem import Problem
from .schedule import Kind, Schedule
from .state import Filling, State
from .sweep import SWEPT, Export, Import, Rows, Sweep
from .tasks import TaskList

REPLACED_BYTES = 2**28
"""The size of an image, in bytes, from which on it takes the memory of its only input.

That takes a sweep, which costs more than a step for smaller images.
"""

LARGEST_UNIT = 64
"""The largest multiple of rows that strips with several targets may need."""


def make_schedule(
    problem: Problem, recomputed: Iterable[Value] = (), *, sketch: bool = False
) -> Schedule:
    """Schedule a run.

    Args:
        problem: What to schedule.
        recomputed: Values to rematerialise, a subset of `droppable(graph)`, by default none.
        sketch: Whether to include only the first strip of each sweep, whose tasks then count
            the work of all strips. That is enough to know memory and work. By default
            all strips are included.
    """
    return _Scheduler(problem, frozenset(recomputed), sketch).schedule()


class Sketch:
    """The work and the memory of a schedule, as a search asks for them, without its tasks.

    Memory is laid out when that is asked for: many sketches are asked for their work alone.

    Args:
        problem: What to schedule.
        recomputed: As of `make_schedule`.
    """

    def __init__(self, problem: Problem, recomputed: Iterable[Value]) -> None:
        tasks = _Scheduler(problem, frozenset(recomputed), True).add_tasks()
        self.flops = sum(task.flops for task in tasks.tasks)
        self.buffers = tasks.buffers
        self._values = [task.value for task in tasks.tasks]
        self._times = tasks.times()

    @functools.cached_property
    def arena_bytes(self) -> int:
        """The size of the arena."""
        return lay_out(self.buffers, self._times)

    @functools.cached_property
    def live_bytes(self) -> list[int]:
        """The bytes of all live buffers at each task."""
        return live_bytes(self.buffers, len(self._values))

    @functools.cached_property
    def live(self) -> dict[Value, int]:
        """The most bytes in use at the tasks of each value."""
        most: dict[Value, int] = {}
        for value, live in zip(self._values, self.live_bytes, strict=True):
            if live > most.get(value, 0):
                most[value] = live
        return most


def droppable(graph: Graph) -> frozenset[Value]:
    """The values that can be rematerialised in strips."""
    readers = graph.consumers()
    for output in graph.outputs:
        readers[output].append(Export("", output))
    makers: list[Operation] = [*map(Import, graph.inputs), *graph.operations]
    carried = graph.carried
    return frozenset(
        maker.output
        for maker in makers
        if isinstance(maker, (Import, *SWEPT))
        and maker.output not in carried
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
    def __init__(self, problem: Problem, recomputed: frozenset[Value], sketch: bool) -> None:
        self.problem = problem
        self.graph = problem.graph
        self.rules = problem.rules
        self.shapes, self.heights = problem.shapes, problem.heights
        self.norms = problem.norms
        self.recomputed = recomputed.union(problem.passing)
        self.sketch = sketch
        self.tasks = TaskList(problem, sketch)
        self.images = self.tasks.images
        self.sweeps = 0
        self.needed_until = self.last_needs()
        self.carried = self.graph.carried
        self.stacks: dict[Value, Value] = {}
        """The stack of each frame that lies in one, or of each part of it."""
        for operation in self.graph.operations:
            if isinstance(operation, Unstack):
                source = operation.input
                self.stacks[operation.output] = self.stacks.get(source, source)
        self.state = State(problem, self.tasks, self.needed_until)

    def last_needs(self) -> dict[Value, int]:
        """The index of the last operation that needs each value.

        A rematerialised value needs its inputs for as long as it is needed itself. An output is
        exported as soon as it is there, but for an input, which is exported at the end; and what is
        left for the next run is needed beyond the end.
        """
        end = len(self.graph.operations)
        until = {value: self.problem.positions.get(value, end) for value in self.graph.outputs}
        kept = (slot.left for slot in self.graph.state if not slot.zeros)
        until |= dict.fromkeys(kept, end + 1)
        for index, operation in reversed(list(enumerate(self.graph.operations))):
            again = operation.output in self.recomputed
            needed = max(index, until.get(operation.output, -1)) if again else index
            for value in operation.inputs:
                until[value] = max(until.get(value, -1), needed)
        return until

    def add_tasks(self) -> TaskList:
        """The tasks of all operations."""
        graph = self.graph
        for index, operation in enumerate(graph.operations):
            self.import_images(operation.inputs)
            if operation.output in self.images or (
                isinstance(operation, Unstack) and operation.input in self.problem.passing
            ):
                pass  # made in one sweep with another
            elif operation.output in self.recomputed:
                if operation.output in self.norms:
                    self.sweep([operation])
            elif self.recomputed.intersection(operation.inputs):
                self.sweep([operation, *self.partners(index)])
            elif readers := self.replacing(index, operation):
                self.sweep(readers)
            else:
                self.compute_whole(index, operation)
            self.export_image(operation.output)
            self.state.fill(index)
        self.import_images((*graph.outputs, *(slot.left for slot in graph.state)))
        for value in graph.inputs:
            self.export_image(value)
        self.state.fill_all()
        return self.tasks

    def schedule(self) -> Schedule:
        """The tasks, and the places of all buffers."""
        graph, tasks = self.graph, self.add_tasks()
        arena = lay_out(tasks.buffers, tasks.times())
        tasks.place_state(arena)
        return Schedule(
            self.shapes[graph.inputs[0]],
            self.shapes[graph.outputs[0]],
            len(graph.inputs),
            len(graph.outputs),
            tuple(tasks.tasks),
            tuple(tasks.buffers),
            arena,
            self.problem.state_bytes,
            tuple(o.output for o in self.problem.makers if o.output in self.recomputed),
            sum(self.problem.flops.values()),
        )

    def import_images(self, values: Iterable[Value]) -> None:
        """Import the inputs among some values that are needed whole, unless they are there."""
        for value in values:
            if (
                value in self.graph.inputs
                and value not in self.images
                and value not in self.recomputed
            ):
                arrival, number = Import(value), self.graph.inputs.index(value)
                image = self.tasks.image(value, self.state.take(value))
                self.tasks.add(Kind.IMPORT, arrival, output=image, tensor=number)
                self.tasks.prepare_norms(arrival, None)

    def export_image(self, value: Value) -> None:
        """Export a value if it is an output."""
        if value not in self.graph.outputs:
            return
        departure = Export("", value)
        if value in self.recomputed:
            self.sweep([departure])
        else:
            number = self.graph.outputs.index(value)
            self.tasks.add(Kind.EXPORT, departure, inputs=(self.images[value],), tensor=number)

    # Places of values.

    def replaceable(self, index: int, value: Value | None, *read: Value) -> View | None:
        """The image of a value, if the operation may overwrite it with its output."""
        if value is None or value in read or self.needed_until[value] != index:
            return None
        return self.images[value] if self.overwritable(value, self.sharing(index, value)) else None

    def overwritable(self, value: Value, needed: Iterable[Value]) -> bool:
        """Whether a value's image may be overwritten, as far as what lies in it allows."""
        return (
            self.rules.overwrites
            and not self.tasks.is_home(self.images[value])
            and not self.overlapped(value, needed)
        )

    def overlapped(self, value: Value, needed: Iterable[Value]) -> bool:
        """Whether images that are still needed have memory of a value, in whose buffer they are.

        That of an identity is in the same place, that of a frame in its stack.
        """
        offset = self.images[value].offset
        return value in self.stacks or any(
            self.images[other].offset == offset or self.stacks.get(other) == value
            for other in needed
        )

    def needed(self, index: int) -> dict[Buffer, list[Value]]:
        """The images that an operation or a later one needs, by their buffers."""
        found: dict[Buffer, list[Value]] = {}
        for value, view in self.images.items():
            if self.needed_until.get(value, -1) >= index:
                found.setdefault(view.buffer, []).append(value)
        return found

    def sharing(self, index: int, value: Value) -> list[Value]:
        """The images in the buffer of a value that an operation or a later one needs."""
        needed = self.needed(index).get(self.images[value].buffer, [])
        return [other for other in needed if other != value]

    def vacant(self, index: int, value: Value) -> View | None:
        """The place of a value that is no longer needed, beside another one that is."""
        needed = self.needed(index)
        for other, view in self.images.items():
            if (
                view.buffer in needed
                and self.needed_until.get(other, -1) < index
                and self.shapes[other][0] == self.shapes[value][0]
                and self.shapes[other][2:] == self.shapes[value][2:]
                and self.problem.row_bytes(other) >= self.problem.row_bytes(value)
                and not self.overlapped(other, needed[view.buffer])
            ):
                return view
        return None

    def compute_whole(self, index: int, operation: Operation) -> None:
        """Compute all rows of an operation at once."""
        value = operation.output
        if isinstance(operation, Identity) and not self.tasks.is_home(self.images[operation.input]):
            self.images[value] = self.images[operation.input]
            self.tasks.prepare_norms(operation, None)
            return
        if isinstance(operation, Unstack):
            first = operation.index * self.shapes[value][0]
            self.images[value] = self.images[operation.input].beginning_at(first)
            return
        if isinstance(operation, Stack):
            self.stack(index, operation)
            return
        inputs = tuple(self.images[each] for each in operation.inputs)
        sums = None
        # A value that is only added, or taken pixel by pixel, may be overwritten.
        added = getattr(operation, "residual", None)
        if isinstance(operation, Conv2d):
            over = self.replaceable(index, added, operation.input, *operation.earlier)
            if over is None and self.rules.runs_in_place(operation):
                over = self.replaceable(index, operation.input)
            over = self.state.take(value) or over or self.vacant(index, value)
            target = self.tasks.image(value, over)
            sums = self.tasks.sums(operation)
            prepared = self.tasks.prepare(operation)
        else:
            prepared = {}
            if isinstance(operation, Attention):
                query, key, other, *rest = inputs
                prepared = self.tasks.prepare(operation, (key, other))
                if prepared:  # from key and value, which nothing else reads
                    inputs = (query, *rest)
            over = self.replaceable(index, added, *operation.inputs[:-1])
            if isinstance(operation, Modulate):
                over = self.replaceable(index, operation.input, *operation.inputs[1:])
            over = self.state.take(value) or over or self.vacant(index, value)
            target = self.tasks.image(value, over)
        self.tasks.compute(operation, (0, self.heights[value]), 0, inputs, target, sums, prepared)
        self.tasks.prepare_norms(operation, sums)

    def stack(self, index: int, operation: Stack) -> None:
        """Copy frames to their places in a stack."""
        value = operation.output
        whole = self.tasks.image(value, self.vacant(index, value))
        for number, frame in enumerate(operation.frames):
            place = whole.beginning_at(number * self.shapes[frame][0])
            copying = Identity(frame, frame)
            self.tasks.add(Kind.COPY, copying, inputs=(self.images[frame],), output=place)

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
                and self.problem.strip_unit([operation, *found, other]) <= LARGEST_UNIT
            ):
                found.append(other)
        return found

    def members(self, targets: Sequence[Operation]) -> list[Operation]:
        """The producers of the recomputed values that the targets need, in order."""
        needed: set[Value] = set()
        waiting = [value for target in targets for value in target.inputs]
        while waiting:
            value = waiting.pop()
            if value in self.recomputed and value not in needed:
                needed.add(value)
                if value not in self.graph.inputs:
                    waiting.extend(self.graph.operations[self.problem.positions[value]].inputs)
        return [maker for maker in self.problem.makers if maker.output in needed]

    def replacing(self, index: int, operation: Operation) -> list[Operation]:
        """All readers of an operation's input, if they take its memory in one sweep.

        Examples are the first convolution of a residual block and its shortcut, if they halve
        the channels, and a convolution that doubles the image. Operations that shrink an image
        are left alone: those before them need more memory. So are readers whose results aren't
        needed at once: made together, they would only lie there.

        Returns:
            The readers, or an empty list.
        """
        if not isinstance(operation, Conv2d) or operation.input in self.carried:
            return []
        value = operation.input
        if self.shapes[value][0] > 1:
            return []
        readers = [other for other in self.graph.operations[index:] if value in other.inputs]
        shape, made = self.shapes[value], self.shapes[operation.output]
        before = shape[2] * self.problem.row_bytes(value)
        after = made[2] * sum(self.problem.row_bytes(o.output) for o in readers)
        last = self.problem.positions[readers[-1].output]
        if (
            max(before, after) < REPLACED_BYTES
            or after < before
            or any(
                not isinstance(reader, Conv2d)
                or reader.residual is not None
                or reader.output in self.recomputed
                or self.shapes[reader.output][2:] != made[2:]
                or self.needed_until.get(reader.output, -1) < last
                for reader in readers
            )
            or self.problem.strip_unit(readers) > LARGEST_UNIT
            or not self.consumable(readers, value)
        ):
            return []
        return readers

    def consumable(self, targets: Sequence[Operation], value: Value) -> bool:
        """Whether the memory of a value can be taken by the targets of the next sweep."""
        positions = [self.problem.positions[target.output] for target in targets]
        return (
            self.needed_until[value] <= positions[-1]
            and self.overwritable(value, ())
            and not self.sharing(positions[0], value)
            and self.awaiting(positions[0], value) <= {target.output for target in targets}
        )

    def awaiting(self, index: int, value: Value) -> set[Value]:
        """The values that are still to be made from one, by operations from an index on.

        Those that are rematerialised stand for themselves, and for all that is made from them.
        """
        found: set[Value] = set()
        waiting = [value]
        while waiting:
            for reader in self.problem.readers[waiting.pop()]:
                if self.problem.positions[reader.output] >= index:
                    found.add(reader.output)
                if reader.output in self.recomputed:
                    waiting.append(reader.output)
        return found

    def consumed(self, sweep: Sweep) -> Value | None:
        """The largest value that the targets of a sweep may be written over, if any."""
        read = dict.fromkeys(v for o in (*sweep.members, *sweep.targets) for v in o.inputs)
        found = [v for v in read if v in self.images and self.consumable(sweep.targets, v)]
        return max(
            found, key=lambda v: self.images[v].height * self.images[v].row_bytes, default=None
        )

    def place(self, sweep: Sweep) -> tuple[Buffer, Buffer, Buffer] | None:
        """Find places for the targets of a sweep that are not rematerialised.

        Returns:
            If the targets are written over a value that the sweep reads: the buffers of the
            value, of both during the sweep, and of the targets.
        """
        (target, *others) = sweep.targets
        values = [each.output for each in sweep.targets]
        if not others:
            index = self.problem.positions[target.output]
            over = self.state.take(target.output)
            over = over or self.overwritten(sweep) or self.vacant(index, target.output)
            if over is not None:
                self.tasks.image(target.output, over)
                return None
        value = self.consumed(sweep) if self.shapes[values[0]][0] == 1 else None
        if value is None:
            for each in values:
                self.tasks.image(each)
            return None
        view = self.images[value]
        row = sum(map(self.problem.row_bytes, values))
        begin = view.offset - sweep.head_start(value, row, view.row_bytes)
        begin = begin // ALIGNMENT * ALIGNMENT
        end = max(begin + sweep.height * row, view.offset + view.height * view.row_bytes)
        both = self.tasks.buffer(f"{value} and {' and '.join(values)}", end - begin)
        both.holds = dict.fromkeys([value, *values], both.first)
        both.over = Place(view.buffer, begin)
        return view.buffer, both, self.tasks.beside(values, both.over)

    def sweep(self, targets: Sequence[Operation]) -> None:
        """Compute targets strip by strip, with the recomputed values that they need.

        A target that is itself recomputed is computed only for its sums.
        """
        self.sweeps += 1
        self.tasks.sweep = self.sweeps
        start = len(self.tasks.tasks)
        sweep = self.problem.sweep(self.members(targets), targets)
        windows = {
            value: self.tasks.rows_of(value, rows) for value, rows in sweep.window_heights.items()
        }
        dropped: dict[Value, View] = {}
        replaced: tuple[Buffer, Buffer, Buffer] | None = None
        if targets[0].output in self.recomputed:
            (value,) = (target.output for target in targets)
            dropped[value] = self.tasks.rows_of(value, min(sweep.step, sweep.height))
        elif not isinstance(targets[0], Export):
            replaced = self.place(sweep)
        sums = {o.output: self.tasks.sums(o) for o in targets if isinstance(o, Conv2d)}
        prepared = {
            operation.output: self.tasks.prepare(operation)
            for operation in (*sweep.members, *targets)
            if isinstance(operation, Conv2d)
        }
        held: dict[Value, Rows] = {}
        filling = Filling(self.state, sweep)

        def view_of(value: Value, rows: Rows) -> View:
            if value in windows:
                first = held[value][0]
                return windows[value].rows(rows[0] - first, rows[1] - first)
            return self.images[value].rows(*rows)

        for strip in sweep.first_strips[:1] if self.sketch else sweep.strips():
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
                        number = self.graph.inputs.index(value)
                        view = view_of(value, rows)
                        self.tasks.add(
                            Kind.IMPORT, operation, rows=rows, output=view, tensor=number
                        )
                    case Export(input=result):
                        number = self.graph.outputs.index(result)
                        view = view_of(result, rows)
                        self.tasks.add(
                            Kind.EXPORT, operation, rows=rows, inputs=(view,), tensor=number
                        )
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
                        filling.after(operation, rows[1], view_of)
        self.tasks.sweep = 0
        filling.end()
        if replaced is not None:
            before, both, after = replaced
            before.last = start - 1
            both.first, both.last = start, len(self.tasks.tasks) - 1
            after.first = after.last = len(self.tasks.tasks)
        for target in targets:
            if not isinstance(target, Export):
                self.tasks.prepare_norms(target, sums.get(target.output))

    def overwritten(self, sweep: Sweep) -> View | None:
        """The image of a value that the only target of a sweep may overwrite, if any."""
        (target, *others) = sweep.targets
        if others:
            return None
        index = self.problem.positions[target.output]
        _, _, height, width = self.shapes[target.output]
        read = dict.fromkeys(v for o in (*sweep.members, target) for v in o.inputs)
        for value in read:
            image = self.images.get(value)
            if (
                image is not None
                and (image.height, image.width) == (height, width)
                and self.problem.row_bytes(target.output) <= self.problem.row_bytes(value)
                and self.replaceable(index, value)
                and sweep.may_overwrite(value)
            ):
                return image
        return None
