"""Tiny VAEs of every diffusers class that can be compiled, with weights of natural spread."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

_PLAIN: dict[str, Any] = {
    "block_out_channels": (4, 8, 8, 8),
    "down_block_types": (_DOWN,) * 4,
    "up_block_types": (_UP,) * 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": _PLAIN,
    "AutoencoderKLFlux2": {**_PLAIN, "latent_channels": 4},
    "AutoencoderKLQwenImage": {"base_dim": 4, "num_res_blocks": 1},
    "AutoencoderKLQwenImage21": {"base_dim": 4, "decoder_base_dim": 6, "num_res_blocks": 1},
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": (_DOWN,) * 4,
        "layers_per_block": 2,
        "sample_size": 64,
    },
    "AutoencoderKLWan": {"base_dim": 4, "num_res_blocks": 1},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    },
    "AsymmetricAutoencoderKL": {
        "down_block_types": (_DOWN,) * 4,
        "down_block_out_channels": (4, 8, 8, 8),
        "up_block_types": (_UP,) * 4,
        "up_block_out_channels": (8, 8, 16, 16),
        "layers_per_up_block": 2,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "sample_size": 64,
        "scaling_factor": 0.75,
    },
    "VQModel": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": (_DOWN, _DOWN, "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", _UP, _UP),
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "norm_type": "spatial",
    },
}
"""The configuration of each class. The scale factor is 8; it is 16 for
`AutoencoderKLQwenImage21`, and 4 for the last two, whose widths must be multiples of 32."""

WAN_2_2: dict[str, Any] = {
    "decoder_base_dim": 8,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
"""What tells Wan 2.2's `AutoencoderKLWan` from Wan 2.1's."""


def make(class_name: str = "AutoencoderKL", seed: int = 0, **options: Any) -> Any:
    """A VAE whose layers are scaled to give what trained ones do.

    Freshly made weights give flat images, norms that treat all channels alike, and attention
    that sees no difference between pixels, so that almost any mistake would go unseen.

    Args:
        class_name: Of diffusers, a key of `DEFAULTS`. By default `"AutoencoderKL"`.
        seed: Of the random weights. By default 0.
        **options: Of that class; they win over `DEFAULTS`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(diffusers, class_name)(**{**DEFAULTS[class_name], **options})
        model.eval().requires_grad_(False)
        if class_name == "AutoencoderKLFlux2":
            model.bn.running_mean.normal_(0, 0.5)
            model.bn.running_var.uniform_(0.3, 3)
        elif class_name == "VQModel":
            model.quantize.embedding.weight.normal_()
        _scale_to_natural_spread(model)
    return model


def _scale_to_natural_spread(model: Any) -> None:
    """Divide the weights of each layer by the spread of what it gives for noise.

    The weights of norms are random first.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
        elif hasattr(module, "gamma"):  # an RMS norm of diffusers
            module.gamma.uniform_(0.5, 1.5)
    last = None

    def divide(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        nonlocal last
        last = module
        spread = output.std().clamp(min=1e-6)
        for weight in module.parameters():
            weight.div_(spread)
        return output / spread

    kinds = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)
    hooks = [
        layer.register_forward_hook(divide) for layer in model.modules() if isinstance(layer, kinds)
    ]
    side = max(64, 2 ** len(model.config.get("block_out_channels", ())))  # of two cells or more
    _round_trip(model, torch.randn(image_shape(model, 2, side, side)))
    for hook in hooks:
        hook.remove()
    for name, module in model.named_modules():
        if name.endswith("to_q"):
            module.weight.mul_(2)  # attention then prefers some pixels to others
        elif name.endswith("to_qkv"):
            module.weight[: len(module.weight) // 3].mul_(2)
    # Within [-1, 1], so that nothing hides by being clipped.
    assert last is not None
    for weight in last.parameters():
        weight.mul_(0.3)
    if isinstance(model, diffusers.AutoencoderTiny):  # its last layer gives pixels in [0, 1]
        last.weight.mul_(0.5)
        last.bias.add_(0.5)


def image_shape(model: Any, batch: int, height: int, width: int) -> tuple[int, ...]:
    """The shape of images that a VAE encodes, with one frame where it has frames."""
    config = model.config
    channels = config.get("in_channels") or config.get("input_channels")
    if "z_dim" not in config:
        return (batch, channels, height, width)
    return (batch, channels // (config.get("patch_size") or 1) ** 2, 1, height, width)


def _round_trip(model: Any, image: Tensor) -> None:
    """Encode an image and decode it again, through every layer of the model."""
    encoded = model.encode(image)
    latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    more: dict[str, Any] = {}
    if isinstance(model, diffusers.AsymmetricAutoencoderKL):
        more = {"image": image, "mask": (image[:, :1] > 0).float()}
    elif isinstance(model, diffusers.AutoencoderKLTemporalDecoder):
        more = {"num_frames": len(latent)}
    model.decode(latent, **more)
