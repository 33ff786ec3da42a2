"""Profiles of runs: the time of each operation, as a table or as a trace."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import atomic_path


@dataclass(frozen=True)
class Step:
    """One operation of a run.

    Attributes:
        name: The value that the operation produced.
        kind: The kind of operation.
        start: Seconds from the start of the run to the start of the operation.
        seconds: The duration in seconds.
        flops: Floating-point operations.
        bytes: The least bytes that must be read and written: inputs, weights and output.
    """

    name: str
    kind: str
    start: float
    seconds: float
    flops: int
    bytes: int

    @property
    def gflops_per_second(self) -> float:
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gbytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True)
class RunProfile:
    """One run of one part.

    Attributes:
        part: `"encoder"` or `"decoder"`.
        input_shape: `(N, C, H, W)`.
        start: The start of the run, in seconds since the epoch.
        steps: The operations, in order.
        limit: The measured peak of the machine in floating-point operations per second; 0,
            the default, if it is unknown.
    """

    part: str
    input_shape: tuple[int, ...]
    start: float
    steps: tuple[Step, ...]
    limit: float = 0

    @property
    def seconds(self) -> float:
        """The total time of all steps, in seconds."""
        return sum(step.seconds for step in self.steps)

    def __str__(self) -> str:
        head = f"{self.part} of {'x'.join(map(str, self.input_shape))}: {self.seconds:.4f} s"
        if self.limit:
            head += f"; the machine's limit is {self.limit / 1e9:.0f} GFLOP/s"
        rows = [
            f"{step.seconds * 1e3:10.3f} {100 * step.seconds / (self.seconds or 1):6.1f} "
            f"{step.gflops_per_second:9.1f} {self._share(step):>7} "
            f"{step.gbytes_per_second:8.1f}  "
            f"{step.kind:<12} {step.name}"
            for step in self._together()
        ]
        return "\n".join(
            [head, f"{'ms':>10} {'%':>6} {'GFLOP/s':>9} {'limit':>7} {'GB/s':>8}  operation", *rows]
        )

    def _together(self) -> list[Step]:
        """The steps, with steps of the same kind and value merged."""
        found: dict[tuple[str, str], Step] = {}
        for step in self.steps:
            key = step.kind, step.name
            before = found.get(key, dataclasses.replace(step, seconds=0.0, flops=0, bytes=0))
            found[key] = dataclasses.replace(
                before,
                seconds=before.seconds + step.seconds,
                flops=before.flops + step.flops,
                bytes=before.bytes + step.bytes,
            )
        return list(found.values())

    def _share(self, step: Step) -> str:
        """The percentage of the peak that a step reaches, as text; empty if unknown.

        It counts the operations of a direct convolution. Winograd's algorithm needs fewer, and so
        do convolutions that double an image, so it can exceed 100 %.
        """
        if not self.limit or not step.flops:
            return ""
        return f"{100 * step.gflops_per_second * 1e9 / self.limit:.0f} %"


@dataclass(frozen=True)
class Profile:
    """The latest runs of a model; `print` shows one table per run."""

    runs: Sequence[RunProfile]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.runs)) or "No run yet."

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the runs as a trace in Chrome's JSON format, which Perfetto opens.

        Args:
            path: The file, for example `"trace.json"`; open it at https://ui.perfetto.dev.
        """
        origin = min((run.start for run in self.runs), default=0.0)
        events = [event for run in self.runs for event in _events(run, run.start - origin)]
        with atomic_path(Path(path)) as temporary:
            text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
            temporary.write_text(text, encoding="utf-8")


def _events(run: RunProfile, offset: float) -> list[dict[str, Any]]:
    """Complete events ("ph": "X") of the Trace Event Format, times in microseconds."""
    shape = "x".join(map(str, run.input_shape))
    whole = {"name": f"{run.part} {shape}", "ts": offset * 1e6, "dur": run.seconds * 1e6}
    steps = [
        {
            "name": f"{step.kind} {step.name}",
            "ts": (offset + step.start) * 1e6,
            "dur": step.seconds * 1e6,
            "args": {
                "GFLOP/s": round(step.gflops_per_second, 1),
                "GB/s": round(step.gbytes_per_second, 1),
            },
        }
        for step in run.steps
    ]
    return [{"ph": "X", "pid": 1, "tid": 1, "cat": run.part, **event} for event in [whole, *steps]]
