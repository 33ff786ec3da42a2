"""The models that are measured: full-size autoencoders with random weights, and their inputs."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rbln_vae.models.auto import class_for
from rbln_vae.sizes import Size

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True)
class Model:
    """An architecture.

    Attributes:
        class_name: Of diffusers.
        architecture: Arguments of that class; what is missing has its default.
    """

    class_name: str
    architecture: Mapping[str, Any]


def _plain(channels: tuple[int, ...] = (128, 256, 512, 512), **options: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": (_DOWN,) * len(channels),
        "up_block_types": (_UP,) * len(channels),
        "norm_num_groups": 32,
        "sample_size": 512,
        **options,
    }


MODELS: dict[str, Model] = {
    "sd": Model("AutoencoderKL", _plain(latent_channels=4)),
    "flux2": Model("AutoencoderKLFlux2", _plain(latent_channels=32, sample_size=1024)),
    "qwen-image": Model("AutoencoderKLQwenImage", {}),
    "qwen-image-2.1": Model("AutoencoderKLQwenImage21", {}),
    "wan": Model("AutoencoderKLWan", {}),
    "wan2.2": Model(
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
    ),
    "svd": Model(
        "AutoencoderKLTemporalDecoder",
        {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "down_block_types": (_DOWN,) * 4,
            "sample_size": 768,
        },
    ),
    "taesd": Model("AutoencoderTiny", {}),
    "asymmetric": Model(
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": (_DOWN,) * 4,
            "down_block_out_channels": (128, 256, 512, 512),
            "layers_per_down_block": 2,
            "up_block_types": (_UP,) * 4,
            "up_block_out_channels": (256, 512, 1024, 1024),
            "layers_per_up_block": 5,
            "sample_size": 512,
        },
    ),
    "hunyuan-image": Model(
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "layers_per_block": 2,
            "spatial_compression_ratio": 32,
            "sample_size": 384,
            "scaling_factor": 0.75289,
        },
    ),
    "movq": Model(
        "VQModel",
        {
            **_plain((128, 256, 256, 512), latent_channels=4),
            "down_block_types": (_DOWN, _DOWN, _DOWN, "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", _UP, _UP, _UP),
            "num_vq_embeddings": 16384,
            "norm_type": "spatial",
        },
    ),
}
"""Stable Diffusion 1 and 2, FLUX.2, Qwen-Image, Qwen-Image-2.1, Wan 2.1, Wan 2.2's small model,
Stable Video Diffusion, TAESD, the asymmetric autoencoder for twice the width, HunyuanImage 2.1 and
Kandinsky 2.2."""


def make_model(directory: Path, model: Model = MODELS["sd"]) -> None:
    """Save a model with random weights, the same each time.

    Weights have the variance that keeps the spread of noise, and norms scale by one.
    """
    import diffusers

    with torch.device("meta"):
        made = getattr(diffusers, model.class_name)(**model.architecture)
    made.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        if name.endswith("bias"):
            weight.uniform_(-0.1, 0.1, generator=generator)
        elif name.endswith("weight") and weight.dim() > 1:
            # Of three frames, all but the last are zeros where there is but one.
            fan = (weight[0, :, -1] if weight.dim() == 5 else weight[0]).numel()
            weight.uniform_(-math.sqrt(3 / fan), math.sqrt(3 / fan), generator=generator)
        else:
            weight.fill_(1)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    made.save_pretrained(directory)


def load(directory: Path, **options: Any) -> Any:
    """The diffusers model of a directory; `options` are of its `from_pretrained`."""
    import diffusers

    return getattr(diffusers, _config(directory)["_class_name"]).from_pretrained(
        directory, **options
    )


def make_input(
    directory: Path, part: str, size: int | Size, images: int = 1, frames: int = 1
) -> torch.Tensor:
    """The input of a part of a model: random, the same each time.

    Args:
        directory: Of the model, original or compiled.
        part: `"decode"` or `"encode"`.
        size: Pixels a side, or height and width.
        images: How many. By default one.
        frames: Of each, for models of videos. By default one.
    """
    config = _config(directory)
    found = class_for(config["_class_name"], str(directory))
    facts = found.family.facts(config)
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(width)
    if part == "encode":
        axes = (frames,) if found.frames else ()
        shape = (images, facts["in_channels"], *axes, height, width)
        return torch.rand(shape, generator=generator) * 2 - 1
    factor = facts["vae_scale_factor"]
    axes = ((frames + 3) // 4,) if found.frames else ()
    cells = (*axes, height // factor, width // factor)
    return torch.randn(images, facts["latent_channels"], *cells, generator=generator)


def run(model: Any, part: str, inputs: torch.Tensor) -> torch.Tensor:
    """Decode or encode by a model, original or compiled: pixels, moments or latents."""
    if part == "decode":
        options: dict[str, Any] = {}
        if hasattr(model.config, "num_vq_embeddings"):
            options = {"force_not_quantize": True}
        if "num_frames" in inspect.signature(model.decode).parameters:  # one clip
            options = {"num_frames": len(inputs)}
        result: torch.Tensor = model.decode(inputs, **options, return_dict=False)[0]
        return result
    encoded = model.encode(inputs, return_dict=False)[0]
    return encoded.parameters if hasattr(encoded, "parameters") else encoded


def _config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config
