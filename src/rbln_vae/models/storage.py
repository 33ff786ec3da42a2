"""A compiled model in a directory: how it is written, and checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..artifact import SUFFIX
from ..config import CONFIG_NAME, RBLNModelConfig
from ..errors import RBLNArtifactError
from ..files import replaced_files
from ..targets.base import CompiledPart, get_target
from ..targets.placement import check_placement
from .compiling import CompiledModel, resolve, settled
from .family import Family, ResolvedConfig, right_class

MODEL_CONFIG_NAME = "config.json"
BUFFERS_NAME = "buffers.safetensors"


def save_model(directory: Path, family: Family, model: CompiledModel) -> None:
    """Write a compiled model; see `RBLNModel.save_pretrained`.

    Args:
        directory: Made where missing.
        family: Of the model.
        model: The compiled model.

    Raises:
        RBLNArtifactError: The directory can't be written.
        NotADirectoryError: It is a file.
    """
    replaced = (MODEL_CONFIG_NAME, BUFFERS_NAME, f"*{SUFFIX}")
    try:
        with replaced_files(directory, replaced, marker=CONFIG_NAME) as temporary:
            for name, part in model.parts.items():
                part.save(temporary / f"{name}{SUFFIX}")
            stored = {k: v for k, v in model.config.items() if k != "_name_or_path"}
            stored["_class_name"] = family.original_class_name
            text = json.dumps(stored, indent=2, sort_keys=True) + "\n"
            (temporary / MODEL_CONFIG_NAME).write_text(text, encoding="utf-8")
            if model.buffers:
                save_file(dict(model.buffers), temporary / BUFFERS_NAME)
            model.rbln_config.save(temporary)
    except NotADirectoryError:
        raise
    except OSError as error:
        raise RBLNArtifactError(
            f"{directory} can't be written: {error}. Make room, or choose another directory."
        ) from error


def load_model(family: Family, directory: Path, wanted: RBLNModelConfig) -> CompiledModel:
    """Read what `save_model` wrote.

    Args:
        family: Of the model.
        directory: Where it is.
        wanted: What the caller asks for: options of the run, and perhaps others, which must
            be those that the model was compiled for.

    Raises:
        ValueError: The model was compiled for something else than was asked for.
        RBLNArtifactError: A file is missing or damaged, or the files don't belong together.
        RBLNTargetUnavailableError: This machine can't run the target.
    """
    given = wanted.given_options()
    run = {k: v for k, v in given.items() if k in wanted.options_of_run()}
    rbln_config = type(wanted).load(directory, **run)
    stored = rbln_config.compiled_options()
    for name, value in given.items():
        if name not in run and not _agrees(value, stored[name]):
            raise ValueError(
                f"{name}={value!r} was asked for, and {directory} was compiled with "
                f"{name}={stored[name]!r}. Leave it out, or compile the model again with "
                "export=True."
            )
    config = _model_config(directory, family.original_class_name)
    for name in ("target", "dtype"):
        if stored[name] is None:
            raise RBLNArtifactError(
                f"{directory / CONFIG_NAME} names no {name}. Compile the model again."
            )
    try:
        resolved = resolve(family, rbln_config, config)
    except (ValueError, TypeError) as error:
        raise RBLNArtifactError(
            f"{CONFIG_NAME} and {MODEL_CONFIG_NAME} in {directory} don't fit together: "
            f"{error} Save or compile the model again."
        ) from error
    target = get_target(resolved.target)
    check_placement(rbln_config, target, resolved.parts)
    if rbln_config.create_runtimes:
        target.require()
    parts = {part: target.load(directory / f"{part}{SUFFIX}") for part in resolved.parts}
    _check_parts(parts, resolved, directory)
    buffers = _load_buffers(directory / BUFFERS_NAME, family.buffers(config))
    return CompiledModel(
        parts, config, settled(family, rbln_config, config, resolved), resolved, buffers
    )


def _agrees(wanted: Any, stored: Any) -> bool:
    """Whether a value that was asked for, perhaps of some parts, is the one of a compiled model."""
    if not isinstance(wanted, dict):
        return bool(wanted == stored)
    found = stored if isinstance(stored, dict) else dict.fromkeys(wanted, stored)
    return found.items() >= wanted.items()


def _check_parts(
    parts: Mapping[str, CompiledPart], resolved: ResolvedConfig, directory: Path
) -> None:
    """Raise if the loaded parts are not those that the configuration describes."""
    shapes = resolved.input_shapes()
    one_source = len({compiled.source.get("sha256") for compiled in parts.values()}) == 1
    for part, compiled in parts.items():
        if not (
            one_source
            and compiled.part == part
            and compiled.dtype in (None, resolved.dtype_of(part))
            and compiled.in_channels in (None, shapes[part][1])
        ):
            raise RBLNArtifactError(
                f"{part}{SUFFIX} in {directory} doesn't belong to the files beside it: it holds "
                f"the {compiled.part} of {compiled.source.get('model', 'another model')} for "
                f"{compiled.in_channels} channels in {compiled.dtype}. Save the model again."
            )


def _load_buffers(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The buffers of a family that has any, which must be of these shapes and finite."""
    if not shapes:
        return {}
    try:
        buffers = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RBLNArtifactError(f"{file} can't be read: {error}. Save the model again.") from error
    if {k: tuple(v.shape) for k, v in buffers.items()} != shapes or not all(
        bool(buffer.isfinite().all()) for buffer in buffers.values()
    ):
        raise RBLNArtifactError(
            f"{file} doesn't hold the buffers that {MODEL_CONFIG_NAME} beside it describes: "
            f"{', '.join(shapes)}. Save the model again."
        )
    return buffers


def _model_config(directory: Path, class_name: str) -> dict[str, Any]:
    """The configuration of the original model that stands beside the compiled one."""
    file = directory / MODEL_CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RBLNArtifactError(
            f"There is no {file}. The compiled model is incomplete: save it again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise RBLNArtifactError(f"{file} is not JSON ({error}). Save the model again.") from None
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != class_name:
        raise RBLNArtifactError(
            f"{file} is the configuration of {found!r}, expected {class_name!r}. "
            f"{right_class(str(found))}"
        )
    return dict(config)
