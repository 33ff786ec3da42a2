"""`RBLNAutoencoderKLWan`: the autoencoders of Wan 2.1 and 2.2.

Its network is causal in time: what comes before the first frame is zeros. So on one frame a
convolution over three frames is the 2-D convolution by its last tap, and the layers that
resample time never run. For images alone the network is compiled as this 2-D network, from the
code of diffusers; `wan_frames.py` builds the graphs for videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RBLNAutoencoderKLWanConfig
from ..errors import RBLNCompileError
from ..sizes import check_image_size
from .family import ENCODER, Family
from .networks import Attention, Layers, Shuffled, conv2d, converted, means
from .video import RBLNVideoAutoencoder
from .wan_frames import FRAMES_ENCODED, VideoPart


class AutoencoderKLWanFamily(Family):
    """`AutoencoderKLWan`: Wan 2.1, Wan 2.2 and models based on them."""

    original_class_name = "AutoencoderKLWan"
    videos = True
    frames_encoded = FRAMES_ENCODED

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("attn_scales"):
            raise ValueError(
                f"attn_scales={config['attn_scales']!r}: diffusers itself can't run attention in "
                "the blocks of this autoencoder. Leave it empty."
            )
        patch = config.get("patch_size") or 1
        if patch not in (1, 2):
            raise ValueError(f"patch_size={patch!r} of the model: only patches of 2x2 are known.")
        levels = len(config["dim_mult"])
        frames = 2 ** sum(map(bool, config["temperal_downsample"]))
        return {
            "in_channels": self.image_channels(config, "in_channels"),
            "out_channels": self.image_channels(config, "out_channels"),
            "latent_channels": config.get("z_dim"),
            "vae_scale_factor": patch * 2 ** (levels - 1),
            "vae_scale_factor_temporal": config.get("scale_factor_temporal") or frames,
        }

    def image_channels(self, config: Mapping[str, Any], name: str) -> int:
        """Channels of an image, whose 2x2 pixels may be put together as channels."""
        channels: int = config.get(name) or 3
        return channels // (config.get("patch_size") or 1) ** 2

    def sample_size(self, config: Mapping[str, Any]) -> Any:
        return (704, 1280) if config.get("is_residual") else (480, 832)

    def check_image_size(
        self, size: tuple[int, int], factor: int, config: Mapping[str, Any]
    ) -> None:
        if config.get("is_residual"):  # pixels move to channels
            check_image_size(size, factor)
        else:
            super().check_image_size(size, factor, config)

    def module(self, model: nn.Module, part: str) -> nn.Module:
        return _Encoder(model) if part == ENCODER else _Decoder(model)

    def video_module(self, model: nn.Module, part: str) -> nn.Module:
        return VideoPart(model, part)


class RBLNAutoencoderKLWan(RBLNVideoAutoencoder):
    """A compiled `AutoencoderKLWan`, which stands wherever that of diffusers stands.

    It runs videos of any number of frames, whole or frame by frame in memory that doesn't grow
    with their length, and images of one frame. Results keep the dtype and the device of the input.
    The target `rbln`, and dtype `float16`, run images alone.

    Example:
        >>> vae = RBLNAutoencoderKLWan.from_pretrained(
        ...     "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="vae", export=True
        ... )  # doctest: +SKIP
        >>> for frame in vae.decode_frames(latent):  # doctest: +SKIP
        ...     show(frame)
    """

    config_class = RBLNAutoencoderKLWanConfig
    family = AutoencoderKLWanFamily()
    clamps = True

    rbln_config: RBLNAutoencoderKLWanConfig

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Run each frame in less memory; the pixels stay the same.

        Nothing is tiled, so the sizes of tiles, which diffusers takes, change nothing.
        """
        super().enable_tiling()

    @property
    def temperal_downsample(self) -> list[bool]:
        """Whether each level of the encoder halves the frames, too; the spelling is diffusers'."""
        return list(self._config["temperal_downsample"])

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell in a direction."""
        return self.resolved_config.vae_scale_factor

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.resolved_config.latent_channels


class _Encoder(nn.Module):
    """Image to moments, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.patchify = _patches(vae.config, up=False)
        self.encoder = converted(vae.encoder, _LAYERS)
        self.quant_conv = converted(vae.quant_conv, _LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(self.patchify(x)))
        return moments


class _Decoder(nn.Module):
    """Latent to image, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = converted(vae.post_quant_conv, _LAYERS)
        self.decoder = converted(vae.decoder, _LAYERS)
        self.unpatchify = _patches(vae.config, up=True)

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.unpatchify(self.decoder(self.post_quant_conv(z)))
        return image


def _patches(config: Mapping[str, Any], *, up: bool) -> nn.Module:
    """Puts patches of 2x2 pixels into channels, or takes them out, if the model has patches.

    The order of the channels is channel, column, row.
    """
    if (config.get("patch_size") or 1) == 1:
        return nn.Identity()
    channels = torch.arange(config["out_channels" if up else "in_channels"])
    return Shuffled(channels.view(-1, 2, 2).transpose(1, 2).flatten(), up=up)


def _convolution(layer: Any) -> nn.Conv2d:
    """The 2-D convolution that a causal one is on a frame with zeros before it."""
    weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, -1]
    left, _, above, *_ = layer._padding
    return conv2d(weight, layer.bias, stride=layer.stride[-1], padding=(above, left))


class _RMSNorm(nn.Module):
    """Divides each pixel by the norm of its channels, as `torch.nn.functional.normalize` does."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        if isinstance(layer.bias, Tensor):
            raise RBLNCompileError(
                f"A {type(layer).__name__} has a bias, and no model of diffusers has. Check that "
                "the model is one of diffusers' own classes."
            )
        self.gamma = nn.Parameter(layer.gamma.detach().flatten(), requires_grad=False)
        # The norm is at least 1e-12 there: such an eps changes no other pixel's result.
        self.eps = 1e-24 / len(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.rms_norm(x.permute(0, 2, 3, 1), self.gamma.shape, self.gamma, self.eps)
        return pixels.permute(0, 3, 1, 2)


def _attention(layer: Any) -> Attention:
    weights, biases = layer.to_qkv.weight.chunk(3), layer.to_qkv.bias.chunk(3)
    query, key, value = map(conv2d, weights, biases)
    return Attention(_RMSNorm(layer.norm), query, key, value, layer.proj)


class _Resample(nn.Module):
    """Halves or doubles a frame. Time is not resampled in the first frame of a video."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.resample = layer.resample
        if "upsample" in layer.mode:
            self.resample[0] = nn.Upsample(scale_factor=2.0, mode="nearest")

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: Any = None) -> Tensor:
        resampled: Tensor = self.resample(x)
        return resampled


def _average(layer: Any) -> nn.Conv2d:
    """The convolution that the averaging shortcut is: means of groups of channels and pixels.

    A frame before the only one, which is zeros, counts in the mean.
    """
    frames, side, inputs = layer.factor_t, layer.factor_s, layer.in_channels
    matrix = means(layer.out_channels, inputs * layer.factor)
    kernels = matrix.view(-1, inputs, frames, side, side)[:, :, -1]
    return conv2d(kernels.contiguous(), stride=side)


class _Repeat(Shuffled):
    """The repeating shortcut: channels, each several times, as the pixels of cells."""

    def __init__(self, layer: Any) -> None:
        elements = torch.arange(layer.out_channels * layer.factor) // layer.repeats
        frames = elements.view(layer.out_channels, layer.factor_t, -1)
        super().__init__(frames[:, -1].flatten(), up=True)

    def forward(self, x: Tensor, first_chunk: bool = True) -> Tensor:
        return super().forward(x)


_LAYERS: Layers = {
    "CausalConv3d": _convolution,
    "RMS_norm": _RMSNorm,
    "AttentionBlock": _attention,
    "Resample": _Resample,
    "AvgDown3D": _average,
    "DupUp3D": _Repeat,
}
"""The layers with an axis of frames; their classes in Wan and Qwen-Image differ by a prefix.

Modules that contain them pass on what they are given, and run without caches.
"""
