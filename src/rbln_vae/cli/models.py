"""Models by the name that a user gives, and what the commands ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .. import RBLNAutoencoderKL
from ..hub import find_vae
from ..models import opening
from ..models.auto import class_of
from ..models.family import ImageShape
from ..sizes import parse_size
from .terminal import working


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
        where = find_vae(name, **loading)
        model = class_of(name, where).family.load_original(name, **where)
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


def input_shapes(
    vae: RBLNAutoencoderKL, size: str | None, batch_size: int | None
) -> dict[str, ImageShape]:
    """The shape of the input of each compiled part, by its name.

    Args:
        vae: A compiled model.
        size: Of the image, as `parse_size` takes it; `None` is the model's own.
        batch_size: `None` is the model's own.
    """
    return vae.resolved_config.input_shapes(None if size is None else parse_size(size), batch_size)
