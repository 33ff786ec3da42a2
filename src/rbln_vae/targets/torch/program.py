"""A program: a schedule as calls of PyTorch, for any number of runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...schedule.schedule import Kind, Schedule

COPIES = (Kind.IMPORT, Kind.EXPORT)
"""The tasks that copy the caller's tensors."""


@dataclass
class Frame:
    """The tensors of one run.

    Attributes:
        images: The arena, in the dtype of images.
        floats: The same memory in float32.
        sources: What the caller gave: floats or levels, on any device.
        results: Where the results go: floats or levels, on any device.
        dtype: The dtype that levels of a result are computed from.
        state: The state of a video, in the dtype of images; empty if there is none.
        finite: Gets whether each image had only finite values, if asked for.
        on_rows: Called with the first row and the number of rows that are finished.
    """

    images: Tensor
    floats: Tensor
    sources: list[Tensor]
    results: list[Tensor]
    dtype: torch.dtype
    state: Tensor
    finite: Tensor | None = None
    on_rows: Callable[[int, int], object] | None = None

    @classmethod
    def on(cls, arena: Tensor, dtype: torch.dtype, *others: Any) -> Frame:
        """The frame of a run with an arena, a tensor of bytes, for images of a dtype."""
        return cls(arena.view(dtype), arena.view(torch.float32), *others)


Call = Callable[[Frame], None]


@dataclass(frozen=True)
class Step:
    """The calls of one task.

    Attributes:
        name: The value that the task belongs to.
        kind: The kind of the task or of its operation.
        flops: Floating-point operations.
        bytes: Bytes that it reads and writes.
        workspace: The most bytes that it takes besides the arena.
        run: What it does.
    """

    name: str
    kind: str
    flops: int
    bytes: int
    workspace: int
    run: Call


@dataclass(frozen=True, eq=False)
class Program:
    """A schedule as steps.

    Attributes:
        schedule: The schedule.
        steps: One for each task.
        rehearse: Compiles what a run would compile by itself, more slowly.
    """

    schedule: Schedule
    steps: tuple[Step, ...]
    rehearse: Callable[[], None] = lambda: None

    @property
    def bytes(self) -> int:
        """The bytes of a run without its result."""
        return self.schedule.arena_bytes + max(step.workspace for step in self.steps)

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations of all steps, at least 1."""
        return sum(step.flops for step in self.steps) or 1
