"""Plans the runs of a graph by PyTorch's kernels: the least work within a limit of memory."""

from __future__ import annotations

from dataclasses import replace

from ...graph.ir import Graph, Shape
from ...schedule import fitting
from ...schedule.schedule import Schedule
from ...schedule.search import Search
from ..planner import Planner
from .lower import lower
from .program import Program
from .rules import Machine, TorchRules
from .weights import Weights

TILING_WORK = 1.5
"""The most work of a run that saves memory (`enable_tiling`), as a multiple of the least."""


class TorchPlanner(Planner[Program, TorchRules]):
    """Finds the program with the least work for each shape and limit.

    Args:
        graph: The optimised graph.
        machine: The device.
        weights: The weights on it.
    """

    def __init__(self, graph: Graph, machine: Machine, weights: Weights) -> None:
        super().__init__(graph)
        self.machine = machine
        self._weights = weights
        self._rehearsed = False

    def rules(self, shape: Shape) -> TorchRules:
        """The rules for schedules of an input shape."""
        return TorchRules(self.graph, shape, self.machine)

    def fitted(self, shape: Shape, limit: int, taken: int) -> Program:
        if self.tiling:
            return super().fitted(shape, limit, taken)
        # Limits that vary with free memory mostly admit what runs without one.
        free = self._kept(shape, None)
        if free is not None and free.bytes <= limit - taken:
            return free
        found = super().fitted(shape, limit, taken)
        if not found.schedule.recomputed and found.schedule.input_shape == shape:
            self._keep(shape, None, found)
        return found

    def lowered(self, schedule: Schedule, search: Search[TorchRules]) -> Program:
        rules = search.rules(schedule.input_shape[0])
        program = lower(schedule, rules, self._weights)
        if not (self.machine.fused and self.machine.device.type == "cuda"):
            return program
        return replace(program, rehearse=lambda: self._rehearse(program, rules))

    def _rehearse(self, program: Program, rules: TorchRules) -> None:
        # Later programs need mostly the same kernels; what is new is compiled where it is called.
        if not self._rehearsed:
            self._rehearsed = True
            from .rehearsal import rehearse

            rehearse(program, rules, self._weights)

    @property
    def _one_by_one(self) -> bool:
        return not self.machine.batches

    def _fit(self, search: Search[TorchRules], room: int) -> Program:
        if self.tiling and not search.is_hopeless(room):
            frugal = fitting.thrifty(search, lambda sketch: sketch.flops, TILING_WORK)
            program = self.lowered(frugal, search)
            if program.bytes <= room:
                return program
        return self._searched(search, room)
