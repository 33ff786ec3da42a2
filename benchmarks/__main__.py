"""`python -m benchmarks`: see benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def benchmarks() -> None:
    """Measure this package against its peers, in one run, on the same inputs."""


@app.command()
def speed(
    model: Annotated[
        str, typer.Option(help="names of benchmarks/models.py, with commas; all of them: all")
    ] = "sd",
    parts: Annotated[str, typer.Option(help="decode, encode or both, with commas")] = (
        "decode,encode"
    ),
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "256,512,1024,2048",
    contenders: Annotated[
        str, typer.Option(help="names, with commas; all that make sense here by default")
    ] = "",
    rounds: Annotated[
        int, typer.Option(help="counted runs of each; at most 2 above 1024 pixels")
    ] = 5,
    name: Annotated[str, typer.Option(help="of the files under benchmarks/results")] = "speed",
) -> None:
    """Time and peak memory of decode and encode."""
    from . import speed
    from .models import MODELS

    measured = speed.measure(
        list(MODELS) if model == "all" else model.split(","),
        parts.split(","),
        [int(s) for s in sizes.split(",")],
        contenders.split(",") if contenders else [],
        rounds,
    )
    print(speed.table(measured))
    print(f"saved {speed.save(name, measured)}")


@app.command()
def video(
    model: Annotated[str, typer.Option(help="a name of benchmarks/models.py")] = "wan",
    parts: Annotated[str, typer.Option(help="decode, encode or both, with commas")] = (
        "decode,encode"
    ),
    sizes: Annotated[str, typer.Option(help="of frames, such as 480x832, with commas")] = "256",
    frames: Annotated[str, typer.Option(help="of the video, 1 + 4 n, with commas")] = "17",
    contenders: Annotated[str, typer.Option(help="names, with commas; all by default")] = "",
    rounds: Annotated[int, typer.Option(help="counted runs of each")] = 3,
    name: Annotated[str, typer.Option(help="of the files under benchmarks/results")] = "video",
) -> None:
    """Time and peak memory of videos, whole and frame by frame."""
    from rbln_vae.sizes import parse_size

    from . import video

    measured = video.measure(
        model,
        parts.split(","),
        [parse_size(s) for s in sizes.split(",")],
        [int(f) for f in frames.split(",")],
        contenders.split(",") if contenders else [],
        rounds,
    )
    print(video.table(measured))
    print(f"saved {video.save(name, measured)}")


@app.command()
def memory(
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "512,1024,2048,4096",
    name: Annotated[str, typer.Option(help="of the files under benchmarks/results")] = "memory",
) -> None:
    """Peak memory and time of decode against the size, and the seams of tiles."""
    from .memory import measure, save

    measured = measure([int(s) for s in sizes.split(",")])
    print(f"saved {save(name, measured)}")


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


@app.command()
def ablation(
    parts: Annotated[str, typer.Option(help="decode, encode or both, with commas")] = (
        "decode,encode"
    ),
    size: Annotated[int, typer.Option(help="pixels a side")] = 512,
    cases: Annotated[
        str, typer.Option(help="what to switch off, names with commas; all by default")
    ] = "",
    rounds: Annotated[int, typer.Option(help="counted pairs of runs of each case")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default what is fastest")
    ] = None,
    save: Annotated[bool, typer.Option(help="write benchmarks/results/ablation.md")] = True,
) -> None:
    """What each optimisation gains, by switching it off alone."""
    from . import ablation

    wanted = cases.split(",") if cases else ablation.usual_cases()
    compared = ablation.measure(parts.split(","), size, wanted, rounds, dtype)
    if save:
        print(f"saved {ablation.save(compared)}")


@app.command()
def kernels(
    isas: Annotated[
        str,
        typer.Option(help="instruction sets, with commas; all that are here by default"),
    ] = "",
    table: Annotated[
        str, typer.Option(help="cases that the tests are about, layers of a VAE, or both")
    ] = "cases,layers",
    rounds: Annotated[int, typer.Option(help="runs of each, of which the fastest counts")] = 5,
) -> None:
    """Every kernel on one thread, and the cost constants that would fit what it takes."""
    from .kernels import measure

    print(measure(isas.split(",") if isas else None, table.split(","), rounds))


@app.command()
def overhead(
    parts: Annotated[str, typer.Option(help="decode, encode or both, with commas")] = (
        "decode,encode"
    ),
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "64,128,256",
    rounds: Annotated[int, typer.Option(help="counted runs of each")] = 30,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default what is fastest")
    ] = None,
) -> None:
    """What a small image costs beyond its kernels."""
    from .overhead import measure

    print(measure(parts.split(","), [int(s) for s in sizes.split(",")], rounds, dtype))


@app.command()
def cores(
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "256,512",
    rounds: Annotated[int, typer.Option(help="runs by one thread and two; the fastest counts")] = 3,
) -> None:
    """How a run would share up to 256 cores, by simulation."""
    from .cores import measure

    print(measure([int(s) for s in sizes.split(",")], rounds))


@app.command()
def startup(
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "256,512,1024",
    rounds: Annotated[int, typer.Option(help="new processes")] = 9,
) -> None:
    """What comes before the first run: loading, planning, and starting a pipeline."""
    from .startup import measure

    print(measure([int(s) for s in sizes.split(",")], rounds))


@app.command()
def precision(
    parts: Annotated[str, typer.Option(help="decode, encode or both, with commas")] = (
        "decode,encode"
    ),
    size: Annotated[int, typer.Option(help="pixels a side")] = 128,
    images: Annotated[int, typer.Option(help="over which the error is taken")] = 4,
) -> None:
    """The error against diffusers in float64, and the least that bfloat16 can have."""
    from .precision import measure

    print(measure(parts.split(","), size, images))


@app.command()
def gpu(
    model: Annotated[str, typer.Option(help="a name of benchmarks/models.py")] = "sd",
    sizes: Annotated[str, typer.Option(help="pixels a side, with commas")] = "512,1024,2048,4096",
    device: Annotated[str, typer.Option(help="cuda; or cpu, to try it out")] = "cuda",
    rounds: Annotated[int, typer.Option(help="counted runs of each, at most")] = 5,
    memory_limit: Annotated[
        str | None, typer.Option(help="measure a decode within this memory, too: 8GiB")
    ] = None,
    name: Annotated[str, typer.Option(help="of the file under benchmarks/results")] = "gpu",
) -> None:
    """Time, memory and error of decoding on a GPU."""
    from .gpu import measure, save
    from .models import MODELS

    measured = measure(
        [int(s) for s in sizes.split(",")], device, MODELS[model], rounds, memory_limit
    )
    print(f"saved {save(name, device, measured)}")


@app.command()
def datasets(
    cases: Annotated[
        str, typer.Option(help="throughput, kills, memory and workers, with commas")
    ] = "throughput,kills,memory,workers",
    size: Annotated[int, typer.Option(help="pixels a side")] = 512,
    images: Annotated[int, typer.Option(help="of throughput and workers")] = 16,
    rounds: Annotated[int, typer.Option(help="of throughput and workers")] = 3,
    peer: Annotated[bool, typer.Option(help="run the loop with diffusers, too")] = True,
    kill_images: Annotated[int, typer.Option(help="of the job that is killed")] = 2000,
    kill_times: Annotated[int, typer.Option(help="how often it is killed")] = 20,
    samples: Annotated[str, typer.Option(help="of memory, with commas")] = "1000,1000000",
    name: Annotated[str, typer.Option(help="of the files under benchmarks/results")] = "datasets",
) -> None:
    """Encoding a data set: throughput, kills, memory, and workers of Ray."""
    from .datasets import measure

    print(
        measure(
            cases.split(","),
            size=size,
            images=images,
            rounds=rounds,
            peer=peer,
            kill_images=kill_images,
            kill_times=kill_times,
            samples=[int(each) for each in samples.split(",")],
            name=name,
        )
    )


if __name__ == "__main__":
    app()
