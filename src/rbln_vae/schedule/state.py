"""The places of a video's state, and how the frames that a run leaves come there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..graph.ir import Conv2d, Graph, Identity, Operation, Shape, Slot, Unstack, Value
from .arena import View
from .problem import Problem
from .schedule import Kind
from .sweep import Rows, Sweep
from .tasks import TaskList


class State:
    """What lies in the place of each slot while a run is scheduled.

    A place is for the value that the run leaves in it. Until that is there, it holds another
    frame that the same layer still needs, which else would take memory of the arena.

    Args:
        problem: What is scheduled.
        tasks: Gets the tasks that copy frames.
        needed_until: The index of the last operation that needs each value.
    """

    def __init__(
        self, problem: Problem, tasks: TaskList, needed_until: Mapping[Value, int]
    ) -> None:
        self.problem = problem
        self.tasks = tasks
        self.images = tasks.images
        self.needed_until = needed_until
        self.slots = problem.graph.state
        self._series = _series(problem.graph, problem.shapes)
        self._held: dict[str, Value | None] = {slot.name: slot.read for slot in self.slots}
        """What lies in the place of each slot; `None` if that is free."""
        for slot in self.slots:
            if slot.read is not None:
                self.images[slot.read] = tasks.home(slot.name)

    def take(self, value: Value) -> View | None:
        """The place for a value that is about to be produced, if it is free."""
        for slot in self.slots:
            if slot.left == value and not slot.zeros and self._held[slot.name] is None:
                self._held[slot.name] = value
                return self.tasks.home(slot.name)
        return None

    def fill(self, index: int) -> bool:
        """Fill the places that are free after an operation.

        Returns:
            Whether anything changed.
        """
        changed = False
        for slot in self.slots:
            held, left = self._held[slot.name], None if slot.zeros else slot.left
            if held is not None and held != left and self.needed_until.get(held, -1) <= index:
                held = self._held[slot.name] = None
                changed = True
            if held is None and left is not None:
                value = left if left in self.images else self._waiting(left, index)
                if value is not None:
                    self._move(value, slot.name)
                    changed = True
        return changed and (self.fill(index) or True)

    def fill_all(self) -> None:
        """Bring everything that the run leaves to its place."""
        end = len(self.problem.graph.operations)
        while True:
            self.fill(end)
            wrong = [
                slot for slot in self.slots if not slot.zeros and self._held[slot.name] != slot.left
            ]
            if not wrong:
                return
            # Values that are in each other's places: one of them makes room.
            value = self._held[wrong[0].name]
            assert value is not None
            before = self.images[value]
            self._held[wrong[0].name] = None
            after = self.tasks.image(value)
            self.tasks.add(Kind.COPY, Identity(value, value), inputs=(before,), output=after)

    def _waiting(self, left: Value, index: int) -> Value | None:
        """A frame that is needed after an operation and lies in the arena.

        It belongs to the same layer as a value that will be left.
        """
        for value, image in self.images.items():
            if (
                self._series.get(value) == self._series.get(left, left)
                and self.needed_until.get(value, -1) > index
                and not self.tasks.is_home(image)
            ):
                return value
        return None

    def _move(self, value: Value, slot: str) -> None:
        """Copy a value to the place of a slot, where it is read from then on."""
        before = self.images[value]
        for other in self.slots:
            if self._held[other.name] == value and (other.zeros or other.left != value):
                self._held[other.name] = None
        self._held[slot] = value
        self.images[value] = after = self.tasks.home(slot)
        self.tasks.add(Kind.COPY, Identity(value, value), inputs=(before,), output=after)

    def hold(self, slot: Slot) -> None:
        """Say that what the run leaves in a slot is in its place."""
        self._held[slot.name] = slot.left
        self.images[slot.left] = self.tasks.home(slot.name)


class Filling:
    """Brings frames of stacks that are never whole to their places, row by row.

    A row comes there once the frame of the run before is no longer read in that row.
    """

    def __init__(self, state: State, sweep: Sweep) -> None:
        self.state = state
        self.sweep = sweep
        problem, members = state.problem, {member.output for member in sweep.members}
        self._after: dict[Value, list[tuple[Slot, Unstack]]] = {}
        """The slots that are filled after each operation: the one that reads what was there."""
        self._rows: dict[Slot, int] = {}
        """How many rows each slot has."""
        for slot in state.slots:
            if slot.left in problem.positions:
                taken = problem.graph.operations[problem.positions[slot.left]]
                if isinstance(taken, Unstack) and taken.input in members:
                    assert slot.read is not None  # as `Problem.passing` requires
                    (reader,) = problem.readers[slot.read]
                    self._after.setdefault(reader.output, []).append((slot, taken))
                    self._rows[slot] = 0

    def after(self, reader: Operation, end: int, view_of: Callable[[Value, Rows], View]) -> None:
        """Copy the rows that an operation no longer needs in their places.

        Args:
            reader: The operation; it has made its rows before `end`.
            end: Its next row.
            view_of: Returns rows of a value that the sweep holds.
        """
        problem, tasks = self.state.problem, self.state.tasks
        for slot, taken in self._after.get(reader.output, ()):
            begin, until = self._rows[slot], problem.heights[slot.left]
            if end < until:
                read = dict(self.sweep.read(reader, (end, end + 1)))
                assert slot.read is not None
                until = read[slot.read][0]
            if until > begin:
                batch = problem.shapes[slot.left][0]
                stack = view_of(taken.input, (begin, until))
                tasks.add(
                    Kind.COPY,
                    Identity(slot.left, slot.left),
                    rows=(begin, until),
                    inputs=(stack.beginning_at(taken.index * batch),),
                    output=tasks.home(slot.name).rows(begin, until),
                )
                self._rows[slot] = until

    def end(self) -> None:
        """Say that all frames are in their places."""
        for slot in self._rows:
            self.state.hold(slot)


def _series(graph: Graph, shapes: Mapping[Value, Shape]) -> dict[Value, Value]:
    """For each frame that a convolution over frames reads, one that stands for all of its layer."""
    found: dict[Value, Value] = {}
    single: dict[Value, list[Value]] = {}
    for operation in graph.operations:
        if isinstance(operation, Unstack):
            single.setdefault(operation.input, []).append(operation.output)
        if isinstance(operation, Conv2d) and operation.earlier:
            before, last = operation.earlier, operation.input
            now = [last] if shapes[last] == shapes[before[0]] else single.get(last, [])
            frames = (*before, *now)
            known = {found.get(frame, frame) for frame in frames}
            one = found.get(frames[0], frames[0])
            found |= dict.fromkeys(frames, one)
            found |= {frame: one for frame, other in found.items() if other in known}
    return found
