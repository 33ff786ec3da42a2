"""The process of one contender: it prepares, then runs once for each line that it reads."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from benchmarks.contenders import Contender

HERE = Path(__file__).resolve().parent.parent


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


def _contender(name: str) -> Callable[[Path, str, int, int], Contender]:
    if name.startswith("without "):
        from benchmarks.ablation import CASES, Ablated

        return functools.partial(Ablated, CASES[name.removeprefix("without ")])
    from benchmarks.contenders import CONTENDERS

    return CONTENDERS[name]


class Worker:
    """A contender's process, seen from the benchmark."""

    def __init__(self, name: str, directory: Path, part: str, size: int, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.worker"]
        arguments = [name, str(directory), part, str(size), str(threads)]
        subprocess.run([*command, "convert", *arguments], cwd=HERE, check=True, capture_output=True)
        self.process = subprocess.Popen(
            [*command, "run", *arguments],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.prepare_seconds: float = self._answer()["prepare"]

    def run(self) -> dict[str, float]:
        """Run once.

        Returns:
            `seconds`; `memory`, the peak so far in bytes; and `power`, the mean square of
            the result.
        """
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # a library may print too
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"a contender ended with exit code {self.process.wait()}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


if __name__ == "__main__":
    main()
