"""What a small image costs beyond the arithmetic of its kernels.

A call of `decode` or `encode` takes Python's part, the steps one after the other, and in
each step the waiting of threads for the last. Beside the call stand the times of its steps,
and those of a single thread divided by the threads: what perfect sharing would take. The last
column compares the time of a pixel with that of the largest size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rbln_vae import RBLNAutoencoderKL

from .machine import threads
from .models import make_input, make_model
from .report import write

WARM_UP = 3


@dataclass
class Overhead:
    """Seconds of the runs of one part on one size.

    Attributes:
        part: `"decode"` or `"encode"`.
        size: Pixels a side.
        calls: Of each call.
        steps: All steps of each call.
        alone: All steps of each call by one thread, divided by the number of threads.
    """

    part: str
    size: int
    calls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    @property
    def pixel(self) -> float:
        """Seconds of a call for each pixel."""
        return statistics.median(self.calls) / self.size**2

    def row(self, largest: Overhead) -> str:
        """A row of the table.

        Args:
            largest: The same part on the largest size.
        """
        call, steps, alone = map(statistics.median, (self.calls, self.steps, self.alone))
        between = statistics.median(c / s - 1 for c, s in zip(self.calls, self.steps, strict=True))
        shared = statistics.median(c / a - 1 for c, a in zip(self.calls, self.alone, strict=True))
        return (
            f"| {self.part} {self.size}² | {call * 1e3:.2f} ms | {steps * 1e3:.2f} ms | "
            f"{between:.1%} | {alone * 1e3:.2f} ms | {shared:.1%} | "
            f"{self.pixel / largest.pixel:.2f} |"
        )


HEAD = (
    "| | call | its steps | call over steps | one thread's steps, shared out | call over these "
    "| a pixel |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def measure(parts: Iterable[str], sizes: Iterable[int], rounds: int, dtype: str | None) -> str:
    """Run each part on each size with all threads and with one, in turn.

    Args:
        parts: `"decode"`, `"encode"` or both.
        sizes: Pixels a side.
        rounds: Counted calls of each.
        dtype: In what to compute; `None` is what is fastest here.

    Returns:
        A Markdown table.
    """
    found: list[Overhead] = []
    with TemporaryDirectory() as directory:
        make_model(Path(directory) / "original")
        compiled = Path(directory) / "compiled"
        RBLNAutoencoderKL.from_pretrained(
            Path(directory) / "original",
            export=True,
            rbln_target="cpu",
            rbln_dtype=dtype,
            rbln_create_runtimes=False,
        ).save_pretrained(compiled)
        many, one = (
            RBLNAutoencoderKL.from_pretrained(
                compiled, rbln_num_threads=count, rbln_activate_profiler=True
            )
            for count in (threads(), 1)
        )
        for part in parts:
            for size in sizes:
                image = make_input(compiled, part, size)
                case = Overhead(part, size)
                for number in range(WARM_UP + rounds):
                    call, steps = _timed(many, part, image)
                    _, alone = _timed(one, part, image)
                    if number >= WARM_UP:
                        case.calls.append(call)
                        case.steps.append(steps)
                        case.alone.append(alone / threads())
                found.append(case)
    largest = {case.part: case for case in sorted(found, key=lambda case: case.size)}
    table = "\n".join([*HEAD, *(case.row(largest[case.part]) for case in found)])
    write("overhead", table, {"runs": [asdict(case) for case in found]})
    return table


def _timed(model: RBLNAutoencoderKL, part: str, image: torch.Tensor) -> tuple[float, float]:
    """Seconds of a call, and of all its steps."""
    function = model.encode if part == "encode" else model.decode
    start = time.perf_counter()
    function(image)
    return time.perf_counter() - start, model.profile().runs[-1].seconds
