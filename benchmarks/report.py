"""Files of what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .machine import describe

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, table: str, data: Mapping[str, Any] | None = None) -> Path:
    """Write `NAME.md`, and `NAME.json` of the data, under `benchmarks/results/`.

    Each begins with the command that runs now, and the machine.
    """
    command = "python -m benchmarks " + " ".join(f"'{a}'" if " " in a else a for a in sys.argv[1:])
    machine = describe()
    listed = "\n".join(f"- {key}: {value}" for key, value in machine.items())
    RESULTS.mkdir(exist_ok=True)
    text = f"# {name}\n\n`{command}`\n\n{listed}\n\n{table}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    if data is not None:
        content = {"command": command, "machine": machine, **data}
        (RESULTS / f"{name}.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
    return RESULTS / f"{name}.md"
