"""Trading time for memory: which values a plan computes again rather than keeps.

Any choice of values gives the same result, to the last bit; what differs is the memory and
the work. The choice is made step by step: where more memory is needed than there is, that
value is given up which costs the least work for what it saves.
"""

from __future__ import annotations

from collections.abc import Callable

from ...graph.ir import Graph, Shape, Value
from .plan import Plan
from .planner import droppable, make_plan
from .tiles import Machine

FINER = 0.97
"""A plan of less memory than another needs at most this share of it."""

Choice = frozenset[Value]


def fit_plan(graph: Graph, input_shape: Shape, machine: Machine, limit: int) -> Plan | None:
    """Plan a run in an arena of at most so many bytes.

    Args:
        graph: What the passes made of it.
        input_shape: `(N, C, H, W)`.
        machine: What will run it.
        limit: Bytes.

    Returns:
        The cheapest plan that was found, or `None` if none fits. A batch may be too much
        for the limit: the plan is then for a part of it, down to one image, and only for
        one image are values computed again.
    """
    batch = input_shape[0]
    one = make_plan(graph, (1, *input_shape[1:]), machine)
    size = min(batch, limit // one.arena_bytes + 1)
    while size > 0:
        parts = -(-batch // size)
        plan = make_plan(graph, (-(-batch // parts), *input_shape[1:]), machine)
        if plan.arena_bytes <= limit:
            return plan
        size = size * 7 // 8
    if hopeless(one, limit):
        return None
    search = _Search(graph, (1, *input_shape[1:]), machine)
    choice = search.within(limit, frozenset())
    if choice is None:
        choice = search.tradeoffs()[-1]
        if search.arena(choice) > limit:
            return None
    return make_plan(graph, (1, *input_shape[1:]), machine, choice)


def hopeless(plan: Plan, limit: int) -> bool:
    """Whether a plan that keeps all values is so far beyond a limit that none will fit.

    Small ones are always looked into: it takes a second at most.
    """
    return plan.arena_bytes > max(8 * limit, 2**32)


def tradeoffs(graph: Graph, input_shape: Shape, machine: Machine) -> list[Plan]:
    """Sketches of plans for one image, from the least work to the least memory."""
    shape = (1, *input_shape[1:])
    search = _Search(graph, shape, machine)
    free = make_plan(graph, shape, machine, sketch=True)
    others = (search.sketch(choice) for choice in search.tradeoffs())
    return [free, *(plan for plan in others if plan.arena_bytes < FINER * free.arena_bytes)]


class _Search:
    def __init__(self, graph: Graph, input_shape: Shape, machine: Machine) -> None:
        self.graph = graph
        self.input_shape = input_shape
        self.machine = machine
        self.candidates = droppable(graph)
        self.sketches: dict[Choice, Plan] = {}

    def sketch(self, choice: Choice) -> Plan:
        if choice not in self.sketches:
            self.sketches[choice] = make_plan(
                self.graph, self.input_shape, self.machine, choice, sketch=True, beside=True
            )
        return self.sketches[choice]

    def arena(self, choice: Choice) -> int:
        return self.sketch(choice).arena_bytes

    def tradeoffs(self) -> list[Choice]:
        """Choices of ever less memory."""
        nothing: Choice = frozenset()
        found = [nothing]
        while True:
            least = self.arena(found[-1])
            finer = int(FINER * least)
            # What another way leads to is asked last, until it leads nowhere.
            choice = self.within(finer, found[-1]) or self.within(least - 1, nothing)
            if choice is None:
                return found
            found.append(choice)

    def within(self, limit: int, choice: Choice) -> Choice | None:
        """A choice whose arena is at most so large, from one that needs more."""
        while self.arena(choice) > limit:
            better = self.next(limit, choice)
            if better is None:
                return None
            choice = better
        # What was given up early may not have been needed.
        for value in sorted(choice):
            fewer = choice - {value}
            if self.arena(fewer) <= limit and self.work(fewer) <= self.work(choice):
                choice = fewer
        return choice

    def next(self, limit: int, choice: Choice) -> Choice | None:
        """The choice with one value more, and its kin, that saves at the least price."""
        excess = self.excess(limit, choice)
        best: tuple[float, int, list[Value]] | None = None
        result = None
        for value in sorted(self.candidates - choice):
            if value not in self.kept_at_peak(limit, choice):
                continue
            more = self.with_kin(limit, choice | {value}, value)
            saved = excess - self.excess(limit, more)
            if saved <= 0:
                continue
            price = max(0, self.work(more) - self.work(choice)) / saved
            key = (price, -saved, sorted(more))
            if best is None or key < best:
                best, result = key, more
        return result

    def with_kin(self, limit: int, choice: Choice, value: Value) -> Choice:
        """Give up values beside one, too, where that saves work: they then share its sweep."""
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

    def work(self, choice: Choice) -> int:
        return self.sketch(choice).flops

    def live(self, choice: Choice) -> dict[Value, int]:
        """For each value, the bytes that are in use when it is made."""
        plan = self.sketch(choice)
        most: dict[Value, int] = {}
        for step, live in zip(plan.steps, plan.live_bytes(), strict=True):
            most[step.name] = max(most.get(step.name, 0), live)
        return most

    def excess(self, limit: int, choice: Choice) -> int:
        """By how much the limit is passed, over all values; the holes of the arena once."""
        over: Callable[[int], int] = lambda size: max(0, size - limit)  # noqa: E731
        return over(self.arena(choice)) + sum(map(over, self.live(choice).values()))

    def kept_at_peak(self, limit: int, choice: Choice) -> set[Value]:
        """The values that are held whole where the limit is passed."""
        plan = self.sketch(choice)
        peaks = [i for i, live in enumerate(plan.live_bytes()) if live > limit]
        if not peaks:
            # It fits but for holes, which anything may fill.
            return set(self.candidates)
        return {
            buffer.name
            for buffer in plan.buffers
            if any(buffer.first <= i <= buffer.last for i in peaks)
        }
