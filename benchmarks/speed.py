"""Time and memory of a decode or an encode, against every peer in one run."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.progress import Progress

from rbln_vae.metrics import relative_l2

from .contenders import CONTENDERS, usual
from .machine import threads
from .models import MODELS, make_model
from .report import RESULTS, write
from .worker import Worker, result_file

OURS = "rbln-vae"

REFERENCE = "diffusers f32"
"""The contender from whose result errors are measured."""

TOGETHER_UP_TO = 1024
"""Above this size the contenders don't fit in memory together, so each round starts anew."""

MOST_COLUMNS = 8
"""Bars of how many cases stand beside each other in a chart."""

LARGE_ROUNDS = 2
"""The most rounds above that size, where a run of one contender takes minutes."""


@dataclass
class Measurement:
    """The runs of one contender on one input.

    Attributes:
        model: A key of `MODELS`.
        contender: A key of `CONTENDERS`.
        part: `"decode"` or `"encode"`.
        size: Pixels a side.
        seconds: Of each run.
        memory: The peak resident memory of the process, in bytes.
        error: The relative L2 error of the result against that of `REFERENCE`; `None`, the
            default, where that didn't run.
    """

    model: str
    contender: str
    part: str
    size: int
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    error: float | None = None

    @property
    def case(self) -> str:
        """What was run: the model, the part and the size."""
        return f"{self.model} {self.part} {self.size}²"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def add(self, answer: dict[str, float]) -> None:
        self.seconds.append(answer["seconds"])
        self.memory = max(self.memory, int(answer["memory"]))


def measure(
    names: Iterable[str],
    parts: Iterable[str],
    sizes: Iterable[int],
    contenders: Sequence[str],
    rounds: int,
) -> list[Measurement]:
    """Run every contender in turn, `rounds` times, after one run to warm up.

    Args:
        names: Keys of `MODELS`.
        parts: `"decode"`, `"encode"` or both.
        sizes: Pixels a side.
        contenders: Keys of `CONTENDERS`; none for those that make sense here.
        rounds: Counted runs of each; at most `LARGE_ROUNDS` above `TOGETHER_UP_TO`.

    Returns:
        One measurement for each model, contender, part and size.

    Raises:
        ValueError: A model or a contender has an unknown name.
    """
    names, sizes, parts = list(names), list(sizes), list(parts)
    for kind, given, known in (("models", names, MODELS), ("contenders", contenders, CONTENDERS)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"no {kind} {unknown}; there are {list(known)}")
    results: list[Measurement] = []
    with Progress() as progress:
        for name in names:
            with TemporaryDirectory() as temporary:
                directory = Path(temporary)
                make_model(directory, MODELS[name])
                for part in parts:
                    for size in sizes:
                        group = [
                            Measurement(name, contender, part, size)
                            for contender in contenders or usual(name)
                        ]
                        _measure(group, directory, rounds, progress)
                        results += group
    return results


def _measure(
    group: Sequence[Measurement], directory: Path, rounds: int, progress: Progress
) -> None:
    """Run the contenders of one model, part and size."""
    size = group[0].size
    together = size <= TOGETHER_UP_TO
    turns = rounds if together else min(rounds, LARGE_ROUNDS)
    task = progress.add_task(group[0].case, total=len(group) * turns)
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for turn in range(turns):
            for m in group:
                if together and turn:
                    m.add(workers[m.contender].run())
                else:
                    worker = Worker(m.contender, directory, m.part, size, threads())
                    worker.run()
                    m.add(worker.run())
                    workers[m.contender] = worker
                    if together:
                        stack.enter_context(worker)
                    else:
                        with worker:
                            pass
                progress.console.print(f"{m.case} {m.contender}: {m.seconds[-1]:.3f} s")
                progress.advance(task)
    results = {
        m.contender: torch.load(result_file(directory, m.contender, m.part, size)) for m in group
    }
    if REFERENCE in results:
        for m in group:
            m.error = relative_l2(results[m.contender], results[REFERENCE])


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table: median seconds, peak memory, error, and how many times as fast we are.

    The ratio compares what has the same precision.
    """
    lines = [
        "| | | median s | min to max | peak memory | error | time against rbln-vae |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in dict.fromkeys(m.case for m in measurements):
        group = [m for m in measurements if m.case == case]
        for m in group:
            precision = m.contender.rsplit(" ", 1)[-1]
            ours = next((o for o in group if o.contender == f"{OURS} {precision}"), None)
            ratio = f"{m.median / ours.median:.2f}" if ours else ""
            error = f"{m.error:.1e}" if m.error else ""
            lines.append(
                f"| {case} | {m.contender} | {m.median:.3f} | "
                f"{min(m.seconds):.3f} to {max(m.seconds):.3f} | {m.memory / 1e9:.2f} GB | "
                f"{error} | {ratio} |"
            )
    return "\n".join(lines)


def save(name: str, measurements: Sequence[Measurement]) -> Path:
    """Write `NAME.md`, `NAME.json` and `NAME.png` under `benchmarks/results/`."""
    RESULTS.mkdir(exist_ok=True)
    chart(measurements, RESULTS / f"{name}.png")
    return write(name, table(measurements), {"runs": [asdict(m) for m in measurements]})


def chart(measurements: Sequence[Measurement], path: Path) -> None:
    """Bars of the time for each model, part and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(m.case for m in measurements))
    columns = min(len(cases), MOST_COLUMNS)
    rows = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.2 * columns + 1.6, 3.6 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    for axis, case in zip(axes.flat, cases, strict=False):
        group = [m for m in measurements if m.case == case][::-1]
        colors = ["#c0392b" if m.contender.startswith(OURS) else "#7f8c8d" for m in group]
        bars = axis.barh([m.contender for m in group], [m.median for m in group], color=colors)
        axis.bar_label(bars, labels=[f" {m.median:.2f}" for m in group], fontsize=8)
        axis.set_title(case, fontsize=10)
        axis.set_xlabel("seconds (median)", fontsize=8)
        axis.margins(x=0.18)
        axis.tick_params(labelsize=8)
        if axis not in axes[:, 0]:
            axis.set_yticklabels([])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
