"""The commands that work on pictures: reconstruct, encode and decode."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import atomic_path
from ..images import (
    FitMode,
    Fitting,
    check_takes_pictures,
    from_levels,
    load_image,
    side_by_side,
    to_levels,
    with_opacity,
)
from ..levels import sample_of
from ..metrics import SSIM_WINDOW, psnr, ssim
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.family import ENCODER
from ..models.latents import mode
from ..sizes import check_image_size, format_size, parse_size
from .models import open_model
from .terminal import for_each, out, table

LATENTS = "latents"
"""The name of the tensor in a file of latents."""

_FORMAT = "rbln-vae latents"


def reconstruct(
    images: Sequence[Path],
    model_name: str | None,
    output: Path,
    size: str | None,
    fit: FitMode,
    settings: Mapping[str, Any],
    **loading: Any,
) -> None:
    """Encode and decode each picture, write both side by side, print how close they are."""
    written = outputs(images, output, ".reconstruction.png")
    model, fitted = _open_for_images(model_name, size, fit, settings, loading)

    def work(path: Path) -> tuple[str, ...]:
        original, fitting = fitted(path)
        levels = with_opacity(to_levels(original), model.resolved_config.in_channels)
        start = time.perf_counter()
        latents = mode(model.encode_images(levels))
        middle = time.perf_counter()
        decoded = _decoded(model, latents)
        end = time.perf_counter()

        # Padding is easy to reconstruct, and nobody's picture.
        height, width = fitting.content
        shown = [x[:, :height, :width, :3].contiguous() for x in (levels, decoded)]
        pictures = zip(("original", "reconstruction"), map(from_levels, shown), strict=True)
        _save(side_by_side(dict(pictures)), written[path])
        sample, result = (sample_of(x.permute(0, 3, 1, 2)) for x in shown)
        similarity = ssim(result, sample) if min(height, width) >= SSIM_WINDOW else None
        return (
            path.name,
            format_size((height, width)),
            f"{psnr(result, sample):.2f}",
            "-" if similarity is None else f"{similarity:.4f}",
            milliseconds(middle - start),
            milliseconds(end - middle),
            str(written[path]),
        )

    columns = ("picture", "size", "PSNR dB", "SSIM", "encode ms", "decode ms", "written to")
    finish("Reconstructing", images, work, columns)


def encode(
    images: Sequence[Path],
    model_name: str | None,
    output: Path,
    size: str | None,
    fit: FitMode,
    settings: Mapping[str, Any],
    *,
    seed: int | None,
    **loading: Any,
) -> None:
    """Write the latents of each picture: the mean, or a sample if there is a seed."""
    written = outputs(images, output, ".safetensors")
    model, fitted = _open_for_images(model_name, size, fit, settings, loading)

    def work(path: Path) -> tuple[str, ...]:
        original, fitting = fitted(path)
        start = time.perf_counter()
        levels = with_opacity(to_levels(original), model.resolved_config.in_channels)
        encoded = model.encode_images(levels)
        if seed is None or isinstance(encoded, torch.Tensor):
            latents = mode(encoded)
        else:
            latents = encoded.sample(torch.Generator().manual_seed(seed))
        end = time.perf_counter()
        metadata = {
            "format": _FORMAT,
            "model": model_name or "the shipped model",
            "dtype": model.resolved_config.dtype_of(ENCODER),
            "scaling_factor": json.dumps(model.config.get("scaling_factor")),
            "shift_factor": json.dumps(model.config.get("shift_factor")),
            "drawn": f"sample, seed {seed}" if model.draws and seed is not None else "mean",
            "fitting": json.dumps(fitting.to_dict()),
        }
        with atomic_path(written[path]) as temporary:
            save_file({LATENTS: latents.contiguous()}, temporary, metadata)
        return (
            path.name,
            format_size(fitting.original),
            format_size(latents.shape),
            milliseconds(end - start),
            str(written[path]),
        )

    finish("Encoding", images, work, ("picture", "size", "latents", "ms", "written to"))


def decode(
    files: Sequence[Path],
    model_name: str | None,
    output: Path,
    settings: Mapping[str, Any],
    **loading: Any,
) -> None:
    """Write the picture of each file of latents."""
    written = outputs(files, output, ".decoded.png")
    model = open_model(model_name, settings, **loading)

    def work(path: Path) -> tuple[str, ...]:
        latents, fitting = read_latents(path)
        start = time.perf_counter()
        # The dtype of the file isn't that of the pixels.
        image = from_levels(_decoded(model, latents.float()))
        end = time.perf_counter()
        if fitting is not None:
            image = fitting.undo(image)
        _save(image, written[path])
        return (
            path.name,
            format_size(latents.shape),
            format_size((image.height, image.width)),
            milliseconds(end - start),
            str(written[path]),
        )

    finish("Decoding", files, work, ("latents", "shape", "size", "ms", "written to"))


def _decoded(model: RBLNAutoencoderModel, latents: torch.Tensor) -> torch.Tensor:
    """The picture of the latents of one, as levels.

    Raises:
        ValueError: It can't be shown.
    """
    finite = torch.ones(1, dtype=torch.bool)
    levels = model.decode_images(latents, finite=finite)
    if not finite.item():
        raise ValueError("the decoded image holds values that aren't finite")
    return levels


def read_tensor(path: Path) -> tuple[torch.Tensor, Mapping[str, str]]:
    """The latents in a file, and what else it says.

    Raises:
        ValueError: The file isn't one of latents.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            names, metadata = list(stored.keys()), stored.metadata() or {}
            if LATENTS not in names and len(names) != 1:
                raise ValueError(
                    f"{path}: expected a tensor named {LATENTS!r}, found {', '.join(names)}"
                )
            return stored.get_tensor(LATENTS if LATENTS in names else names[0]), metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from None


def read_latents(path: Path) -> tuple[torch.Tensor, Fitting | None]:
    """Latents `(1, C, h, w)` of one picture, and how it was fitted if `encode` wrote them.

    Raises:
        ValueError: The file isn't one of latents of a picture.
    """
    latents, metadata = read_tensor(path)
    if latents.ndim == 3:
        latents = latents.unsqueeze(0)
    if latents.ndim == 5 and latents.shape[2] == 1:  # of one frame
        latents = latents.squeeze(2)
    if latents.ndim != 4 or latents.shape[0] != 1:
        raise ValueError(
            f"{path}: expected the latents of one picture, (C, h, w), (1, C, h, w) or "
            f"(1, C, 1, h, w), found {tuple(latents.shape)}. Of a video, name what to write, too."
        )
    if metadata.get("format") != _FORMAT:
        return latents, None
    return latents, Fitting.from_dict(json.loads(metadata["fitting"]))


def _open_for_images(
    name: str | None,
    size: str | None,
    fit: FitMode,
    settings: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> tuple[RBLNAutoencoderModel, Callable[[Path], tuple[Image.Image, Fitting]]]:
    """The model, and what loads a picture as it takes it."""
    wanted = None if size is None else parse_size(size)
    model = open_model(name, settings, **loading)
    config = model.resolved_config
    check_takes_pictures(config.in_channels)
    multiple = config.vae_scale_factor
    if wanted is not None:
        check_image_size(wanted, multiple)

    def fitted(path: Path) -> tuple[Image.Image, Fitting]:
        image = load_image(path)
        fitting = Fitting.plan(
            (image.height, image.width), multiple=multiple, mode=fit, size=wanted
        )
        return fitting.apply(image), fitting

    return model, fitted


def outputs(inputs: Sequence[Path], output: Path, suffix: str) -> dict[Path, Path]:
    """Where the result of each input goes; the directory is made.

    Raises:
        ValueError: Two inputs would be written to one file.
    """
    written: dict[Path, Path] = {}
    for path in dict.fromkeys(inputs):
        target = output / f"{path.stem}{suffix}"
        for other, taken in written.items():
            if taken == target:
                raise ValueError(
                    f"{other} and {path} would both be written to {target}; give them in two calls"
                )
        written[path] = target
    output.mkdir(parents=True, exist_ok=True)
    return written


def finish(
    what: str,
    paths: Sequence[Path],
    work: Callable[[Path], tuple[str, ...]],
    columns: Sequence[str],
) -> None:
    """Do the work on each file, print a row for each, and fail if one did."""
    rows, complete = for_each(what, list(dict.fromkeys(paths)), work)
    if rows:
        result = table(*columns)
        for row in rows:
            result.add_row(*row)
        out().print(result)
    if not complete:
        raise typer.Exit(1)


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def milliseconds(seconds: float) -> str:
    """A time in milliseconds, as tables show it."""
    return f"{seconds * 1000:.1f}"
