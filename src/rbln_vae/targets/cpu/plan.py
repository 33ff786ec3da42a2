"""A plan: what the engine does for one input shape, step by step, and in what memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...graph.ir import Shape, Value
from ...units import format_bytes
from .memory import Buffer
from .tiles import Machine


@dataclass(frozen=True)
class Step:
    """One call of the engine.

    Attributes:
        call: The method of the engine's plan that adds it.
        name: The value of the graph that it makes.
        kind: The operation.
        flops: Products and sums that it does; two each.
        bytes: What it reads and writes at the least.
        arguments: Of the call: numbers, images and offsets.
        weights: Of the call: names of packed weights.
        sweep: The number of the sweep that it is a strip of, from 1; else 0.
    """

    call: str
    name: str
    kind: str
    flops: int
    bytes: int
    arguments: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)
    sweep: int = 0


@dataclass(frozen=True)
class Plan:
    """The steps of a run for one input shape.

    Attributes:
        input_shape: `(N, C, H, W)`.
        output_shape: `(N, C, H, W)`.
        machine: What it was made for.
        steps: In order.
        buffers: Everything in the arena.
        arena_bytes: The size of the arena.
        recomputed: The values that are never held whole, but computed in strips wherever
            they are needed; the others are computed once.
        needed_flops: Floating-point operations that a run does where all values are kept.
    """

    input_shape: Shape
    output_shape: Shape
    machine: Machine
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    recomputed: tuple[Value, ...]
    needed_flops: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a run."""
        return sum(step.flops for step in self.steps)

    @property
    def extra_work(self) -> float:
        """What is computed again, as a share of what is needed."""
        return self.flops / self.needed_flops - 1 if self.needed_flops else 0.0

    def live_bytes(self) -> list[int]:
        """For each step, the bytes of the buffers that hold something then."""
        changes = [0] * (len(self.steps) + 1)
        for buffer in self.buffers:
            changes[buffer.first] += buffer.bytes
            changes[buffer.last + 1] -= buffer.bytes
        return list(itertools.accumulate(changes[:-1]))

    def describe(self) -> str:
        """The steps, their work and their memory, as a table; those of strips together."""
        lines = [
            f"{'x'.join(map(str, self.input_shape))} to {'x'.join(map(str, self.output_shape))}, "
            f"{self.machine.dtype}, {self.machine.isa}: {self.flops / 1e9:.1f} GFLOP "
            f"({self.extra_work:.1%} of extra work), arena of {format_bytes(self.arena_bytes)}",
            f"{'GFLOP':>9} {'MiB live':>9}  step",
        ]
        together: dict[tuple[int, str, str], list[int]] = {}
        for index, step in enumerate(self.steps):
            together.setdefault((step.sweep, step.kind, step.name), []).append(index)
        live = self.live_bytes()
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
