"""The process of one contender: it prepares, then runs once for each line that it reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent.parent


def peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system doesn't tell the peak memory of a process")


def main() -> None:
    name, directory, part, size, threads = sys.argv[1:]
    from benchmarks.contenders import CONTENDERS

    start = time.perf_counter()
    contender = CONTENDERS[name](Path(directory), part, int(size), int(threads))
    answer: dict[str, float] = {"prepare": time.perf_counter() - start}
    while True:
        print(json.dumps(answer), flush=True)
        if not sys.stdin.readline():
            return
        start = time.perf_counter()
        contender.run()
        answer = {"seconds": time.perf_counter() - start, "memory": peak_memory()}


class Worker:
    """A contender's process, seen from the benchmark."""

    def __init__(self, name: str, directory: Path, part: str, size: int, threads: int) -> None:
        arguments = [name, str(directory), part, str(size), str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.prepare_seconds: float = self._answer()["prepare"]

    def run(self) -> dict[str, float]:
        """Run once; gives `seconds` and `memory`, the peak so far in bytes."""
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
