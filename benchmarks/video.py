"""Decoding and encoding of videos: whole calls, and frame by frame, in time and memory.

Each contender has a process of its own, and the processes run in turn.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import Pool
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rbln_vae.metrics import relative_l2
from rbln_vae.sizes import Size, format_size

from .contenders import Contender, Diffusers, DiffusersFloat32, Ours, OursFloat32
from .machine import threads
from .models import MODELS, make_model
from .process import peak_memory
from .report import write


class OursStreamed(Ours):
    """Takes each frame as it is done, and keeps none but the last."""

    def run(self) -> torch.Tensor:
        start = time.perf_counter()
        runs = self.model.decode_frames if self.part == "decode" else self.model.encode_frames
        frames = runs(self.input)
        last = next(frames)
        self.first = time.perf_counter() - start
        while (frame := next(frames, None)) is not None:
            last = frame
        return last.unsqueeze(2)

    def details(self) -> dict[str, float]:
        return {"first": self.first}


CONTENDERS: dict[str, type[Contender]] = {
    "rbln-vae bf16": Ours,
    "rbln-vae frame by frame bf16": OursStreamed,
    "diffusers bf16": Diffusers,
    "rbln-vae f32": OursFloat32,
    "diffusers f32": DiffusersFloat32,
}
REFERENCE = "diffusers f32"


@dataclass
class Measurement:
    """The runs of one contender on one video.

    Attributes:
        contender: A key of `CONTENDERS`.
        part: `"decode"` or `"encode"`.
        size: Of a frame.
        frames: Of the video.
        seconds: Of each run.
        first: Seconds until the first frame of the last run, where frames come one by one.
        memory: The peak resident memory of the process, in bytes.
        error: The relative L2 error of the last frame against that of `REFERENCE`; `None`, the
            default, where that didn't run.
    """

    contender: str
    part: str
    size: Size
    frames: int
    seconds: list[float] = field(default_factory=list)
    first: float | None = None
    memory: int = 0
    error: float | None = None


def measure(
    model: str,
    parts: Sequence[str],
    sizes: Sequence[Size],
    lengths: Sequence[int],
    contenders: Sequence[str],
    rounds: int,
) -> list[Measurement]:
    """Run every contender in turn, `rounds` times, after one run of one frame.

    Args:
        model: A key of `MODELS`.
        parts: `"decode"`, `"encode"` or both.
        sizes: Of frames.
        lengths: Numbers of frames.
        contenders: Keys of `CONTENDERS`; none for all.
        rounds: Counted runs of each.

    Raises:
        ValueError: The model or a contender has an unknown name.
    """
    contenders = contenders or list(CONTENDERS)
    unknown = sorted({*contenders} - {*CONTENDERS}) + ([model] if model not in MODELS else [])
    if unknown:
        raise ValueError(f"no {unknown}; there are {list(CONTENDERS)} and {list(MODELS)}")
    found = []
    with TemporaryDirectory() as name:
        directory = Path(name)
        make_model(directory, MODELS[model])
        for part in parts:
            for size in sizes:
                for length in lengths:
                    group = [Measurement(each, part, size, length) for each in contenders]
                    _measure(group, directory, rounds)
                    found += group
    return found


def _measure(group: Sequence[Measurement], directory: Path, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    last: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        pools: dict[str, Pool] = {}
        for m in group:
            given = m.contender, directory, m.part, m.size, threads(), m.frames
            # In another process than the runs, whose memory it would raise.
            with context.Pool(1) as converting:
                converting.apply(_convert, given)
            pool = pools[m.contender] = stack.enter_context(context.Pool(1, _prepare, given))
            pool.apply(int)  # once it is prepared: a pool begins without waiting for that
        for _ in range(rounds):
            for m in group:
                answer, frame = pools[m.contender].apply(_run)
                m.seconds.append(answer["seconds"])
                m.first = answer.get("first")
                m.memory = int(answer["memory"])
                last[m.contender] = frame
                print(f"{m.part} {m.contender}: {m.seconds[-1]:.2f} s", flush=True)
    if REFERENCE in last:
        for m in group:
            m.error = relative_l2(last[m.contender], last[REFERENCE])


_contender: Contender


def _convert(name: str, directory: Path, part: str, size: Size, threads: int, frames: int) -> None:
    contender = CONTENDERS[name](directory, part, size, threads, frames)
    if not contender.converted.exists():
        contender.convert()


def _prepare(name: str, directory: Path, part: str, size: Size, threads: int, frames: int) -> None:
    global _contender
    _contender = CONTENDERS[name](directory, part, size, threads, frames)
    _contender.prepare()
    video, _contender.input = _contender.input, _contender.input[:, :, :1]
    _contender.run()
    _contender.input = video


def _run() -> tuple[dict[str, float], torch.Tensor]:
    """Run once: what was measured, and the last frame."""
    start = time.perf_counter()
    result = _contender.run()
    seconds = time.perf_counter() - start
    answer = {"seconds": seconds, "memory": peak_memory(), **_contender.details()}
    return answer, result[:, :, -1].float().clone()


def table(measured: Sequence[Measurement]) -> str:
    """A Markdown table; the last column compares whole calls of the same precision."""
    lines = [
        "| | | median s | min to max | first frame | peak memory | error | time against rbln-vae |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    medians = {
        (m.part, m.size, m.frames, m.contender): statistics.median(m.seconds) for m in measured
    }
    for m in measured:
        case = (m.part, m.size, m.frames)
        precision = m.contender.rsplit(" ", 1)[-1]
        median = medians[(*case, m.contender)]
        ours = medians.get((*case, f"rbln-vae {precision}"))
        lines.append(
            f"| {m.part} {format_size(m.size)}, {m.frames} frames | {m.contender} | {median:.2f} | "
            f"{min(m.seconds):.2f} to {max(m.seconds):.2f} | "
            f"{'' if m.first is None else f'{m.first:.2f}'} | {m.memory / 1e9:.2f} GB | "
            f"{f'{m.error:.1e}' if m.error else ''} | {f'{median / ours:.2f}' if ours else ''} |"
        )
    return "\n".join(lines)


def save(name: str, measured: Sequence[Measurement]) -> Path:
    """Write `NAME.md` and `NAME.json` under `benchmarks/results/`."""
    return write(name, table(measured), {"runs": [asdict(m) for m in measured]})
