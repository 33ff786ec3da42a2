"""Tables and charts of what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .machine import describe
from .speed import Measurement

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "rbln-vae"


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
