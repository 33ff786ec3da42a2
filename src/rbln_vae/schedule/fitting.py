"""Chooses the program of a run within memory: what a target makes of the schedules of a search.

A program needs memory besides the arena of its schedule, such as scratch, of which only the target
knows. So schedules are searched, turned into programs, and searched again with less room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from ..graph.ir import Value
from .schedule import Schedule
from .search import Search


class Sized(Protocol):
    """A program.

    Attributes:
        bytes: Of a run.
    """

    @property
    def bytes(self) -> int: ...


Program = TypeVar("Program", bound=Sized)
Lower = Callable[[Schedule], Program]
"""Turns a schedule into a program of the target."""


class TooLargeError(Exception):
    """No program fits.

    Attributes:
        needed: About the bytes of the one that needs the least.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def fit(
    search: Search[Any],
    lower: Lower[Program],
    room: int,
    usual: Callable[[], Iterable[Value]],
    besides: int = 0,
) -> Program:
    """Find the program with the least work.

    Args:
        search: The search for the input shape.
        lower: Makes programs.
        room: The most bytes of the program.
        usual: Returns the choice that needs the least memory at another size. It gives a quick
            estimate for images that are far too large, so that refusing them costs little time.
        besides: Bytes that a program is known to need besides its arena, by default 0.

    Returns:
        A program for the batch, for a smaller one, or for one image.

    Raises:
        TooLargeError: None fits.
    """
    while schedule := search.fit(room - besides):
        program = lower(schedule)
        if program.bytes <= room:
            return program
        # Strips may need more than whole images.
        besides = program.bytes - schedule.arena_bytes
    if search.is_hopeless(room):
        needed = search.recomputing(usual(), sketch=True).arena_bytes + besides
        if needed > room:
            raise TooLargeError(needed)
    program = least(search, lower)
    if program.bytes > room:
        raise TooLargeError(program.bytes)
    return program


def least(search: Search[Any], lower: Lower[Program]) -> Program:
    """Find the program for one image that needs the least memory.

    Args:
        search: The search for the input shape.
        lower: Makes programs.
    """
    found: list[Program] = []
    for sketch in reversed(search.tradeoffs()):
        if found and sketch.arena_bytes >= min(each.bytes for each in found):
            break
        found.append(lower(search.recomputing(sketch.recomputed)))
    return min(found, key=lambda each: each.bytes)


def thrifty(search: Search[Any], work: Callable[[Schedule], float], most: float) -> Schedule:
    """Find the schedule for one image with the least memory at a limited cost.

    Args:
        search: The search for the input shape.
        work: Returns the work of a schedule's sketch.
        most: The most work, as a multiple of the least that was found.
    """
    chosen: Iterable[Value] = ()
    limit = float("inf")
    for sketch in search.walk():
        cost = work(sketch)
        if cost > limit:
            break
        chosen, limit = sketch.recomputed, min(limit, most * cost)
    return search.recomputing(chosen)
