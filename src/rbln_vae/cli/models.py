"""Models by the name that a user gives, and what the commands ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from ..hub import find_vae
from ..models import opening
from ..models.auto import class_of
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.family import ImageShape
from ..sizes import parse_size
from .terminal import working


def open_model(
    name: str | None, settings: Mapping[str, Any], **loading: Any
) -> RBLNAutoencoderModel:
    """As `opening.open_model`, and say so meanwhile."""
    with working(f"Loading {name or 'the shipped model'} …"):
        return opening.open_model(name, settings, **loading)


def open_reference(name: str, **loading: Any) -> torch.nn.Module:
    """The same model in diffusers and float32, ready to run.

    Args:
        name: A directory, a hub id or a .safetensors file, of a VAE or of a pipeline.
        **loading: `subfolder`, `revision` and `kind`.
    """
    with working(f"Loading {name} in diffusers …"):
        where = find_vae(name, **loading)
        model = class_of(name, where).family.load_original(name, **where)
    return cast(torch.nn.Module, model).float().eval()


@torch.no_grad()
def original_moments(vae: torch.nn.Module, sample: torch.Tensor, *, frames: bool) -> torch.Tensor:
    """The result of the encoder of a diffusers model: moments, or latents.

    Args:
        vae: The model.
        sample: Images `(N, C, H, W)`.
        frames: Whether the model takes an axis of frames.
    """
    output = cast(Any, vae).encode(sample.unsqueeze(2) if frames else sample)
    distribution = getattr(output, "latent_dist", None)
    found = output.latents if distribution is None else distribution.parameters
    return cast(torch.Tensor, found.squeeze(2) if frames else found)


@torch.no_grad()
def original_pixels(vae: torch.nn.Module, latents: torch.Tensor, *, frames: bool) -> torch.Tensor:
    """The images `(N, C, H, W)` that a diffusers model decodes from latents `(N, C, h, w)`.

    Latents are not quantised, which a VQModel does in `decode` unless told otherwise. Each is a
    clip of one frame to a decoder of clips.
    """
    model = cast(Any, vae)
    if type(vae).__name__ == "VQModel":
        spatial = latents if model.config.norm_type == "spatial" else None
        return cast(torch.Tensor, model.decoder(model.post_quant_conv(latents), spatial))
    clips = {"num_frames": 1} if type(vae).__name__ == "AutoencoderKLTemporalDecoder" else {}
    found = model.decode(latents.unsqueeze(2) if frames else latents, **clips).sample
    return cast(torch.Tensor, found.squeeze(2) if frames else found)


def input_shapes(
    vae: RBLNAutoencoderModel, size: str | None, batch_size: int | None
) -> dict[str, ImageShape]:
    """The shape of the input of each compiled part, by its name.

    Args:
        vae: A compiled model.
        size: Of the image, as `parse_size` takes it; `None` is the model's own.
        batch_size: `None` is the model's own.
    """
    return vae.resolved_config.input_shapes(None if size is None else parse_size(size), batch_size)
