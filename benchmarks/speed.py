"""Time and memory of a decode or an encode, against every peer in one run."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import Progress

from .contenders import CONTENDERS, make_model
from .machine import threads
from .report import RESULTS, write
from .worker import Worker

OURS = "rbln-vae"

TOGETHER_UP_TO = 1024
"""Above this size the contenders don't fit in memory together, so each round starts anew."""

LARGE_ROUNDS = 2
"""The most rounds above that size, where a run of one contender takes minutes."""


@dataclass
class Measurement:
    """The runs of one contender on one input."""

    contender: str
    part: str
    size: int
    seconds: list[float] = field(default_factory=list)
    memory: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def add(self, answer: dict[str, float]) -> None:
        self.seconds.append(answer["seconds"])
        self.memory = max(self.memory, int(answer["memory"]))


def measure(
    parts: Iterable[str], sizes: Iterable[int], names: Iterable[str], rounds: int
) -> list[Measurement]:
    """Run every contender in turn, `rounds` times, after one run to warm up.

    Args:
        parts: `"decode"`, `"encode"` or both.
        sizes: Pixels a side.
        names: Keys of `CONTENDERS`.
        rounds: Counted runs of each; at most `LARGE_ROUNDS` above `TOGETHER_UP_TO`.

    Returns:
        One measurement for each contender, part and size.
    """
    cases = [
        (part, size, rounds if size <= TOGETHER_UP_TO else min(rounds, LARGE_ROUNDS))
        for part in parts
        for size in sizes
    ]
    names = list(names)
    unknown = sorted(set(names) - CONTENDERS.keys())
    if unknown:
        raise ValueError(f"no contenders {unknown}; there are {list(CONTENDERS)}")
    results: list[Measurement] = []
    with TemporaryDirectory() as temporary, Progress() as progress:
        directory = Path(temporary)
        make_model(directory)
        task = progress.add_task("", total=len(names) * sum(turns for *_, turns in cases))
        for part, size, turns in cases:
            progress.update(task, description=f"{part} {size}")
            measured = {name: Measurement(name, part, size) for name in names}
            together = size <= TOGETHER_UP_TO
            with contextlib.ExitStack() as stack:
                workers: dict[str, Worker] = {}
                for turn in range(turns):
                    for name in names:
                        if together and turn:
                            measured[name].add(workers[name].run())
                        else:
                            worker = Worker(name, directory, part, size, threads())
                            worker.run()
                            measured[name].add(worker.run())
                            workers[name] = worker
                            if together:
                                stack.enter_context(worker)
                            else:
                                with worker:
                                    pass
                        seconds = measured[name].seconds[-1]
                        progress.console.print(f"{part} {size} {name}: {seconds:.3f} s")
                        progress.advance(task)
            results += measured.values()
    return results


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table: median seconds, peak memory, and how many times as fast we are.

    The ratio compares what has the same precision.
    """
    lines = [
        "| | | median s | min to max | peak memory | time against rbln-vae |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for part, size in dict.fromkeys((m.part, m.size) for m in measurements):
        group = [m for m in measurements if (m.part, m.size) == (part, size)]
        for m in group:
            precision = m.contender.rsplit(" ", 1)[-1]
            ours = next((o for o in group if o.contender == f"{OURS} {precision}"), None)
            ratio = f"{m.median / ours.median:.2f}" if ours else ""
            lines.append(
                f"| {part} {size}² | {m.contender} | {m.median:.3f} | "
                f"{min(m.seconds):.3f} to {max(m.seconds):.3f} | {m.memory / 1e9:.2f} GB | "
                f"{ratio} |"
            )
    return "\n".join(lines)


def save(name: str, measurements: Sequence[Measurement]) -> Path:
    """Write `NAME.md`, `NAME.json` and `NAME.png` under `benchmarks/results/`."""
    RESULTS.mkdir(exist_ok=True)
    chart(measurements, RESULTS / f"{name}.png")
    return write(name, table(measurements), {"runs": [asdict(m) for m in measurements]})


def chart(measurements: Sequence[Measurement], path: Path) -> None:
    """Bars of the time for each part and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((m.part, m.size) for m in measurements))
    figure, axes = pyplot.subplots(
        1, len(cases), figsize=(3.2 * len(cases) + 1.6, 3.6), squeeze=False, layout="constrained"
    )
    for axis, (part, size) in zip(axes[0], cases, strict=True):
        group = [m for m in measurements if (m.part, m.size) == (part, size)][::-1]
        colors = ["#c0392b" if m.contender.startswith(OURS) else "#7f8c8d" for m in group]
        bars = axis.barh([m.contender for m in group], [m.median for m in group], color=colors)
        axis.bar_label(bars, labels=[f" {m.median:.2f}" for m in group], fontsize=8)
        axis.set_title(f"{part} {size} x {size}", fontsize=10)
        axis.set_xlabel("seconds (median)", fontsize=8)
        axis.margins(x=0.18)
        axis.tick_params(labelsize=8)
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
