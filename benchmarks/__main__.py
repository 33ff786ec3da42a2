"""`python -m benchmarks speed`: see benchmarks/README.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .contenders import CONTENDERS

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def benchmarks() -> None:
    """Measure this package against its peers, in one run, on the same inputs."""


@app.command()
def speed(
    parts: Annotated[str, typer.Option(help="decode, encode or both, with commas")] = (
        "decode,encode"
    ),
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "256,512,1024",
    contenders: Annotated[str, typer.Option(help="names, with commas")] = ",".join(CONTENDERS),
    rounds: Annotated[int, typer.Option(help="counted runs of each")] = 5,
    name: Annotated[str, typer.Option(help="of the files under benchmarks/results")] = "speed",
) -> None:
    """Time and peak memory of decode and encode."""
    from . import report
    from .speed import measure

    measured = measure(
        parts.split(","), [int(s) for s in sizes.split(",")], contenders.split(","), rounds
    )
    command = "python -m benchmarks " + " ".join(f"'{a}'" if " " in a else a for a in sys.argv[1:])
    print(report.table(measured))
    print(f"saved {report.save(name, command, measured)}")


@app.command()
def serving(
    model: Annotated[
        Path | None, typer.Option(help="a model; by default Stable Diffusion's, random weights")
    ] = None,
    size: Annotated[int, typer.Option(help="pixels a side")] = 512,
    rounds: Annotated[int, typer.Option(help="counted runs of each")] = 10,
    minutes: Annotated[float, typer.Option(help="how long it is overloaded")] = 10,
) -> None:
    """Latency, throughput and overload of the HTTP service."""
    from .serving import measure

    print(measure(model, size, rounds, minutes))


if __name__ == "__main__":
    app()
