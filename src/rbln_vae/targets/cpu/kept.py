"""Keeps the transformed kernels of Winograd's algorithm between runs, where memory allows.

Kernels are kept from the second on of consecutive runs that gain by them. They never take memory
that activations need: a run that has no room for them, or gains little by them, gives them back
first. They are a matter of time alone; the bits of a result are the same.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from ... import _engine
from .program import Program, Step


@dataclass(frozen=True, eq=False)
class Bound:
    """A program with its weights.

    Attributes:
        program: The program.
        native: What the engine runs of it.
        steps: The steps of that: all, or those that read kept kernels without those that would
            make them.
        bytes: The bytes of a run, including the threads' scratch.
        spare: The most bytes of kernels that may be kept besides.
    """

    program: Program
    native: _engine.Plan
    steps: tuple[Step, ...]
    bytes: int
    spare: int = 0

    @property
    def beside_kept(self) -> tuple[Step, ...]:
        """Its steps where all kernels are kept."""
        return self.program.steps_beside(self.program.kernels)

    @property
    def kept_bytes(self) -> int:
        """The bytes of the kernels that are kept for it."""
        needed = sum(self.program.kernels.values())
        return needed if self.gains(needed) else 0

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[float]]:
        """The items and the work from the start to the end of each step."""
        items, work = self.native.items, (step.work for step in self.steps)
        return list(itertools.accumulate(items)), list(itertools.accumulate(work))

    def share_done(self, items: int) -> float:
        """The share of the work that is done with the first items of a run, by estimate."""
        ends, work = self._ends
        step = bisect.bisect_right(ends, items)
        if step == len(ends):
            return 1.0
        before, done = (ends[step - 1], work[step - 1]) if step else (0, 0.0)
        within = (items - before) / (ends[step] - before)
        return (done + within * (work[step] - done)) / (work[-1] or 1.0)

    def gains(self, kernels: int) -> bool:
        """Whether it may run beside so many bytes of kernels, and would be faster by them.

        The time that kernels take grows with their size, and that of all else with the
        activations. Where these are more than a quarter as large, a twentieth of the time is at
        stake at most.
        """
        schedule = self.program.schedule
        return 4 * (schedule.arena_bytes + schedule.state_bytes) < kernels <= self.spare


@dataclass(frozen=True)
class Kept:
    """Kernels that are there.

    Attributes:
        kernels: The transformed kernels, by the names of their weights.
        bound: Programs that make all kernels, and the same reading these.
    """

    kernels: Mapping[str, Tensor] = field(default_factory=dict)
    bound: WeakKeyDictionary[Bound, Bound] = field(default_factory=WeakKeyDictionary)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by the names of the weights."""
        return {name: kernels.nbytes for name, kernels in self.kernels.items()}


class KeptKernels:
    """The transformed kernels of a part: one copy, which all its runs read.

    Any number of threads may use it. There is no lock, which could stay held in a forked child:
    what is kept is replaced as a whole, and runs go on with what they have begun with.

    Args:
        packed: The packed weights.
        release: Gives back the arenas that no run uses.
    """

    def __init__(self, packed: Mapping[str, Tensor], release: Callable[[], None]) -> None:
        self._packed = packed
        self._release = release
        self._kept = Kept()
        self._wanted = False  # by the run before
        self._makers: dict[int, object] = {}  # by process

    @property
    def bytes(self) -> int:
        """The bytes that are kept."""
        return sum(self._kept.sizes.values())

    def give_back(self) -> None:
        """Return their memory to the system, as soon as no run reads them."""
        self._kept, self._wanted = Kept(), False

    def beside(self, bound: Bound, run: Callable[[_engine.Plan], object]) -> Bound:
        """The same program reading kept kernels, if they are there, or are made and kept now.

        Args:
            bound: The program of the next run, making all kernels.
            run: Runs a plan. What it raises passes through, and nothing more is kept.

        Returns:
            What to run; `bound` itself if the run is to make its kernels.
        """
        needed, kept = bound.program.kernels, self._kept
        if kept.kernels and not bound.gains(sum({**kept.sizes, **needed}.values())):
            kept = self._kept = Kept()
        again, self._wanted = self._wanted, bound.kept_bytes > 0
        if not needed:
            return bound
        if not needed.keys() <= kept.kernels.keys():
            made = self._make(bound.program, run) if again and self._wanted else None
            if made is None:
                return bound
            kept = made
        found = kept.bound.get(bound)
        if found is None:
            native = bound.program.bind(self._packed, kept.kernels)
            found = dataclasses.replace(bound, native=native, steps=bound.beside_kept)
            kept.bound[bound] = found
        return found

    def _make(self, program: Program, run: Callable[[_engine.Plan], object]) -> Kept | None:
        """Keep what a program needs, too; `None` if another run does so, or memory is short."""
        mine, process = object(), os.getpid()
        if self._makers.setdefault(process, mine) is not mine:
            return None
        try:
            kept = self._kept
            missing = {n: size // 4 for n, size in program.kernels.items() if n not in kept.kernels}
            if not missing:
                return kept
            memory = _engine.allocate(sum(missing.values()))
            # An arena of a larger image would add to what may be kept.
            self._release()
            ends = itertools.accumulate(missing.values())
            made = {n: memory[end - missing[n] : end] for n, end in zip(missing, ends, strict=True)}
            run(program.bind_kernels(self._packed, made))
            self._kept = Kept({**kept.kernels, **made})
            return self._kept
        except _engine.OutOfMemoryError:
            return None
        finally:
            self._makers.pop(process, None)
