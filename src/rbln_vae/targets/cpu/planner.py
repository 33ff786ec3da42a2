"""Plans the runs of a graph by the engine: the fastest program within a limit of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from ... import _engine
from ...graph.ir import Graph, Shape
from ...schedule import fitting
from ...schedule.schedule import Schedule
from ...schedule.search import Search
from ..planner import Planner
from .kept import Bound
from .kernels import measured_limit
from .lower import lower
from .program import Program, Step
from .rules import CpuRules
from .tiles import Choices, Machine

TILING_TIME = 1.5
"""The most time of a run that saves memory (`enable_tiling`), by estimate, as a multiple of the
time of the fastest."""


class CpuPlanner(Planner[Bound, CpuRules]):
    """Finds the fastest program of each shape and limit.

    Args:
        graph: The optimised graph.
        packed: The packed weights.
        machine: The kernels and the threads that run it.
        executor: Runs it.
        choices: What its programs may do to be faster.
        most_kept: The most bytes of transformed kernels that may be kept between runs.
    """

    def __init__(
        self,
        graph: Graph,
        packed: Mapping[str, Tensor],
        machine: Machine,
        executor: _engine.Executor,
        choices: Choices,
        most_kept: int,
    ) -> None:
        super().__init__(graph)
        self.machine = machine
        self._packed = packed
        self._executor = executor
        self.choices = choices
        self._most_kept = most_kept

    def rules(self, shape: Shape) -> CpuRules:
        """The engine's rules for schedules of an input shape."""
        return CpuRules(self.graph, shape, self.machine, self.choices)

    def bytes_of(self, planned: Bound) -> int:
        """The bytes of a run and of the kernels kept for it, without its result."""
        return planned.bytes + planned.kept_bytes

    def bind(self, program: Program, packed: Mapping[str, Tensor] | None = None) -> Bound:
        """A program with weights, by default its own."""
        native = program.bind(self._packed if packed is None else packed)
        return Bound(program, native, program.steps, self._executor.bytes(native))

    def lowered(self, schedule: Schedule, search: Search[CpuRules]) -> Bound:
        return self.bind(lower(schedule, search.rules(schedule.input_shape[0])))

    def tradeoffs(self, shape: Shape) -> list[Bound]:
        return [replace(each, spare=self._most_kept) for each in super().tradeoffs(shape)]

    def seconds(self, steps: Iterable[Step], runs: int = 1) -> float | None:
        """The estimated time of a number of runs, from the peak of this machine, if known."""
        machine = self.machine
        peak = measured_limit(machine.isa, machine.dtype, machine.threads)
        return runs * sum(step.work for step in steps) / peak if peak else None

    def _fit(self, search: Search[CpuRules], room: int) -> Bound:
        bound = self._within(search, room)
        spare = 0 if self.tiling else min(room - bound.bytes, self._most_kept)
        return replace(bound, spare=spare)

    def _within(self, search: Search[CpuRules], room: int) -> Bound:
        """The fastest program within `room` bytes, including the threads' scratch.

        Raises:
            fitting.TooLargeError: There is none.
        """
        free = search.keeping_all(search.input_shape[0])
        scratch = 0
        try:
            bound = self.lowered(free, search)
        except (ValueError, MemoryError):
            # The sizes may exceed the engine's integers.
            if free.arena_bytes <= room:
                raise
        else:
            if bound.bytes <= room and not self.tiling:
                return bound
            scratch = bound.bytes - free.arena_bytes
        if self.tiling and not search.is_hopeless(room):
            frugal = fitting.thrifty(
                search,
                lambda sketch: lower(sketch, search.rules(sketch.input_shape[0])).work,
                TILING_TIME,
            )
            bound = self.lowered(frugal, search)
            if bound.bytes <= room:
                return bound
        return self._searched(search, room, scratch)
