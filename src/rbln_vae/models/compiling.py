"""From a diffusers model to its compiled parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RBLNModelConfig
from ..errors import RBLNCompileError
from ..targets.base import CompiledPart, CompileOptions, get_target
from ..targets.placement import check_placement, choose_target
from .cache import Cache, key_of
from .family import Family, ResolvedConfig


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model without its runtimes.

    Attributes:
        parts: The compiled parts by name.
        config: The configuration of the diffusers model.
        rbln_config: What the model was compiled for and how it runs, frozen.
        resolved_config: The same, with nothing left open.
        buffers: Those that `Family.buffers` names.
    """

    parts: Mapping[str, CompiledPart]
    config: Mapping[str, Any]
    rbln_config: RBLNModelConfig
    resolved_config: ResolvedConfig
    buffers: Mapping[str, torch.Tensor]


def compile_model(
    family: Family,
    model: torch.nn.Module,
    rbln_config: RBLNModelConfig,
    name: str,
    cache: Cache | None = None,
) -> CompiledModel:
    """Compile every part of a model, or read from a cache what was compiled before.

    Args:
        family: Of the model.
        model: The diffusers model. It is not changed.
        rbln_config: What the caller asks for.
        name: A path or an id, to be kept as what the model was compiled from.
        cache: Where compiled parts are looked for and kept. By default nowhere.

    Raises:
        ValueError: An option is in conflict with the model or the target.
        RBLNCompileError: The model can't be compiled, or its weights are elsewhere.
        RBLNTargetUnavailableError: This machine can't run the target.
    """
    given = getattr(model, "config", {})
    # As pipelines read it: setting an attribute of it leaves its items.
    config = {name: getattr(given, name, value) for name, value in given.items()}
    target = choose_target(rbln_config)
    rbln_config = rbln_config.copy(
        target=target.name, dtype=rbln_config.dtype or target.best_dtype()
    )
    resolved = resolve(family, rbln_config, config)
    check_placement(rbln_config, target, resolved.parts)
    if isinstance(rbln_config.dtype, dict):
        dtypes = {part: target.best_dtype() for part in resolved.parts} | rbln_config.dtype
        dtype = dtypes if len({*dtypes.values()}) > 1 else dtypes[resolved.parts[0]]
        rbln_config = rbln_config.copy(dtype=dtype)
        resolved = dataclasses.replace(resolved, dtype=dtype)
    if rbln_config.create_runtimes:
        target.require()  # before the work, not after it
    _check_weights(model)
    name = Path(name).name if Path(name).exists() else name
    found = settled(family, rbln_config, config, resolved)
    options = found.compiled_options()
    key = None if cache is None else key_of(model, name, config, options, target)
    if cache is None or key is None:
        parts = _compile_parts(family, model, resolved, found, name)
    elif not (parts := cache.load(key, target, resolved.parts)):
        parts = _compile_parts(family, model, resolved, found, name)
        cache.save(key, parts)
    state = model.state_dict()
    buffers = {name: state[name].detach().cpu().clone() for name in family.buffers(config)}
    return CompiledModel(parts, config, found, resolved, buffers)


def _compile_parts(
    family: Family,
    model: torch.nn.Module,
    resolved: ResolvedConfig,
    rbln_config: RBLNModelConfig,
    name: str,
) -> dict[str, CompiledPart]:
    target = get_target(resolved.target)
    source = {"model": name, "class": type(model).__name__, "sha256": _weights_hash(model)}
    parts = {}
    for part, shape in resolved.input_shapes().items():
        options = CompileOptions(
            shape,
            resolved.dtype_of(part),
            source,
            rbln_config.npu,
            rbln_config.num_devices,
            part,
        )
        module = family.video_module if resolved.videos else family.module
        parts[part] = target.compile_module(module(model, part), options)
    return parts


def _check_weights(model: torch.nn.Module) -> None:
    """Raise an `RBLNCompileError` if something else moves the weights of a model."""
    for name, module in model.named_modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or getattr(hooks, "hooks", None):
            raise RBLNCompileError(
                f"{name or type(model).__name__} has a hook of accelerate or diffusers, which "
                "moves or converts its weights. Compile the model first and offload the pipeline "
                "afterwards, or call pipe.remove_all_hooks() before compiling."
            )
    for name, weight in model.state_dict().items():
        if weight.is_meta:
            raise RBLNCompileError(
                f"{name} is on the meta device, which holds no values. Load the weights, for "
                "example by from_pretrained, before compiling."
            )


def resolve(
    family: Family, rbln_config: RBLNModelConfig, config: Mapping[str, Any]
) -> ResolvedConfig:
    """What a model is compiled for: the options, and for what they leave open its configuration.

    Args:
        family: Of the model.
        rbln_config: With a target and a dtype.
        config: Of the diffusers model.

    Raises:
        ValueError, TypeError: An option is in conflict with the model, the model has an
            invalid configuration, or neither says something that must be known.
    """
    facts = family.facts(config)
    for name, value in facts.items():
        chosen = rbln_config.fact(name)
        if chosen not in (None, value):
            raise ValueError(
                f"{rbln_config.fact_name(name)}={chosen} is in conflict with the model, which has "
                f"{value}. Leave it out."
            )
    facts["videos"] = _runs_videos(family, rbln_config)
    if family.clip_frames:
        chosen = rbln_config.fact("decode_chunk_size"), rbln_config.fact("num_frames")
        facts["decode_chunk_size"] = chosen[0] or chosen[1] or family.clip_frames
    facts["sample_size"] = rbln_config.image_size or family.sample_size(config)
    facts["uses_encoder"] = rbln_config.fact("uses_encoder") is not False
    checked = rbln_config.with_facts(facts)
    found: dict[str, Any] = {
        field.name: getattr(checked, field.name, facts.get(field.name, field.default))
        for field in dataclasses.fields(ResolvedConfig)
    }
    found["sample_size"] = checked.image_size
    found["decoder_scale_factor"] = facts.get("decoder_scale_factor", found["vae_scale_factor"])
    for name, value in found.items():
        if value in (None, dataclasses.MISSING):
            raise ValueError(f"The model has no {name}. Pass rbln_{name}.")
    return ResolvedConfig(**found)


def _runs_videos(family: Family, rbln_config: RBLNModelConfig) -> bool:
    """Whether a model is compiled for videos; `num_frames` says what is wanted.

    Raises:
        ValueError: Several frames are wanted, and only images can be run.
    """
    if family.clip_frames:
        return False
    wanted = rbln_config.fact("num_frames")
    static = get_target(str(rbln_config.target)).static_shapes
    if wanted not in (None, 1) and (static or not family.videos):
        reason = f"target {rbln_config.target!r}" if static else family.original_class_name
        raise ValueError(f"num_frames={wanted}: {reason} runs images of one frame. Leave it out.")
    return family.videos and wanted != 1 and not static


def settled(
    family: Family,
    rbln_config: RBLNModelConfig,
    config: Mapping[str, Any],
    resolved: ResolvedConfig,
) -> RBLNModelConfig:
    """The configuration of a compiled model: everything is filled in, and it is frozen."""
    found = rbln_config.with_facts({**family.facts(config), **dataclasses.asdict(resolved)})
    found.freeze()
    return found


def _weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        tensor = weight.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
