"""A program: what the engine does for one input shape, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ... import _engine
from ...schedule.schedule import Schedule
from ...sizes import format_size
from ...units import format_bytes
from .tiles import Machine

ADDRESSABLE = 2**62
"""Bytes that the engine can count in any sum of two sizes."""


@dataclass(frozen=True)
class Step:
    """One call of the engine.

    Attributes:
        call: The method of the engine's plan that adds it.
        name: The value of the graph that it makes.
        kind: The operation.
        flops: Products and sums that it does; two each.
        work: Products and sums that take as long, at the machine's peak, as all of it does.
        bytes: What it reads and writes at the least.
        arguments: Of the call: numbers, images and offsets.
        weights: Of the call: names of packed weights.
        sweep: The number of the sweep that it is a strip of, from 1; else 0.
    """

    call: str
    name: str
    kind: str
    flops: int
    work: float
    bytes: int
    arguments: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)
    sweep: int = 0


@dataclass(frozen=True)
class Program:
    """What the engine does for one input shape.

    Attributes:
        schedule: What it does it for.
        machine: What will run it.
        steps: One for each task of the schedule.
    """

    schedule: Schedule
    machine: Machine
    steps: tuple[Step, ...]

    @property
    def work(self) -> float:
        """Of all steps; a run takes as many seconds as the machine's peak needs for it, about."""
        return sum(step.work for step in self.steps)

    def bind(self, kernels: _engine.Kernels, packed: Mapping[str, Tensor]) -> _engine.Plan:
        """The program as the engine takes it.

        Args:
            kernels: Those of the machine.
            packed: What `packing.pack` made of the weights.

        Raises:
            MemoryError: Its arena is larger than any address.
            ValueError: A step is none that the engine can do safely.
        """
        schedule = self.schedule
        if schedule.arena_bytes > ADDRESSABLE:
            raise MemoryError(
                f"A run needs {format_bytes(schedule.arena_bytes)}, more than can be addressed. "
                "Run a smaller image."
            )
        bound = _engine.Plan(
            kernels, schedule.arena_bytes, schedule.input_shape, schedule.output_shape
        )
        for step in self.steps:
            weights = {name: packed[weight] for name, weight in step.weights.items()}
            getattr(bound, step.call)(**step.arguments, **weights)
        return bound

    def describe(self) -> str:
        """The steps, their work and their memory, as a table; those of strips together."""
        schedule = self.schedule
        lines = [
            f"{format_size(schedule.input_shape)} to {format_size(schedule.output_shape)}, "
            f"{self.machine.dtype}, {self.machine.isa}: {schedule.flops / 1e9:.1f} GFLOP "
            f"({schedule.extra_work:.1%} of extra work), "
            f"arena of {format_bytes(schedule.arena_bytes)}",
            f"{'GFLOP':>9} {'MiB live':>9}  step",
        ]
        together: dict[tuple[int, str, str], list[int]] = {}
        for index, step in enumerate(self.steps):
            together.setdefault((step.sweep, step.kind, step.name), []).append(index)
        live = schedule.live_bytes()
        for (sweep, kind, name), indices in together.items():
            first = self.steps[indices[0]]
            tile = first.arguments.get("tile")
            note = f", tiles of {tile[0]}x{tile[1]}" if tile else ""
            splits = first.arguments.get("splits", 1)
            note += f", channels in {splits} parts" if splits > 1 else ""
            note += f", sweep {sweep} in {len(indices)} strips" if sweep else ""
            flops = sum(self.steps[i].flops for i in indices) / 1e9
            most = max(live[i] for i in indices) / 2**20
            lines.append(f"{flops:9.2f} {most:9.1f}  {kind} {name}{note}")
        return "\n".join(lines)
