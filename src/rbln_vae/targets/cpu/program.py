"""A program: what the engine does for one input shape, step by step."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from ... import _engine
from ...schedule.schedule import Schedule
from ...sizes import format_size
from ...units import format_bytes
from .tiles import Machine

Native: TypeAlias = (
    _engine.ImportStep
    | _engine.ExportStep
    | _engine.ConvStep
    | _engine.WinogradStep
    | _engine.StatisticsStep
    | _engine.NormStep
    | _engine.AttentionPackStep
    | _engine.AttentionStep
    | _engine.ModulateStep
    | _engine.PointwiseStep
    | _engine.ShuffleStep
    | _engine.MoveRowsStep
)
"""A step as the engine has it."""

EMPTY = (0, 0, 0, 0)
"""The shape of an image that isn't there."""

NONE_KEPT: Mapping[str, Tensor] = MappingProxyType({})
"""Kept kernels, of no weights."""


@dataclass(frozen=True)
class Kernels:
    """Kernels that are transformed for Winograd's algorithm.

    Attributes:
        weight: The name of the packed weights that they are made of, and of what is left out.
        bytes: Their size.
    """

    weight: str
    bytes: int


@dataclass(frozen=True)
class Step:
    """A step of the engine, and what is known of it.

    Attributes:
        name: The value of the graph that it makes.
        kind: The operation.
        flops: Products and sums that it does; two each.
        work: Products and sums that take as long, at the machine's peak, as all of it does.
        bytes: What it reads and writes at the least.
        sweep: The number of the sweep that it is a strip of, from 1; else 0.
        native: What the engine does.
        weights: Names of the packed weights that it takes, in the order of `_engine.Plan.add`;
            `None` for one that it doesn't need.
        kernels: The transformed kernels that it makes or reads, if any.
    """

    name: str
    kind: str
    flops: int
    work: float
    bytes: int
    sweep: int
    native: Native
    weights: tuple[str | None, ...]
    kernels: Kernels | None = None

    @property
    def made(self) -> Kernels | None:
        """The transformed kernels that it makes, if any."""
        return self.kernels if isinstance(self.native, _engine.WinogradStep) else None


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

    @functools.cached_property
    def kernels(self) -> Mapping[str, int]:
        """The bytes of the transformed kernels that a run makes, by the names of their weights."""
        return {step.made.weight: step.made.bytes for step in self.steps if step.made}

    def steps_beside(self, kept: Container[str]) -> tuple[Step, ...]:
        """The steps of a run that makes no kernels of the weights named."""
        return tuple(s for s in self.steps if not (s.made and s.made.weight in kept))

    def bind(
        self, packed: Mapping[str, Tensor], kept: Mapping[str, Tensor] = NONE_KEPT
    ) -> _engine.Plan:
        """The program as the engine takes it.

        Args:
            packed: What `packing.pack` made of the weights.
            kept: Kernels that were transformed before, by the names of their weights; by default
                all are made in the run.

        Raises:
            ValueError: A step is none that the engine can do safely.
        """
        schedule = self.schedule
        plan = _engine.Plan(
            self.machine.kernels,
            schedule.arena_bytes,
            schedule.input_shape,
            schedule.output_shape,
            schedule.inputs,
            schedule.outputs,
            schedule.state_bytes,
        )
        for step in self.steps_beside(kept):
            _add(plan, step, packed, kept)
        return plan

    def bind_kernels(
        self, packed: Mapping[str, Tensor], memory: Mapping[str, Tensor]
    ) -> _engine.Plan:
        """A plan that only transforms kernels; its input and output are empty.

        Args:
            packed: What `packing.pack` made of the weights.
            memory: Where to write them, by the names of the weights that they are made of.
        """
        plan = _engine.Plan(self.machine.kernels, 0, EMPTY, EMPTY)
        steps = {step.made.weight: step for step in self.steps if step.made}
        for name in memory:
            _add(plan, steps[name], packed, memory)
        return plan

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
            note, native = "", first.native
            if isinstance(native, (_engine.ConvStep, _engine.StatisticsStep, _engine.NormStep)):
                note += f", cells of {native.cell_height}x{native.cell_width}"
            if isinstance(native, _engine.ConvStep):
                note += f", tiles of {native.tile_height}x{native.tile_width}"
                if native.splits > 1:
                    note += f", channels in {native.splits} parts"
            note += ", unless they are kept" if first.made else ""
            note += f", sweep {sweep} in {len(indices)} strips" if sweep else ""
            flops = sum(self.steps[i].flops for i in indices) / 1e9
            most = max(live[i] for i in indices) / 2**20
            lines.append(f"{flops:9.2f} {most:9.1f}  {kind} {name}{note}")
        return "\n".join(lines)


def _add(
    plan: _engine.Plan, step: Step, packed: Mapping[str, Tensor], kernels: Mapping[str, Tensor]
) -> None:
    # Which steps take `None` for weights, the engine's signatures say.
    weights: list[Any] = [name and packed[name] for name in step.weights]
    if step.kernels is not None and step.kernels.weight in kernels:
        weights.append(kernels[step.kernels.weight])
    plan.add(step.native, *weights)
