"""`compile_pipeline`: puts compiled autoencoders in place of those of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from ..config import RBLNModelConfig
from ..errors import RBLNCompileError
from ..hub import DENOISERS
from .auto import class_for
from .base import Config, RBLNModel, split_options
from .family import CLASSES

PipelineType = TypeVar("PipelineType")


def compile_pipeline(
    pipe: PipelineType, *, rbln_config: Config = None, cache: bool = True, **kwargs: Any
) -> PipelineType:
    """Compile the VAE of a diffusers pipeline, and give the pipeline back.

    The compiled VAE takes the place of the original, whatever its name there (`vae`, `movq`,
    `vqvae`), also in the pipelines that a combined pipeline consists of. By default it is
    compiled for the device that its weights are on, and tuned for the size of image that the
    pipeline was trained on.

    Args:
        pipe: The pipeline, which is changed. Its models may be offloaded afterwards, not before.
        rbln_config: Options, as a dict or an instance of the configuration class.
        cache: Whether the result is kept on disk and taken from there the next time; see
            docs/pipelines.md. By default `True`.
        **kwargs: Options with the prefix `rbln_`, which win over `rbln_config`, as of
            `RBLNModel.from_model`.

    Returns:
        `pipe`.

    Raises:
        TypeError: It is no pipeline, or a name is unknown.
        ValueError: The VAE is compiled already, it is on a device that no target runs on, or
            an option is wrong.
        RBLNCompileError: There is no VAE of a class that can be compiled, it can't be
            compiled, or its weights are offloaded.
        RBLNTargetUnavailableError: This machine can't run the target.

    Example:
        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "stabilityai/stable-diffusion-xl-base-1.0"
        ... )  # doctest: +SKIP
        >>> pipe = rbln_vae.compile_pipeline(pipe, rbln_memory_limit="2GiB")  # doctest: +SKIP
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"compile_pipeline takes a diffusers pipeline, and got {type(pipe).__name__}. "
            "RBLNAutoencoder.from_model compiles a VAE alone."
        )
    options, rest = split_options(kwargs)
    compiled = []
    for name, vae in _originals(pipe).items():
        found = class_for(type(vae).__name__, name)
        wanted = found.configuration(rbln_config, options)
        wanted = _on_its_device(_of_its_size(wanted, pipe, found.family.facts(vae.config)), vae)
        compiled.append((vae, found.from_model(vae, rbln_config=wanted, cache=cache, **rest)))
    for each in _pipelines(pipe):
        for name, component in each.components.items():
            for original, model in compiled:
                if component is original:
                    setattr(each, name, model)
    return pipe


def _originals(pipe: Any) -> dict[str, Any]:
    """The autoencoders of a pipeline that can be compiled, by their names there."""
    components = pipe.components
    found = {name: part for name, part in components.items() if type(part).__name__ in CLASSES}
    if not found:
        for name, part in components.items():
            if isinstance(part, RBLNModel):
                raise ValueError(
                    f"The {name} of the pipeline is compiled already. Leave compile_pipeline out; "
                    f"pipe.{name}.with_runtimes(…) gives one that runs in another way."
                )
        classes = ", ".join(f"{name}: {type(part).__name__}" for name, part in components.items())
        raise RBLNCompileError(
            f"{type(pipe).__name__} has no autoencoder that can be compiled. These can: "
            f"{', '.join(CLASSES)}. It has {classes}."
        )
    return found


def _pipelines(pipe: Any) -> Iterator[Any]:
    """A pipeline, and those that it consists of."""
    from diffusers import DiffusionPipeline

    yield pipe
    for part in vars(pipe).values():
        if isinstance(part, DiffusionPipeline):
            yield from _pipelines(part)


def _of_its_size(wanted: RBLNModelConfig, pipe: Any, facts: dict[str, Any]) -> RBLNModelConfig:
    """The configuration, for the size that the denoiser was trained on unless it names one."""
    for name in DENOISERS:
        side = getattr(getattr(pipe, name, None), "config", {}).get("sample_size")
        if isinstance(side, int):
            return wanted.with_facts({"sample_size": side * facts["vae_scale_factor"]})
    return wanted


def _on_its_device(wanted: RBLNModelConfig, vae: Any) -> RBLNModelConfig:
    """The configuration, for the device of the original unless it names another or a target."""
    device = vae.device
    chosen = (wanted.target, wanted.device, wanted.device_map)
    if device.type in ("cpu", "meta") or chosen != (None, None, None):
        return wanted
    if device.type != "cuda":
        raise ValueError(
            f"The {type(vae).__name__} of the pipeline is on {device}, which no target runs on. "
            "Pass rbln_target='cpu' to run it on the CPU."
        )
    return wanted.copy(device=str(device))
