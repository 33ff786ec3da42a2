"""Plans the runs of a graph: what a target runs for a shape, within a limit of memory."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from ..graph.ir import Graph, Shape, Value
from ..schedule import fitting
from ..schedule.problem import Problem
from ..schedule.schedule import Schedule
from ..schedule.search import RulesType, Search
from ..sizes import format_size
from ..units import format_bytes

KEPT = 64
"""How many plans are kept for later runs."""

Planned = TypeVar("Planned", bound=fitting.Sized)
"""What a target runs."""


class Planner(ABC, Generic[Planned, RulesType]):
    """Finds what is run for a shape within a limit, and keeps it for later runs.

    Any number of threads may use it. There is no lock, which could stay held in a forked child:
    single operations of a dict are atomic.

    Args:
        graph: The graph that runs.

    Attributes:
        slicing: Whether the images of a batch run one by one.
        tiling: Whether a run takes less memory than the limit allows, for some more time.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.slicing = self.tiling = False
        self._plans: dict[tuple[Shape, int | None, bool, bool], Planned] = {}

    @abstractmethod
    def rules(self, shape: Shape) -> RulesType:
        """The target's rules for schedules of an input shape."""

    @abstractmethod
    def lowered(self, schedule: Schedule, search: Search[RulesType]) -> Planned:
        """What runs by a schedule that a search found."""

    @abstractmethod
    def _fit(self, search: Search[RulesType], room: int) -> Planned:
        """The best within `room` bytes.

        Raises:
            fitting.TooLargeError: There is none.
        """

    def bytes_of(self, planned: Planned) -> int:
        """The bytes of a run, without its result."""
        return planned.bytes

    def search(self, shape: Shape) -> Search[RulesType]:
        """The search over schedules for an input shape."""
        return Search(self.graph, shape, self.rules)

    def tradeoffs(self, shape: Shape) -> list[Planned]:
        """What one image could be run by, from the least work to the least memory."""
        search = self.search(shape)
        return [self.lowered(each, search) for each in search.tradeoffs()]

    def check(self, shape: Shape) -> None:
        """Raise a `ValueError` for a shape that the graph doesn't take."""
        if len(shape) != 4 or min(shape) < 1 or shape[1] != self.graph.input_channels:
            raise ValueError(
                f"The input has shape {shape}, expected (N, {self.graph.input_channels}, H, W)."
            )

    def result_bytes(self, shape: Shape, element_bytes: int = 4) -> int:
        """The bytes of the result for an input shape; floats count as float32 (default)."""
        self.check(shape)
        return element_bytes * math.prod(self.graph.infer_shapes(shape)[self.graph.outputs[0]])

    def state_bytes(self, shape: Shape) -> int:
        """The bytes of the state of all videos of a batch, for frames of a shape."""
        one = (1, *shape[1:])
        return shape[0] * Problem(self.graph, one, self.rules(one)).state_bytes

    def fitted(self, shape: Shape, limit: int, taken: int) -> Planned:
        """What is run for a shape, or for a smaller batch.

        Args:
            shape: `(N, C, H, W)` of the input.
            limit: The most bytes.
            taken: How many of them are taken by other things.

        Raises:
            ValueError: The graph doesn't take the shape.
            MemoryError: Nothing fits.
        """
        room = limit - taken
        known = self._kept(shape, room)
        if known is not None:
            return known
        self.check(shape)
        alone = self.slicing or self.tiling or self._one_by_one
        try:
            found = self._fit(self.search(self.graph.least_shape(shape) if alone else shape), room)
        except fitting.TooLargeError as error:
            least, one = error.needed + taken, self.graph.least_shape(shape)
            raise MemoryError(
                f"A run of the {self.graph.name} on {format_size(one)} needs at least "
                f"{format_bytes(least)} besides the weights, and memory_limit is "
                f"{format_bytes(limit)}. Raise it to '{math.ceil(least / 2**20)}MiB', or run a "
                "smaller image."
            ) from None
        self._keep(shape, room, found)
        return found

    def _searched(self, search: Search[RulesType], room: int, besides: int = 0) -> Planned:
        """What a search finds within `room` bytes; `besides` as of `fitting.fit`.

        Raises:
            fitting.TooLargeError: There is nothing.
        """
        return fitting.fit(
            search,
            lambda schedule: self.lowered(schedule, search),
            room,
            lambda: self._usual_choice,
            besides,
        )

    @property
    def _one_by_one(self) -> bool:
        """Whether the images of a batch always run one by one; by default not."""
        return False

    def _kept(self, shape: Shape, room: int | None) -> Planned | None:
        return self._plans.get((shape, room, self.slicing, self.tiling))

    def _keep(self, shape: Shape, room: int | None, planned: Planned) -> None:
        self._plans[shape, room, self.slicing, self.tiling] = planned
        while len(self._plans) > KEPT:
            self._plans.pop(list(self._plans)[0], None)  # noqa: RUF015

    def forget(self) -> int:
        """Plan anew from the next run on.

        Returns:
            How many plans were kept.
        """
        kept = len(self._plans)
        self._plans.clear()
        return kept

    @functools.cached_property
    def _usual_choice(self) -> tuple[Value, ...]:
        """What is recomputed where an image of usual size is to take the least memory."""
        return self.search((1, self.graph.input_channels, 1024, 1024)).tradeoffs()[-1].recomputed
