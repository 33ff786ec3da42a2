"""Arguments and options that several commands have."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..config import RBLNAutoencoderKLConfig
from ..models.kinds import KINDS
from ..sizes import parse_size
from .groups import Group, option_of, parameter

Model = Annotated[
    str,
    typer.Argument(
        help="A diffusers autoencoder, or a pipeline with one: a directory, a hub id or a "
        ".safetensors file.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A compiled model, a diffusers one, which is compiled in memory, or a pipeline with "
        "either: a directory, a hub id or a .safetensors file. By default the small one that comes "
        "with the package.",
        show_default=False,
    ),
]
Compiled = Annotated[
    Path,
    typer.Argument(
        help="The directory of a compiled model.", exists=True, file_okay=False, show_default=False
    ),
]
Images = Annotated[
    list[Path],
    typer.Argument(
        metavar="IMAGE...",
        help="Pictures, of any kind that Pillow reads.",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="The directory to write to.", file_okay=False),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="N|HxW",
        help="Pixels, one side or height and width. By default what is nearest to the picture's.",
        show_default=False,
    ),
]
ModelSize = Annotated[
    str | None,
    typer.Option(
        metavar="N|HxW",
        help="The image size, in pixels. By default the model's own.",
        show_default=False,
    ),
]
ModelBatch = Annotated[
    int | None,
    typer.Option(help="Images at once. By default the model's own.", min=1, show_default=False),
]
Fit = Annotated[
    Literal["pad", "resize", "crop"],
    typer.Option(
        help="How a picture is fitted to the size: the rest filled, stretched, or cut to it."
    ),
]
_PLACE: Group = [
    parameter(
        "subfolder",
        str | None,
        None,
        typer.Option(
            help="Where the VAE is within MODEL, unless it is a pipeline.", show_default=False
        ),
    ),
    parameter(
        "revision",
        str | None,
        None,
        typer.Option(help="The revision of a model on the hub.", show_default=False),
    ),
]


def _kind(name: str) -> inspect.Parameter:
    return parameter(
        name,
        str | None,
        None,
        typer.Option(
            metavar="KIND",
            help=f"What model a .safetensors file belongs to: {', '.join(KINDS)}. By default "
            "unknown, and then the scaling of its latents is unknown, too.",
            show_default=False,
        ),
    )


WHERE: Group = [*_PLACE, _kind("kind")]
"""Where a model is, and what its file doesn't tell."""
WHERE_BESIDE_SOURCE: Group = [*_PLACE, _kind("model_kind")]
"""The same beside a source of images, whose kind has the name."""

COMPILING: Group = [
    option_of(RBLNAutoencoderKLConfig, "target"),
    option_of(RBLNAutoencoderKLConfig, "dtype"),
]
THREADS = option_of(RBLNAutoencoderKLConfig, "num_threads", int, "--threads")
MEMORY_LIMIT = option_of(RBLNAutoencoderKLConfig, "memory_limit")
RUNNING: Group = [THREADS, MEMORY_LIMIT]
TUNING: Group = [
    option_of(RBLNAutoencoderKLConfig, "sample_size", read=parse_size, metavar="N|HxW"),
    option_of(RBLNAutoencoderKLConfig, "batch_size", int),
]
