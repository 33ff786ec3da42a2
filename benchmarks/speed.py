"""Time and memory of a decode or an encode, against every peer in one run."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import Progress

from .contenders import CONTENDERS, make_model
from .machine import threads
from .worker import Worker

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
