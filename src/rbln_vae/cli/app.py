"""The commands, their options and their help; what they do is in the modules beside.

Those load torch and are imported only by the command that runs, so that help and
completion are quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..datasets.options import Options
from ..serving.settings import RUN_TIMEOUT, Address, BatcherOptions, Limits
from .groups import grouped, options_of
from .options import (
    COMPILING,
    MEMORY_LIMIT,
    RUNNING,
    THREADS,
    TUNING,
    WHERE,
    WHERE_BESIDE_SOURCE,
    Compiled,
    Fit,
    Images,
    Model,
    ModelBatch,
    ModelOption,
    ModelSize,
    Output,
    Size,
)
from .terminal import Commands, out, working

app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        out().print(f"rbln-vae {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Compile a diffusers AutoencoderKL for an accelerator, and run it.

    RBLN_VAE_DEBUG=1 shows where an error comes from.
    """


@app.command("compile")
@grouped(settings=[*COMPILING, *TUNING], where=WHERE)
def compile_(
    model: Model,
    out_directory: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The directory to write to.", file_okay=False, show_default=False
        ),
    ],
    settings: dict[str, Any],
    where: dict[str, Any],
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Leave the encoder out.")
    ] = False,
) -> None:
    """Compile MODEL and keep the result in OUT."""
    from ..hub import reach

    if decoder_only:
        settings["uses_encoder"] = False
    # Before the rest is loaded, which takes seconds: a name may well be mistyped.
    with working(f"Looking for {model} …"):
        reached = reach(model, where)
    from . import building

    building.compile_model(model, out_directory, settings, reached)


@app.command()
@grouped(settings=[*COMPILING, *RUNNING], where=WHERE)
def reconstruct(
    *,
    images: Images,
    model: ModelOption = None,
    output: Output = Path(),
    size: Size = None,
    fit: Fit = "pad",
    settings: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Encode and decode pictures, and show what is lost.

    Writes NAME.reconstruction.png, with both side by side, for each.
    """
    from . import pictures

    pictures.reconstruct(images, model, output, size, fit, settings, **where)


@app.command()
@grouped(settings=[*COMPILING, *RUNNING], where=WHERE)
def encode(
    *,
    images: Images,
    model: ModelOption = None,
    output: Output = Path(),
    size: Size = None,
    fit: Fit = "pad",
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw from the distribution instead of its mean.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="For --sample; the same for each picture.", min=0, max=2**63 - 1)
    ] = 0,
    settings: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Encode pictures or videos to latents.

    Writes NAME.safetensors for each, with the tensor "latents" (1, C, H/f, W/f), unscaled; for a
    video (1, C, T, H/f, W/f).
    """
    from ..datasets.sources.files import VIDEO_SUFFIXES

    chosen = seed if sample else None
    clips = [path for path in images if path.suffix.lower().removeprefix(".") in VIDEO_SUFFIXES]
    if clips:
        from . import videos

        if len(clips) < len(images) or size is not None:
            raise typer.BadParameter("videos are encoded at their size, and without pictures")
        videos.encode(clips, model, output, settings, seed=chosen, **where)
        return
    from . import pictures

    pictures.encode(images, model, output, size, fit, settings, seed=chosen, **where)


@app.command()
@grouped(settings=[*COMPILING, *RUNNING], where=WHERE)
def decode(
    *,
    latents: Annotated[
        list[Path],
        typer.Argument(
            metavar="LATENTS... [VIDEO]",
            help="Files that encode wrote, or other .safetensors files of unscaled latents. Of a "
            "video one such file and what to write: a .mp4, .mov or .mkv, or pictures by their "
            "pattern, such as out/%05d.png.",
            dir_okay=False,
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    output: Output = Path(),
    fps: Annotated[float, typer.Option(help="Frames per second of a video.", min=0.01)] = 16.0,
    settings: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Decode latents to pictures, at the size of the original where that is known.

    Writes NAME.decoded.png for each, or VIDEO, frame by frame as they are decoded.
    """
    from ..videos import is_video

    *files, last = latents
    files = files if is_video(last) else latents
    for path in files:
        if not path.is_file():
            raise typer.BadParameter(f"File '{path}' does not exist.", param_hint="LATENTS")
    if is_video(last):
        from . import videos

        if len(files) != 1:
            raise typer.BadParameter(f"{last} is written from one file of latents")
        if output != Path():
            raise typer.BadParameter(
                f"{last} says where the video is written. Leave --output out, or name the video "
                f"{output / last.name}."
            )
        videos.decode(files[0], last, model, settings, fps=fps, **where)
        return
    from . import pictures

    pictures.decode(latents, model, output, settings, **where)


@app.command("encode-dataset")
@grouped(
    kept=options_of(Options, leave=["sizes"]),
    settings=[*COMPILING, MEMORY_LIMIT],
    where=WHERE_BESIDE_SOURCE,
)
def encode_dataset(
    *,
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images; .tar or .parquet files, a folder of these or a pattern; a "
            "data set that datasets saved, or with --kind huggingface one on the hub. Local, or "
            "an address that fsspec opens.",
            show_default=False,
        ),
    ],
    out_directory: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The directory to write to. What is there of the same job is gone on with.",
            file_okay=False,
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Pixels of each image, one side or height and width. By default 512.",
            show_default=False,
        ),
    ] = None,
    buckets: Annotated[
        str | None,
        typer.Option(
            metavar="N,N...",
            help="Several sizes; an image gets the largest that it needn't be enlarged for.",
            show_default=False,
        ),
    ] = None,
    kept: dict[str, Any],
    max_rejected: Annotated[
        int, typer.Option(help="How many may be rejected; beyond it the exit code is 1.", min=0)
    ] = 0,
    kind: Annotated[
        Literal["auto", "folder", "webdataset", "parquet", "huggingface"],
        typer.Option(help="What SOURCE is."),
    ] = "auto",
    image_column: Annotated[
        str | None,
        typer.Option(help="By default image or the like.", show_default=False),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(help="By default caption, text or the like.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a Hugging Face data set.")] = "train",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Threads that read and decode images; with --ray, actors with an encoder each.",
            min=1,
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of an encoder. By default one for each core, and 1 with --ray.",
            min=1,
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Work on a Ray cluster: its address, auto, or local for one on this machine.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, and about how long it takes."),
    ] = False,
    settings: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Encode all images of SOURCE to latents for training, in shards or in a trainer's cache.

    A run that ends early, in whatever way, is gone on with by the same command.
    """
    from . import datasets

    datasets.encode(
        source,
        out_directory,
        model,
        Options(sizes=datasets.sizes_of(size, buckets), **kept),
        max_rejected=max_rejected,
        workers=workers,
        threads=threads,
        ray=ray,
        settings=settings,
        naming={
            "kind": kind,
            "image_column": image_column,
            "caption_column": caption_column,
            "split": split,
            **where,
        },
        dry_run=dry_run,
    )


@app.command()
def inspect(
    directory: Compiled,
    size: ModelSize = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the operations.")] = False,
) -> None:
    """Show what a compiled model is made of, and from."""
    from . import building

    building.inspect_model(directory, size, graph)


@app.command()
@grouped(settings=RUNNING, where=WHERE)
def verify(
    *,
    directory: Compiled,
    model: Model,
    size: Size = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="A picture to compare on. By default noise.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="The largest relative L2 error that passes. By default 1e-4, or 0.03 for "
            "bfloat16.",
            min=0,
            show_default=False,
        ),
    ] = None,
    settings: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Compare a compiled model with diffusers in float32; exit 1 if they differ too much."""
    from . import building

    building.verify_model(
        directory,
        model,
        size,
        image,
        tolerance,
        settings,
        **where,
    )


@app.command()
@grouped(settings=RUNNING)
def profile(
    *,
    directory: Compiled,
    size: ModelSize = None,
    batch_size: ModelBatch = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="A file for the trace, which Perfetto opens.", dir_okay=False),
    ] = None,
    settings: dict[str, Any],
) -> None:
    """Show the time of every operation, its speed, and its share of the machine's limit."""
    from . import profiling

    profiling.profile_model(directory, size, batch_size, trace, settings)


@app.command()
@grouped(settings=RUNNING)
def plan(
    *,
    directory: Compiled,
    size: ModelSize = None,
    batch_size: ModelBatch = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames of a video. By default an image.", min=1, show_default=False),
    ] = None,
    steps: Annotated[bool, typer.Option("--steps", help="List the steps of the run.")] = False,
    settings: dict[str, Any],
) -> None:
    """Show the memory and the work that an image takes, and what less memory would cost.

    With --frames it shows what a video takes, decoded and encoded frame by frame.
    """
    from . import planning

    planning.describe_model(directory, size, batch_size, steps, settings, frames)


@app.command()
@grouped(
    address=options_of(Address),
    batching=options_of(BatcherOptions, leave=["max_wait"], texts=["memory_limit"]),
    limits=options_of(Limits, leave=["api_key"], texts=["max_body"]),
    settings=[*COMPILING, THREADS],
    where=WHERE,
)
def serve(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME=]MODEL",
            help="A compiled model, a diffusers one, which is compiled in memory, or a pipeline "
            "with either. By default the small one that comes with the package. NAME is what "
            "requests call it; by default the last part of MODEL.",
            show_default=False,
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            help="A further model, which requests choose with ?model=NAME. Can be given again.",
            show_default=False,
        ),
    ] = None,
    address: dict[str, Any],
    batching: dict[str, Any],
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a request waits for others to join it.", min=0)
    ] = 1000 * BatcherOptions.max_wait,
    run_timeout: Annotated[
        float, typer.Option(help="Seconds that one run may take.", min=0.001)
    ] = RUN_TIMEOUT,
    limits: dict[str, Any],
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="RBLN_VAE_API_KEY",
            help="What clients must show. The variable keeps it out of the list of processes.",
            show_default=False,
        ),
    ] = None,
    settings: dict[str, Any],
    where: dict[str, Any],
) -> None:
    """Serve models over HTTP, to diffusers' remote_decode and remote_encode and to browsers."""
    from . import serving

    serving.serve(
        [*([] if model is None else [model]), *(models or [])],
        {**settings, "timeout": run_timeout},
        where=where,
        address=Address(**address),
        batching={**batching, "max_wait": max_wait_ms / 1000},
        limits={**limits, "api_key": api_key},
    )


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them.")] = False,
) -> None:
    """Show the compiled models that are kept so that the next start needn't compile them.

    The least recently used are removed beyond 10 GiB. RBLN_VAE_CACHE names another directory
    than ~/.cache/rbln-vae; off keeps none.
    """
    from . import building

    building.show_cache(clear)


@app.command()
def targets() -> None:
    """Show what this machine can run, and why not the rest."""
    from . import building

    building.show_targets()


def main() -> None:
    """Run the command that the arguments name, and exit."""
    app(prog_name="rbln-vae")
