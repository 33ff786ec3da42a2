"""The small random models of most tests, and what measures against them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tiny_vaes
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, VQModel
from torch import Tensor

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.graph.capture import capture
from rbln_vae.graph.ir import Graph
from rbln_vae.metrics import relative_l2

TOLERANCE = 1e-4
"""The largest relative L2 error against diffusers in float32 that counts as equal."""


def make_vae(seed: int = 0, **options: Any) -> AutoencoderKL:
    """A diffusers model of 16 pixels a side, two blocks and 4 latent channels, unless told."""
    channels = tuple(options.pop("block_out_channels", (8, 16)))
    defaults: dict[str, Any] = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    found: AutoencoderKL = tiny_vaes.make("AutoencoderKL", seed, **{**defaults, **options})
    return found


def make_flux2(seed: int = 0, **options: Any) -> AutoencoderKLFlux2:
    """FLUX.2's autoencoder of 16 pixels a side, two blocks and 4 latent channels, unless told."""
    defaults: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    found: AutoencoderKLFlux2 = tiny_vaes.make(
        "AutoencoderKLFlux2", seed, **{**defaults, **options}
    )
    return found


def make_vq(seed: int = 0, **options: Any) -> VQModel:
    """A VQModel of 32 pixels a side, two blocks, and 16 vectors of 4 channels, unless told.

    Its norm is spatial, which takes 32 groups.
    """
    defaults: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "norm_type": "spatial",
        "sample_size": 32,
    }
    found: VQModel = tiny_vaes.make("VQModel", seed, **{**defaults, **options})
    return found


@functools.cache
def default_vae() -> AutoencoderKL:
    """One model for all tests that need any; not to be written to."""
    return make_vae()


@functools.cache
def default_compiled() -> RBLNAutoencoderKL:
    """`default_vae` compiled in float32; not to be written to."""
    return compile_vae(default_vae())


def compile_vae(vae: AutoencoderKL, **options: Any) -> RBLNAutoencoderKL:
    """Compile for the CPU in float32, unless told."""
    return RBLNAutoencoderKL.from_model(
        vae, rbln_config={"target": "cpu", "dtype": "float32", **options}
    )


def capture_part(vae: AutoencoderKL, part: str) -> Graph:
    """The graph of one part, before any pass."""
    channels = vae.config.in_channels if part == "encoder" else vae.config.latent_channels
    return capture(RBLNAutoencoderKL.family.module(vae, part), part, channels)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian noise that is the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def moments(vae: AutoencoderKL | RBLNAutoencoderKL, image: Tensor) -> Tensor:
    """What the encoder gives."""
    with torch.no_grad():
        return vae.encode(image).latent_dist.parameters


def pixels(vae: AutoencoderKL | RBLNAutoencoderKL, latent: Tensor) -> Tensor:
    """What the decoder gives."""
    with torch.no_grad():
        return vae.decode(latent).sample


def part_of(vae: AutoencoderKL | RBLNAutoencoderKL, part: str, image: Tensor) -> Tensor:
    """What the encoder or the decoder gives, by its name."""
    return moments(vae, image) if part == "encoder" else pixels(vae, image)


def assert_same_model(
    compiled: RBLNAutoencoderKL, vae: AutoencoderKL, tolerance: float = TOLERANCE
) -> None:
    """The compiled model gives what diffusers gives, both ways."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent = noise(1, vae.config.latent_channels, 5, 4, seed=1)
    assert relative_l2(pixels(compiled, latent), pixels(vae, latent)) <= tolerance
    if compiled.rbln_config.uses_encoder:
        image = noise(1, vae.config.in_channels, 5 * factor, 4 * factor, seed=2)
        assert relative_l2(moments(compiled, image), moments(vae, image)) <= tolerance


def save_vae(vae: AutoencoderKL, directory: Path) -> Path:
    """The model in diffusers' format."""
    vae.save_pretrained(directory)
    return directory
