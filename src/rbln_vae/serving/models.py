"""The models of a service, and what the other modules ask of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..models.autoencoder_kl import RBLNAutoencoderKL
from ..models.family import DECODER, ENCODER
from ..models.latents import LatentScaling
from ..models.opening import open_model
from ..targets.base import get_target
from ..targets.watch import ShouldStop

Shape = tuple[int, ...]

LONGEST_NAME = 100
"""Characters of the name of a model."""


@dataclass(frozen=True)
class ModelInfo:
    """What a client may know of a model, and what turns a request into a tensor.

    Attributes:
        name: What `?model=` says.
        parts: `"decoder"`, and `"encoder"` if it was compiled.
        in_channels: Channels of an image that is encoded.
        latent_channels: Channels of a latent.
        vae_scale_factor: Pixels per latent cell in a direction.
        sample_size: `(height, width)` that it was compiled for.
        scaling: What pipelines do to its latents.
        dtype: In what it computes.
        target: On what it runs.
    """

    name: str
    parts: tuple[str, ...]
    in_channels: int
    latent_channels: int
    vae_scale_factor: int
    sample_size: tuple[int, int]
    scaling: LatentScaling
    dtype: str
    target: str

    @classmethod
    def of(cls, name: str, vae: RBLNAutoencoderKL) -> ModelInfo:
        """What there is to know of a compiled model."""
        resolved = vae.resolved_config
        return cls(
            name=name,
            parts=resolved.parts,
            in_channels=resolved.in_channels,
            latent_channels=resolved.latent_channels,
            vae_scale_factor=resolved.vae_scale_factor,
            sample_size=resolved.sample_size,
            scaling=vae.latent_scaling,
            dtype=resolved.dtype,
            target=resolved.target,
        )

    def pixels(self, part: str, shape: Shape) -> int:
        """Pixels of all the images that an input of a part stands for."""
        count = shape[0] * math.prod(shape[2:])
        return count if part == ENCODER else count * self.vae_scale_factor**2


def named_models(texts: Iterable[str]) -> dict[str, str]:
    """Read `NAME=MODEL`, or just `MODEL`, which is named by the last part of its path.

    Names have no slashes, so `runs/lr=1/vae` is a model without a name. One in the working
    directory whose path has an equals sign is written `./lr=1`, or given a name: `vae=lr=1`.

    Args:
        texts: One or more, the default first.

    Returns:
        The models by name.

    Raises:
        ValueError: A name or a model is empty, two have one name, or a name is too long.

    Example:
        >>> named_models(["models/sdxl", "flux=black-forest-labs/FLUX.1-dev"])
        {'sdxl': 'models/sdxl', 'flux': 'black-forest-labs/FLUX.1-dev'}
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, model = text.strip().partition("=")
        if not equals or "/" in name:
            name, model = Path(text.strip()).name, text.strip()
        if not name or not model:
            raise ValueError(
                f"{text!r} lacks a name or a model: expected NAME=MODEL, such as sdxl=compiled-sdxl"
            )
        if len(name) > LONGEST_NAME:
            raise ValueError(
                f"the name {name!r} has {len(name)} characters, expected at most {LONGEST_NAME}; "
                "give a shorter one, as NAME=MODEL"
            )
        if name in named:
            raise ValueError(
                f"two models are named {name!r}, {named[name]} and {model}; give each a name of "
                "its own, as NAME=MODEL"
            )
        named[name] = model
    return named


class Runner(Protocol):
    """A model as the batcher sees it: tensors in, tensors out, at a price in memory."""

    @property
    def name(self) -> str:
        """What tells it from other models."""

    @property
    def exact_batches(self) -> bool:
        """Whether each sample of a batch gets the same bits as in a run of its own."""

    def memory_needed(self, part: str, shape: Shape) -> int:
        """Bytes that a run takes; may take seconds, and is called in threads."""

    def weight(self, part: str, shape: Shape) -> float:
        """How long a run takes, about, in images of the size that the model is tuned for."""

    def run(self, part: str, tensor: Tensor, should_stop: ShouldStop) -> Tensor:
        """Run a part; blocks, and several threads may call it.

        Args:
            part: Which part.
            tensor: Its input.
            should_stop: Whether nobody waits for the result any more; asked now and then.

        Raises:
            RBLNCancelledError: `should_stop` said so.
        """


class ServedModel:
    """A compiled model behind a name, shared by all requests."""

    def __init__(self, name: str, vae: RBLNAutoencoderKL) -> None:
        self.info = ModelInfo.of(name, vae)
        self._vae = vae

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def exact_batches(self) -> bool:
        return self._vae.exact_batches

    def memory_needed(self, part: str, shape: Shape) -> int:
        return self._vae.memory_needed(part, shape)

    def weight(self, part: str, shape: Shape) -> float:
        height, width = self.info.sample_size
        return self.info.pixels(part, shape) / (height * width)

    def run(self, part: str, tensor: Tensor, should_stop: ShouldStop) -> Tensor:
        vae: Any = self._vae
        latent_or_image: Tensor = (
            vae.decode(tensor, should_stop=should_stop).sample
            if part == DECODER
            else vae.encode(tensor, should_stop=should_stop).latent_dist.mode()
        )
        return latent_or_image


def open_models(
    named: Mapping[str, str | None],
    settings: Mapping[str, Any],
    memory_limit: int | None,
    **loading: str | None,
) -> tuple[list[ServedModel], int]:
    """Open the models of a service, and share the memory of their device among their runs.

    Args:
        named: The models by name, each as of `open_model`.
        settings: For `rbln_config`.
        memory_limit: The most bytes that all runs together may take; `None` is half of the
            memory of the device on which the models run: the other half is for weights, for
            what requests and answers hold, and for whoever else is there. Where they run on
            several, it is the least of these.
        **loading: `subfolder` and `revision`.

    Returns:
        The models, and the limit.
    """
    if settings.get("target") is not None:
        get_target(str(settings["target"])).require()  # before the work, not after it
    # Which target a model is for is known when it is there, and its runtimes need the limit.
    models = {
        name: open_model(model, {**settings, "create_runtimes": False}, **loading)
        for name, model in named.items()
    }
    if memory_limit is None:
        memory_limit = min(vae.usable_memory for vae in models.values()) // 2
    return [
        ServedModel(name, vae.with_runtimes(memory_limit=memory_limit))
        for name, vae in models.items()
    ], memory_limit
