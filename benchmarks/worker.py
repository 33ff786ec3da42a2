"""Processes of contenders, seen from the benchmarks; `process.py` is what runs in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent.parent


def result_file(directory: Path, name: str, part: str, size: int) -> Path:
    """Where the process of a contender writes the result of its first run."""
    return directory / f"{name} {part} {size}.pt"


class Worker:
    """The process of one contender."""

    def __init__(self, name: str, directory: Path, part: str, size: int, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.process"]
        arguments = [name, str(directory), part, str(size), str(threads)]
        converted = subprocess.run(
            [*command, "convert", *arguments], cwd=HERE, capture_output=True, text=True
        )
        if converted.returncode:
            raise RuntimeError(f"{name} can't convert the model:\n{converted.stderr}")
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
