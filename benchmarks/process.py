"""The process of one contender: it prepares, then runs once for each line that it reads.

The result of its first run is kept in a file, so that contenders can be compared.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .ablation import CASES, Ablated
from .contenders import CONTENDERS, Contender
from .worker import result_file


def peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system doesn't tell the peak memory of a process")


def main() -> None:
    task, name, directory, part, size, threads = sys.argv[1:]
    contender = _contender(name)(Path(directory), part, int(size), int(threads))
    if task == "convert":
        if not contender.converted.exists():
            contender.convert()
        return
    kept = result_file(Path(directory), name, part, int(size))
    start = time.perf_counter()
    contender.prepare()
    answer: dict[str, float] = {"prepare": time.perf_counter() - start}
    while True:
        print(json.dumps(answer), flush=True)
        if not sys.stdin.readline():
            return
        start = time.perf_counter()
        result = contender.run()
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "memory": peak_memory(), **contender.details()}
        answer["power"] = float(result.float().square().mean(dtype=torch.float64))
        if not kept.exists():
            torch.save(result.float(), kept)


def _contender(name: str) -> Callable[[Path, str, int, int], Contender]:
    if name.startswith("without "):
        return functools.partial(Ablated, CASES[name.removeprefix("without ")])
    return CONTENDERS[name]


if __name__ == "__main__":
    main()
