"""Models by the name that a user gives, and what the commands ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .. import RBLNAutoencoderKL, RBLNAutoencoderKLConfig
from ..config import CONFIG_NAME, check_image_size
from ..errors import RBLNArtifactError
from ..hub import find_vae
from ..models import opening
from ..models.family import DECODER, ENCODER
from ..sizes import parse_size
from .terminal import working

Option = TypeVar("Option")


def open_model(name: str | None, settings: Mapping[str, Any], **loading: Any) -> RBLNAutoencoderKL:
    """As `opening.open_model`, and say so meanwhile."""
    with working(f"Loading {name or 'the shipped model'} …"):
        return opening.open_model(name, settings, **loading)


def open_reference(name: str, **loading: Any) -> torch.nn.Module:
    """The same model in diffusers and float32, ready to run.

    Args:
        name: A directory, a hub id or a .safetensors file, of a VAE or of a pipeline.
        **loading: `subfolder` and `revision`.
    """
    with working(f"Loading {name} in diffusers …"):
        model = RBLNAutoencoderKL.family.load_original(name, **find_vae(name, **loading))
    return cast(torch.nn.Module, model).float().eval()


def encoded(
    vae: RBLNAutoencoderKL | torch.nn.Module, sample: torch.Tensor
) -> DiagonalGaussianDistribution:
    """The distribution of latents of a sample, by a model of either kind."""
    with torch.no_grad():
        return cast(DiagonalGaussianDistribution, cast(Any, vae).encode(sample).latent_dist)


def decoded(vae: RBLNAutoencoderKL | torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The sample that latents stand for, by a model of either kind."""
    with torch.no_grad():
        return cast(torch.Tensor, cast(Any, vae).decode(latents).sample)


def image_size(config: RBLNAutoencoderKLConfig) -> tuple[int, int]:
    """Height and width that a compiled model is tuned for."""
    return _known("sample_size", config.sample_size)


def scale_factor(config: RBLNAutoencoderKLConfig) -> int:
    """Pixels per latent cell of a compiled model."""
    return int(_known("vae_scale_factor", config.vae_scale_factor))


def in_channels(config: RBLNAutoencoderKLConfig) -> int:
    """Channels of the images of a compiled model."""
    return _known("in_channels", config.in_channels)


def input_shapes(
    config: RBLNAutoencoderKLConfig, size: str | None, batch_size: int | None
) -> dict[str, tuple[int, int, int, int]]:
    """The shape of the input of each compiled part, by its name.

    Args:
        config: Of a compiled model.
        size: Of the image, as `parse_size` takes it; `None` is the model's own.
        batch_size: `None` is the model's own.
    """
    pixels = image_size(config) if size is None else parse_size(size)
    batch, factor = batch_size or config.batch_size, scale_factor(config)
    check_image_size(pixels, factor)
    cells = pixels[0] // factor, pixels[1] // factor
    shapes = {DECODER: (batch, _known("latent_channels", config.latent_channels), *cells)}
    if config.uses_encoder:
        shapes = {ENCODER: (batch, in_channels(config), *pixels), **shapes}
    return shapes


def _known(name: str, value: Option | None) -> Option:
    """An option that compiling fills in, so that only a file changed by hand lacks it."""
    if value is None:
        raise RBLNArtifactError(f"{CONFIG_NAME} has no {name}; compile the model again")
    return value
