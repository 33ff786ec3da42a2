"""Trades time for memory: chooses the values that a schedule rematerialises.

Every choice gives the same bits, but needs different memory and work. The search is greedy:
while a schedule needs too much memory, it rematerialises the value that costs the least work
for the memory it saves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from ..graph.ir import Graph, Operation, Shape, Shuffle, Value
from .arena import live_bytes
from .problem import Problem
from .rules import Rules
from .schedule import Schedule
from .scheduler import Sketch, droppable, make_schedule

FINER = 0.97
"""The most memory of the next tradeoff, as a fraction of the one before."""

DEARER = 1.05
"""The most work of a choice with a chain of values more, as a multiple of the work before."""
HOPELESS = 1.15
"""How many times the same a chain may cost that is not complete: a value may be computed twice
until its other readers join the chain."""
LONGEST_CHAIN = 8
"""The most values of a chain. Longer ones save nothing in the models here, and in a deep decoder of
clips trying them took a minute."""

Choice = frozenset[Value]


RulesType = TypeVar("RulesType", bound=Rules)


class Search(Generic[RulesType]):
    """The schedules of one graph for one input shape.

    Args:
        graph: The optimised graph.
        input_shape: `(N, C, H, W)`.
        rules_of: Returns the target's rules for this graph and an input shape.
    """

    def __init__(
        self, graph: Graph, input_shape: Shape, rules_of: Callable[[Shape], RulesType]
    ) -> None:
        self.graph = graph
        self.input_shape = input_shape
        self._rules_of = rules_of
        self._rules: dict[int, RulesType] = {}
        self._keeping_all: dict[int, Schedule] = {}
        self._least = graph.least_shape(input_shape)[0]
        self._one = Problem(graph, self.shape(self._least), self.rules(self._least))
        self._choices = _Choices(self._one)

    def shape(self, batch: int) -> Shape:
        """The input shape for a batch of another size."""
        return (batch, *self.input_shape[1:])

    def rules(self, batch: int) -> RulesType:
        """The rules for a batch of another size."""
        if batch not in self._rules:
            self._rules[batch] = self._rules_of(self.shape(batch))
        return self._rules[batch]

    def keeping_all(self, batch: int) -> Schedule:
        """The schedule for a batch of another size that keeps all values."""
        if batch not in self._keeping_all:
            problem = Problem(self.graph, self.shape(batch), self.rules(batch))
            self._keeping_all[batch] = make_schedule(problem)
        return self._keeping_all[batch]

    def fit(self, limit: int) -> Schedule | None:
        """Schedule a run within a limit.

        Args:
            limit: The most bytes of the arena.

        Returns:
            The cheapest schedule that was found, or `None` if none fits. If the batch does
            not fit, the schedule is for a smaller batch. Only a schedule for one image, or for
            a clip, rematerialises values.
        """
        batch = self.input_shape[0]
        one = self.keeping_all(self._least)
        size = min(batch, self._least * (limit // one.arena_bytes + 1))
        while size >= self._least:
            parts = -(-batch // size)
            schedule = self.keeping_all(-(-batch // parts))
            if schedule.arena_bytes <= limit:
                return schedule
            size = size * 7 // 8
        if self.is_hopeless(limit):
            return None
        choice = self._choices.within(limit, frozenset())
        if choice is None:
            *_, choice = self._choices.walk()
            if self._choices.arena(choice) > limit:
                return None
        return self.recomputing(choice)

    def is_hopeless(self, limit: int) -> bool:
        """Whether one image or clip needs so much more than the limit that no schedule can fit.

        False for images that need at most 4 GiB, whose schedules are searched: that takes seconds.
        """
        return self.keeping_all(self._least).arena_bytes > max(8 * limit, 2**32)

    def recomputing(self, choice: Iterable[Value], *, sketch: bool = False) -> Schedule:
        """The schedule for one image or clip that rematerialises the chosen values."""
        return make_schedule(self._one, choice, sketch=sketch)

    def tradeoffs(self) -> list[Schedule]:
        """Sketches of schedules for one image, from least work to least memory.

        None of them takes as much work as one that needs less memory, or nearly so.
        """
        free, *others = self.walk()
        found: list[Schedule] = []
        for sketch in reversed(others):
            if sketch.flops < FINER * min((each.flops for each in found), default=math.inf):
                found.append(sketch)
        return [free, *reversed(found)]

    def walk(self) -> Iterator[Schedule]:
        """Find sketches of schedules for one image with less and less memory, mostly dearer."""
        for choice in self._choices.walk():
            yield self.recomputing(choice, sketch=True)


class _Choices:
    """The greedy search over sets of values to rematerialise."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.graph = graph = problem.graph
        passing = problem.passing
        self.candidates = droppable(graph).difference(passing, passing.values())
        self.shuffled = self.candidates.intersection(
            operation.output for operation in graph.operations if isinstance(operation, Shuffle)
        )
        self.sketches: dict[Choice, Sketch] = {}

    def sketch(self, choice: Choice) -> Sketch:
        if choice not in self.sketches:
            self.sketches[choice] = Sketch(self.problem, choice)
        return self.sketches[choice]

    def arena(self, choice: Choice) -> int:
        return self.sketch(choice).arena_bytes

    def walk(self) -> Iterator[Choice]:
        """Choices with decreasing memory."""
        nothing: Choice = frozenset()
        choice: Choice | None = nothing
        while choice is not None:
            yield choice
            least = self.arena(choice)
            finer = int(FINER * least)
            # Only if no choice grows from the last one, search again from the start.
            choice = self.within(finer, choice) or self.within(least - 1, nothing)

    def within(self, limit: int, choice: Choice) -> Choice | None:
        """Extend a choice until its arena is within the limit; `None` if that fails."""
        while self.arena(choice) > limit:
            if self.bound(choice) > limit:
                return None
            better = self.next(limit, choice)
            if better is None:
                return None
            choice = better
        # A value that was chosen early may no longer be needed in the choice.
        for value in sorted(choice):
            fewer = choice - {value}
            if self.arena(fewer) <= limit and self.work(fewer) <= self.work(choice):
                choice = fewer
        return choice

    def next(self, limit: int, choice: Choice) -> Choice | None:
        """The choice with one more value, and its neighbours, at the least work per byte saved."""
        kept = sorted((self.candidates - choice) & self.kept_at_peak(limit, choice))
        grown = [self.with_kin(limit, choice | {value}, value) for value in kept]
        result = self.cheapest(limit, choice, grown)
        if result is None:
            # A value and its reader may have the same size, so that both must go.
            chains = (self.with_chain(limit, choice, value) for value in kept)
            result = self.cheapest(limit, choice, chains)
        if result is None:
            chains = (self.with_chain(limit, choice, value, math.inf) for value in kept)
            result = self.cheapest(limit, choice, chains)
        return result

    def cheapest(self, limit: int, choice: Choice, grown: Iterable[Choice]) -> Choice | None:
        """The choice that costs the least work per byte saved; `None` if all save nothing."""
        excess = self.excess(limit, choice)
        best: tuple[float, int, list[Value]] | None = None
        result = None
        for more in grown:
            saved = excess - self.excess(limit, more)
            if saved <= 0:
                continue
            price = max(0, self.work(more) - self.work(choice)) / saved
            key = (price, -saved, sorted(more))
            if best is None or key < best:
                best, result = key, more
        return result

    def with_chain(
        self, limit: int, choice: Choice, value: Value, dearest: float = DEARER
    ) -> Choice:
        """Add a value, and values computed from it until that saves memory or costs much."""
        excess, work = self.excess(limit, choice), self.work(choice)
        more = choice
        for operation in itertools.islice(self.computed_from(value), LONGEST_CHAIN):
            # Shuffles cost nothing, and what they make is as large as what reads it.
            shuffled = self.shuffled.intersection(operation.inputs)
            more = more | shuffled | {operation.output}
            if (
                operation.output not in self.candidates
                or self.work(more) > dearest * HOPELESS * work
            ):
                break
            if self.work(more) <= dearest * work and self.excess(limit, more) < excess:
                return more
        return choice

    def computed_from(self, value: Value) -> Iterator[Operation]:
        """What computes a value, and then what is computed from it."""
        known = {value}
        for operation in self.graph.operations:
            if operation.output == value or known.intersection(operation.inputs):
                known.add(operation.output)
                yield operation

    def with_kin(self, limit: int, choice: Choice, value: Value) -> Choice:
        """Add neighbours of a value if that saves work: they then share its sweep."""
        for operation in self.graph.operations:
            near = {operation.output, *operation.inputs}
            if value not in near:
                continue
            for other in sorted(near & self.candidates - choice):
                more = choice | {other}
                cheaper = self.work(more) < self.work(choice)
                if cheaper and self.excess(limit, more) <= self.excess(limit, choice):
                    choice = more
        return choice

    def bound(self, choice: Choice) -> int:
        """The bytes that remain if no value that can be rematerialised takes any.

        What extends a choice is computed again from others, which then live longer.
        """
        sketch = self.sketch(choice)
        kept = [b for b in sketch.buffers if self.candidates.isdisjoint(b.holds)]
        return max(live_bytes(kept, len(sketch.live_bytes)), default=0)

    def work(self, choice: Choice) -> int:
        return self.sketch(choice).flops

    def excess(self, limit: int, choice: Choice) -> int:
        """The bytes above the limit, summed over all values, plus those of the arena."""
        over: Callable[[int], int] = lambda size: max(0, size - limit)  # noqa: E731
        return over(self.arena(choice)) + sum(map(over, self.sketch(choice).live.values()))

    def kept_at_peak(self, limit: int, choice: Choice) -> set[Value]:
        """The values that are in memory when the limit is exceeded."""
        sketch = self.sketch(choice)
        peaks = [i for i, live in enumerate(sketch.live_bytes) if live > limit]
        if not peaks:
            # Only holes between buffers exceed the limit, and any value may help.
            return set(self.candidates)
        return {
            value
            for buffer in sketch.buffers
            for value, first in buffer.holds.items()
            if any(first <= i <= buffer.last for i in peaks)
        }
