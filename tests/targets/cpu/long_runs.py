"""Runs that nobody waits for, to be stopped; and scripts in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rbln_vae.graph.ir import Attention, Graph
from rbln_vae.targets.cpu.runtime import CpuRuntime

TESTS = Path(__file__).parents[2]


def attention_graph() -> Graph:
    """Attention of an image to itself: one operation, one step of a run."""
    return Graph(
        "decoder", "x", 32, "y", (Attention("y", "x", "x", "x", heads=1, scale=0.2),), {}
    ).verify()


def endless_run(**options: Any) -> tuple[CpuRuntime, torch.Tensor]:
    """A runtime and an image whose run takes minutes, all of them in one step."""
    runtime = CpuRuntime(attention_graph(), dtype="float32", **options)
    return runtime, torch.randn(1, 32, 1024, 1024)


def in_a_process(script: str, *arguments: object) -> Any:
    """Run a script that finds the tests' modules; gives its last line, from JSON.

    A process that hangs is a failure, after a time that a slow machine doesn't need.
    """
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {_paths()!r}\n{script}"]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, (result.returncode, result.stdout[-500:], result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])


def _paths() -> list[str]:
    return [str(TESTS), str(TESTS / "targets" / "cpu")]
