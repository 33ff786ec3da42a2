"""The commands, their options and their help; what they do is in the modules beside.

Those load torch and are imported only by the command that runs, so that help and
completion are quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    Compiled,
    Dtype,
    Fit,
    Images,
    MemoryLimit,
    Model,
    ModelBatch,
    ModelOption,
    ModelSize,
    Output,
    Revision,
    Size,
    Subfolder,
    Target,
    Threads,
    given,
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
def compile_(
    model: Model,
    out_directory: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The directory to write to.", file_okay=False, show_default=False
        ),
    ],
    target: Target = None,
    dtype: Dtype = None,
    sample_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW", help="The image size to tune for, in pixels.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="The batch to tune for.", min=1)] = 1,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Leave the encoder out.")
    ] = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Compile MODEL and keep the result in OUT."""
    from ..hub import reach
    from ..sizes import parse_size

    settings = given(target=target, dtype=dtype, batch_size=batch_size)
    if sample_size is not None:
        settings["sample_size"] = parse_size(sample_size)
    if decoder_only:
        settings["uses_encoder"] = False
    # Before the rest is loaded, which takes seconds: a name may well be mistyped.
    with working(f"Looking for {model} …"):
        where = reach(model, given(subfolder=subfolder, revision=revision))
    from . import building

    building.compile_model(model, out_directory, settings, where)


@app.command()
def reconstruct(
    images: Images,
    model: ModelOption = None,
    output: Output = Path(),
    size: Size = None,
    fit: Fit = "pad",
    target: Target = None,
    dtype: Dtype = None,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Encode and decode pictures, and show what is lost.

    Writes NAME.reconstruction.png, with both side by side, for each.
    """
    from . import pictures

    settings = given(target=target, dtype=dtype, num_threads=threads, memory_limit=memory_limit)
    pictures.reconstruct(
        images, model, output, size, fit, settings, subfolder=subfolder, revision=revision
    )


@app.command()
def encode(
    images: Images,
    model: ModelOption = None,
    output: Output = Path(),
    size: Size = None,
    fit: Fit = "pad",
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw from the distribution instead of its mean.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For --sample; the same for each picture.")] = 0,
    target: Target = None,
    dtype: Dtype = None,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Encode pictures to latents.

    Writes NAME.safetensors for each, with the tensor "latents" (1, C, H/f, W/f), unscaled.
    """
    from . import pictures

    settings = given(target=target, dtype=dtype, num_threads=threads, memory_limit=memory_limit)
    pictures.encode(
        images,
        model,
        output,
        size,
        fit,
        settings,
        seed=seed if sample else None,
        subfolder=subfolder,
        revision=revision,
    )


@app.command()
def decode(
    latents: Annotated[
        list[Path],
        typer.Argument(
            metavar="LATENTS...",
            help="Files that encode wrote, or other .safetensors files of unscaled latents.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    output: Output = Path(),
    target: Target = None,
    dtype: Dtype = None,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Decode latents to pictures, at the size of the original where that is known.

    Writes NAME.decoded.png for each.
    """
    from . import pictures

    settings = given(target=target, dtype=dtype, num_threads=threads, memory_limit=memory_limit)
    pictures.decode(latents, model, output, settings, subfolder=subfolder, revision=revision)


@app.command("encode-dataset")
def encode_dataset(
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
    aspect: Annotated[
        bool,
        typer.Option("--aspect", help="Add rectangles of about the area of each size."),
    ] = False,
    bucket_step: Annotated[
        int, typer.Option(help="What their sides are multiples of, in pixels.", min=1)
    ] = 64,
    max_aspect: Annotated[
        float, typer.Option(help="Their longer side over the shorter, at most.", min=1)
    ] = 2.0,
    crop: Annotated[
        Literal["center", "random"], typer.Option(help="What is cut off, by --seed if random.")
    ] = "center",
    no_prescale: Annotated[
        bool,
        typer.Option("--no-prescale", help="Decode JPEGs whole, however large they are."),
    ] = False,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Keep a drawn latent instead of mean and log-variance."),
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Encode the mirrored image, too.")] = False,
    scale: Annotated[
        bool, typer.Option("--scale", help="Apply scaling_factor and shift_factor to latents.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of --sample and --crop random.")] = 0,
    latent_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="How latents are kept.")
    ] = "float16",
    format_: Annotated[
        Literal["safetensors", "webdataset", "parquet"],
        typer.Option("--format", help="Of the shards."),
    ] = "safetensors",
    shard_size: Annotated[int, typer.Option(help="The most samples of a shard.", min=1)] = 256,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images of a run. By default what the model is compiled for.",
            min=1,
            show_default=False,
        ),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Images of more pixels are rejected.", min=1)
    ] = 100_000_000,
    min_side: Annotated[
        int, typer.Option(help="Images with a side of fewer pixels are rejected.", min=1)
    ] = 32,
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
    target: Target = None,
    dtype: Dtype = None,
    memory_limit: MemoryLimit = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Encode all images of SOURCE to latents, in shards for training.

    A run that ends early, in whatever way, is gone on with by the same command.
    """
    from ..datasets import Options
    from . import datasets

    options = Options(
        sizes=datasets.sizes_of(size, buckets),
        aspect=aspect,
        bucket_step=bucket_step,
        max_aspect=max_aspect,
        crop=crop,
        prescale=not no_prescale,
        sample=sample,
        flip=flip,
        scale=scale,
        seed=seed,
        latent_dtype=latent_dtype,
        format=format_,
        shard_size=shard_size,
        batch_size=batch_size,
        max_pixels=max_pixels,
        min_side=min_side,
    )
    datasets.encode(
        source,
        out_directory,
        model,
        options,
        max_rejected=max_rejected,
        workers=workers,
        threads=threads,
        ray=ray,
        settings=given(target=target, dtype=dtype, memory_limit=memory_limit),
        naming={
            "kind": kind,
            "image_column": image_column,
            "caption_column": caption_column,
            "split": split,
            "subfolder": subfolder,
            "revision": revision,
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
def verify(
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
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Compare a compiled model with diffusers in float32; exit 1 if they differ too much."""
    from . import building

    settings = given(num_threads=threads, memory_limit=memory_limit)
    building.verify_model(
        directory,
        model,
        size,
        image,
        tolerance,
        settings,
        subfolder=subfolder,
        revision=revision,
    )


@app.command()
def profile(
    directory: Compiled,
    size: ModelSize = None,
    batch_size: ModelBatch = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="A file for the trace, which Perfetto opens.", dir_okay=False),
    ] = None,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Show the time of every operation, its speed, and its share of the machine's limit."""
    from . import profiling

    settings = given(num_threads=threads, memory_limit=memory_limit)
    profiling.profile_model(directory, size, batch_size, trace, settings)


@app.command()
def plan(
    directory: Compiled,
    size: ModelSize = None,
    batch_size: ModelBatch = None,
    steps: Annotated[bool, typer.Option("--steps", help="List the steps of the run.")] = False,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Show the memory and the work that an image takes, and what less memory would cost."""
    from . import planning

    settings = given(num_threads=threads, memory_limit=memory_limit)
    planning.describe_model(directory, size, batch_size, steps, settings)


@app.command()
def serve(
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
    host: Annotated[str, typer.Option(help="The interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.", min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(help="The most images that run together.", min=1)] = 8,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a request waits for others to join it.", min=0)
    ] = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="The most memory that all runs together may take besides the weights, such as "
            "2GiB: activations, scratch memory of their threads, and the results. By default "
            "half of the memory of the device.",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        float,
        typer.Option(
            help="How much may wait, in images of the size that the model was compiled for; "
            "beyond it the answer is 429."
        ),
    ] = 32,
    concurrency: Annotated[int, typer.Option(help="Runs at once.", min=1)] = 1,
    threads: Threads = None,
    run_timeout: Annotated[
        float, typer.Option(help="Seconds that one run may take.", min=0.001)
    ] = 120,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="RBLN_VAE_API_KEY",
            help="What clients must show. The variable keeps it out of the list of processes.",
            show_default=False,
        ),
    ] = None,
    max_body: Annotated[str, typer.Option(help="The largest body.")] = "64MiB",
    max_pixels: Annotated[
        int, typer.Option(help="The most pixels of a request.", min=1)
    ] = 16_777_216,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds in which a body must arrive.", min=0.001)
    ] = 30,
    grace: Annotated[
        float, typer.Option(help="Seconds to finish what was admitted, after SIGTERM.", min=0)
    ] = 120,
    target: Target = None,
    dtype: Dtype = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
) -> None:
    """Serve models over HTTP, to diffusers' remote_decode and remote_encode and to browsers."""
    from . import serving

    serving.serve(
        model,
        models or [],
        given(target=target, dtype=dtype, num_threads=threads, timeout=run_timeout),
        given={"subfolder": subfolder, "revision": revision},
        host=host,
        port=port,
        grace=grace,
        memory_limit=memory_limit,
        max_body=max_body,
        batching={
            "max_batch": max_batch,
            "max_wait": max_wait_ms / 1000,
            "queue": queue,
            "concurrency": concurrency,
        },
        limits={
            "max_pixels": max_pixels,
            "body_timeout": body_timeout,
            "api_key": api_key,
        },
    )


@app.command()
def targets() -> None:
    """Show what this machine can run, and why not the rest."""
    from . import building

    building.show_targets()


def main() -> None:
    """Run the command that the arguments name, and exit."""
    app(prog_name="rbln-vae")
