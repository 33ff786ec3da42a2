"""The shapes of the published models' weights give their published configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from rbln_vae.models.architectures import find_configs

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SD and SDXL": ("AutoencoderKL", {"layers_per_block": 2}),
    "SD 3 and FLUX": (
        "AutoencoderKL",
        {
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "FLUX.2": ("AutoencoderKLFlux2", {}),
    "FLUX.2, small decoder": (
        "AutoencoderKLFlux2",
        {"decoder_block_out_channels": (96, 192, 384, 384)},
    ),
    "Wan 2.1": ("AutoencoderKLWan", {}),
    "Wan 2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
    "Qwen-Image": ("AutoencoderKLQwenImage", {}),
    "Qwen-Image-Layered": ("AutoencoderKLQwenImage", {"input_channels": 4}),
    "Qwen-Image-2.1": ("AutoencoderKLQwenImage21", {}),
    "TAESD": ("AutoencoderTiny", {}),
    "TAEF1": ("AutoencoderTiny", {"latent_channels": 16}),
    "HunyuanImage 2.1": (
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "layers_per_block": 2,
            "spatial_compression_ratio": 32,
            "sample_size": 384,
        },
    ),
    "asymmetric x2": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "down_block_out_channels": (128, 256, 512, 512),
            "layers_per_down_block": 2,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "up_block_out_channels": (256, 512, 1024, 1024),
            "layers_per_up_block": 5,
        },
    ),
    "MoVQ": (
        "VQModel",
        {
            "block_out_channels": (128, 256, 256, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
            "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 2,
            "latent_channels": 4,
            "vq_embed_dim": 4,
            "num_vq_embeddings": 16384,
            "norm_type": "spatial",
        },
    ),
}
FOUR_LEVELS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_recognised(model: str) -> None:
    name, options = PUBLISHED[model]
    if name == "AutoencoderKL":
        options = {**FOUR_LEVELS, **options}
    with torch.device("meta"):
        original = getattr(diffusers, name)(**options)
    configs = find_configs({k: tuple(v.shape) for k, v in original.state_dict().items()})
    config = configs[name]
    assert {k: normal(v) for k, v in config.items()} == {
        k: normal(original.config[k]) for k in config
    }
    untold = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size"}
    assert options.keys() - config.keys() <= untold


def normal(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
