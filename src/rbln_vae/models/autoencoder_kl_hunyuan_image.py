"""`RBLNAutoencoderKLHunyuanImage`: the autoencoder of HunyuanImage 2.1.

Its blocks halve and double the image by moving pixels to channels and back, beside shortcuts
that average or repeat channels. Both sides read the same input, so a shortcut becomes a part of
the convolution beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RBLNAutoencoderKLHunyuanImageConfig
from ..sizes import check_image_size
from .autoencoder_kl import RBLNAutoencoderKL
from .family import ENCODER, Family
from .networks import (
    Attention,
    Layers,
    Shuffled,
    centred,
    conv2d,
    converted,
    means,
    repeats,
)


class AutoencoderKLHunyuanImageFamily(Family):
    """`AutoencoderKLHunyuanImage`: HunyuanImage 2.1."""

    original_class_name = "AutoencoderKLHunyuanImage"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("downsample_match_channel", "upsample_match_channel"):
            if config.get(name) is False:
                raise ValueError(
                    f"{name}=False: diffusers itself can't run such a model. Leave it out."
                )
        return {
            "in_channels": config.get("in_channels"),
            "out_channels": config.get("out_channels"),
            "latent_channels": config.get("latent_channels"),
            "vae_scale_factor": config.get("spatial_compression_ratio"),
        }

    def check_image_size(
        self, size: tuple[int, int], factor: int, config: Mapping[str, Any]
    ) -> None:
        check_image_size(size, factor)  # pixels move to channels

    def module(self, model: nn.Module, part: str) -> nn.Module:
        return _Encoder(model) if part == ENCODER else _Decoder(model)


class RBLNAutoencoderKLHunyuanImage(RBLNAutoencoderKL):
    """A compiled `AutoencoderKLHunyuanImage`, which stands wherever that of diffusers stands.

    Example:
        >>> vae = RBLNAutoencoderKLHunyuanImage.from_pretrained(
        ...     "hunyuanvideo-community/HunyuanImage-2.1-Diffusers", subfolder="vae", export=True
        ... )  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLHunyuanImageConfig
    family = AutoencoderKLHunyuanImageFamily()

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Run each image in less memory; the pixels stay the same.

        Nothing is tiled, so the sizes of tiles, which diffusers takes, change nothing.
        """
        super().enable_tiling()


class _Encoder(nn.Module):
    """Image to moments, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = converted(vae.encoder, _LAYERS)
        channels = vae.config.block_out_channels[-1]
        self.shortcut = conv2d(means(2 * vae.config.latent_channels, channels)[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        encoder: Any = self.encoder
        x = encoder.conv_in(x)
        for block in encoder.down_blocks:
            x = block(x)
        x = encoder.mid_block(x)
        moments: Tensor = encoder.conv_out(F.silu(encoder.norm_out(x))) + self.shortcut(x)
        return moments


class _Decoder(nn.Module):
    """Latent to image, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        decoder: Any = converted(vae.decoder, _LAYERS)
        conv = decoder.conv_in
        decoder.conv_in = centred(conv, repeats(conv.out_channels, conv.in_channels))
        self.decoder = decoder

    def forward(self, z: Tensor) -> Tensor:
        decoder: Any = self.decoder
        x = decoder.mid_block(decoder.conv_in(z))
        for block in decoder.up_blocks:
            x = block(x)
        image: Tensor = decoder.conv_out(F.silu(decoder.norm_out(x)))
        return image


def _halving(layer: Any) -> nn.Sequential:
    """Channels of cells have the order row, column, channel; so have those of the shortcut."""
    channels = layer.conv.out_channels
    conv = centred(layer.conv, means(channels, layer.conv.in_channels))
    order = torch.arange(4 * channels).view(channels, 4).t().flatten()
    return nn.Sequential(conv, Shuffled(order, up=False))


def _doubling(layer: Any) -> nn.Sequential:
    channels = layer.conv.out_channels
    conv = centred(layer.conv, repeats(channels, layer.conv.in_channels))
    order = torch.arange(channels).view(4, channels // 4).t().flatten()
    return nn.Sequential(conv, Shuffled(order, up=True))


def _attention(layer: Any) -> Attention:
    return Attention(layer.norm, layer.to_q, layer.to_k, layer.to_v, layer.proj)


_LAYERS: Layers = {
    "Downsample": _halving,
    "Upsample": _doubling,
    "AttentionBlock": _attention,
}
