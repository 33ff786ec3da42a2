"""The commands about compiled models themselves: compile, inspect, verify, cache and targets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import typer

from .. import RBLNAutoencoder, hub
from ..artifact import SUFFIX, Artifact, read_artifact
from ..config import format_dtypes
from ..images import Fitting, load_image, to_tensor
from ..metrics import largest_error, psnr, relative_l2
from ..models.auto import class_of
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.cache import Cache
from ..models.family import DECODER, ENCODER, ResolvedConfig
from ..sizes import Size, check_image_size, format_size, parse_size
from ..targets.base import all_targets
from ..units import format_bytes
from .models import open_model, open_reference, original_moments, original_pixels
from .terminal import err, out, table, working

TOLERANCES = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.03}
"""The largest relative L2 error that `verify` lets pass, for each precision."""


def compile_model(
    model: str,
    directory: Path,
    settings: Mapping[str, Any],
    where: Mapping[str, Any],
) -> None:
    """Compile a model, save it, and print its parts.

    Args:
        model: A directory, a hub id or a .safetensors file, of a VAE or of a pipeline.
        directory: Where to save.
        settings: For `rbln_config`.
        where: What `hub.reach` says of the model.
    """
    options, loading = dict(settings), dict(where)
    start = time.perf_counter()
    with working(f"Compiling {model} …"):
        if "subfolder" not in loading:
            _find_in_pipeline(model, options, loading)
        compiled = RBLNAutoencoder.from_pretrained(
            model,
            export=True,
            rbln_config={**options, "create_runtimes": False},
            **loading,
        )
        compiled.save_pretrained(directory)
    _print_parts(directory, compiled.resolved_config)
    out().print(f"compiled to {directory} in {time.perf_counter() - start:.1f} s")


def _find_in_pipeline(model: str, options: dict[str, Any], loading: dict[str, Any]) -> None:
    """Point to the VAE of a pipeline, and to the size that the pipeline makes by default."""
    found = hub.find_pipeline(model, **hub.options(loading))
    if found is None:
        return
    loading["subfolder"], side = found
    if side is not None and "sample_size" not in options:
        family = class_of(model, loading).family
        config = family.original_class().load_config(model, **hub.options(loading))
        options["sample_size"] = side * family.facts(config)["vae_scale_factor"]


def inspect_model(directory: Path, size: str | None, graph: bool) -> None:
    """Print the parts of a compiled model, what it was compiled from, and its graphs."""
    model = RBLNAutoencoder.from_pretrained(directory, rbln_create_runtimes=False)
    pixels = None if size is None else parse_size(size)
    parts = _print_parts(directory, model.resolved_config, pixels)
    facts = table("compiled model", str(directory))
    for name, value in model.rbln_config.compiled_options().items():
        if isinstance(value, tuple):
            facts.add_row(name, format_size(value))
        elif value is not None:
            facts.add_row(name, format_dtypes(value) if name == "dtype" else str(value))
    for name, value in parts[0].source.items():
        facts.add_row(f"compiled from: {name}", value)
    facts.add_row("compiled by", f"rbln-vae {parts[0].version}")
    facts.columns[1].justify = "left"
    out().print(facts)
    if graph:
        for part in parts:
            out().print(str(part.graph), soft_wrap=True)


def _print_parts(
    directory: Path, resolved: ResolvedConfig, pixels: Size | None = None
) -> list[Artifact]:
    """Print a table of the parts of a compiled model, with the work for one image."""
    shapes = resolved.input_shapes(pixels, batch_size=1)
    files = {part: directory / f"{part}{SUFFIX}" for part in shapes}
    parts = [read_artifact(file) for file in files.values()]
    rows = table(
        "part",
        "target",
        "dtype",
        "file MB",
        "weights",
        "operations",
        f"GFLOP at {format_size(pixels or resolved.sample_size)}",
    )
    for part in parts:
        rows.add_row(
            part.part,
            part.target,
            part.dtype,
            f"{files[part.part].stat().st_size / 1e6:.2f}",
            f"{sum(weight.numel() for weight in part.graph.weights.values()):,}",
            str(len(part.graph.operations)),
            f"{part.graph.flops(shapes[part.part]) / 1e9:.1f}",
        )
    out().print(rows)
    return parts


def verify_model(
    directory: Path,
    model: str,
    size: str | None,
    image: Path | None,
    tolerance: float | None,
    settings: Mapping[str, Any],
    **loading: Any,
) -> None:
    """Compare a compiled model with diffusers, and exit with 1 if they differ too much."""
    compiled = open_model(str(directory), settings)
    reference = open_reference(model, **loading)
    config = compiled.resolved_config
    sample = _sample(config, size, image)

    results = table("", "PSNR dB", "largest error", "relative L2")
    wrong = ""
    for part, name, found, expected in _outcomes(compiled, reference, sample):
        # The peak of moments has no fixed range; that of pixels is 2.
        peak = 2.0 if part == DECODER else float(expected.max() - expected.min())
        limit = TOLERANCES[config.dtype_of(part)] if tolerance is None else tolerance
        error = relative_l2(found, expected)
        results.add_row(
            name,
            f"{psnr(found, expected, peak):.2f}",
            f"{largest_error(found, expected):.3g}",
            f"{error:.3g}",
        )
        if not error <= limit:
            wrong = f"the {name} by {error:.3g}, more than {limit:g} allows"
    out().print(results)
    if wrong:
        err().print(
            f"error: {directory} differs from {model} in {wrong}; was it compiled from these "
            "weights?"
        )
        raise typer.Exit(1)


def _sample(config: ResolvedConfig, size: str | None, image: Path | None) -> torch.Tensor:
    """What to compare on: a picture fitted to the size, or noise."""
    wanted = None if size is None else parse_size(size)
    multiple = config.vae_scale_factor
    if image is not None:
        picture = load_image(image)
        original = (picture.height, picture.width)
        fitting = Fitting.plan(original, multiple=multiple, size=wanted)
        return to_tensor(fitting.apply(picture))
    pixels = wanted or config.sample_size
    check_image_size(pixels, multiple)
    shape = (1, config.in_channels, *pixels)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _outcomes(
    compiled: RBLNAutoencoderModel, reference: torch.nn.Module, sample: torch.Tensor
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Each part, the name of its result, what it gives and what it should.

    Both decode the same latents.
    """
    with working("Encoding in diffusers …"):
        expected = original_moments(reference, sample, frames=compiled.frames)
    if compiled.resolved_config.uses_encoder:
        with working("Encoding …"):
            encoded = compiled.encode_images(sample)
        if isinstance(encoded, torch.Tensor):
            yield ENCODER, "latents", encoded, expected
        else:
            yield ENCODER, "moments", encoded.parameters, expected
    latents = expected.chunk(2, dim=1)[0] if compiled.draws else expected
    with working("Decoding in diffusers …"):
        pixels = original_pixels(reference, latents, frames=compiled.frames)
    with working("Decoding …"):
        result = compiled.decode_latents(latents)
    yield DECODER, "pixels", result, pixels


def show_cache(clear: bool) -> None:
    """Print what the cache of compiled models holds, or remove it."""
    cache = Cache.of_user()
    if cache is None:
        out().print("RBLN_VAE_CACHE is off: compiled models are not kept")
        return
    if clear:
        out().print(f"{cache.clear()} compiled models removed from {cache.directory}")
        return
    entries = cache.entries()
    rows = table("model", "class", "target", "dtype", "last used", "size")
    for column in rows.columns[:-1]:
        column.justify = "left"
    for entry in entries:
        key = {"model": f"damaged: {entry.directory.name}", "options": {}, **entry.key}
        rows.add_row(
            *(str(key.get(name, "")) for name in ("model", "class", "target")),
            format_dtypes(key["options"].get("dtype", "")),
            f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}",
            format_bytes(entry.size),
        )
    if entries:
        out().print(rows)
    size = format_bytes(sum(entry.size for entry in entries))
    of = f"{size} of {format_bytes(cache.limit)}"
    out().print(f"{len(entries)} compiled models in {cache.directory}, {of}")


def show_targets() -> None:
    """Print the targets, and what this machine and this build have for them."""
    rows = table("target", "runs here", "what it is")
    for column in rows.columns:
        column.justify = "left"
    for target in all_targets():
        reason = target.unavailable_reason()
        rows.add_row(target.name, "yes" if reason is None else f"no: {reason}", target.description)
    out().print(rows)
    for target in all_targets():
        for fact in target.facts():
            out().print(fact)
