"""Scripts in processes of their own, for what a test can't do to the one that runs all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
PATHS = [str(TESTS), str(TESTS / "targets" / "cpu"), str(TESTS.parent / "examples")]


def in_a_process(script: str, *arguments: object) -> Any:
    """Run a script that finds the tests' modules; gives its last line, from JSON.

    A process that hangs is a failure, after a time that no slow machine needs.
    """
    if "san.so" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer keeps memory and threads of its own")
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {PATHS!r}\n{script}"]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, (result.returncode, result.stdout[-500:], result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])
