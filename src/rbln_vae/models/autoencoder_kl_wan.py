"""`RBLNAutoencoderKLWan`: the autoencoders of Wan 2.1 and 2.2, for images of one frame.

Its network is causal in time: what comes before the first frame is zeros. So on one frame a
convolution over three frames is the 2-D convolution by its last tap, and the layers that
resample time never run. The network is compiled as this 2-D network, which gives the same
results with a third of the multiplications.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RBLNAutoencoderKLWanConfig
from ..errors import RBLNCompileError
from .autoencoder import RBLNAutoencoderModel, check_pictures, check_tensor, decoded
from .base import RunArguments
from .family import ENCODER, Family
from .networks import Attention, Layers, Shuffled, conv2d, converted, means

if TYPE_CHECKING:
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from typing_extensions import Unpack


class AutoencoderKLWanFamily(Family):
    """`AutoencoderKLWan`: Wan 2.1, Wan 2.2 and models based on them."""

    original_class_name = "AutoencoderKLWan"

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
            "num_frames": 1,
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
        if config.get("is_residual"):
            super().check_image_size(size, factor, config)
        elif min(size) < factor:
            raise ValueError(
                f"{size[0]}x{size[1]} is no image size of this model: height and width must be "
                f"{factor} or more."
            )

    def module(self, model: nn.Module, part: str) -> nn.Module:
        return _Encoder(model) if part == ENCODER else _Decoder(model)


class RBLNAutoencoderKLWan(RBLNAutoencoderModel):
    """A compiled `AutoencoderKLWan`, which stands wherever that of diffusers stands.

    It runs images of one frame; more are refused. Results keep the dtype and the device of
    the input.

    Example:
        >>> vae = RBLNAutoencoderKLWan.from_pretrained(
        ...     "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="vae", export=True
        ... )  # doctest: +SKIP
        >>> image = vae.decode(latent).sample[:, :, 0]  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLWanConfig
    family = AutoencoderKLWanFamily()
    frames = True
    clamps = True

    rbln_config: RBLNAutoencoderKLWanConfig

    def encode(
        self, x: Tensor, return_dict: bool = True, **arguments: Unpack[RunArguments]
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Turn images into distributions of latents.

        Args:
            x: Images `(N, in_channels, 1, H, W)` in `[-1, 1]`, of any floating dtype and
                strides; or pictures `(N, 1, H, W, in_channels)` of uint8.
            return_dict: Whether to return an output class (default) or a tuple.
            **arguments: `should_stop`, `progress` and `memory_limit`: see `RunArguments`.

        Returns:
            `AutoencoderKLOutput(latent_dist=…)`, or `(latent_dist,)`; `latent_dist` is
            diffusers' `DiagonalGaussianDistribution` over `(N, latent_channels, 1, h, w)`.
            The latents are not normalised.

        Raises:
            ValueError: The shape or the device is wrong, or there are several frames.
            TypeError: It is no tensor of floats or uint8.
            RBLNRuntimeError: The encoder was not compiled, or there are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> latent = vae.encode(image.unsqueeze(2)).latent_dist.mode()  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        channels = self.resolved_config.in_channels
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            check_pictures(x, "x", channels, frames=True)
            x = x[:, 0]
        else:
            check_tensor(x, "x", channels, frames=True)
            x = x[:, :, 0]
        moments = self._encoded(x, **arguments).unsqueeze(2)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into images.

        Args:
            z: Latents `(N, latent_channels, 1, h, w)`, not normalised, of any floating dtype
                and strides.
            return_dict: Whether to return an output class (default) or a tuple.
            out: Where to write the images, `(N, out_channels, 1, f * h, f * w)`; otherwise as
                of `RBLNAutoencoderKL.decode`. By default the result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            `DecoderOutput(sample=…)`, or `(sample,)`: images `(N, out_channels, 1, f * h, f *
            w)` in `[-1, 1]`.

        Raises:
            ValueError: The shape or the device is wrong, of `z` or of `out`, or there are
                several frames.
            TypeError: One is no floating tensor.
            RBLNRuntimeError: There are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> image = vae.decode(latent).sample[:, :, 0]  # doctest: +SKIP
        """
        check_tensor(z, "z", self.resolved_config.latent_channels, frames=True)
        sample = self.decode_latents(z[:, :, 0], out=_frame_of(out), **arguments)
        sample = sample.unsqueeze(2)
        return decoded(sample, return_dict)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode images and decode them again.

        Args:
            sample: Images, as `encode` takes them.
            sample_posterior: Whether to draw the latent, or to take the mode (default).
            return_dict: Whether to return an output class (default) or a tuple.
            generator: Where to draw from. By default torch's own generator.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode`.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    __call__ = forward

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Run each image in less memory; the pixels stay the same.

        Nothing is tiled, so the sizes of tiles, which diffusers takes, change nothing.
        """
        super().enable_tiling()

    @property
    def temperal_downsample(self) -> list[bool]:
        """Whether each level of the encoder halves the frames, too; the spelling is diffusers'."""
        return list(self.config.temperal_downsample)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell in a direction."""
        return self.resolved_config.vae_scale_factor

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.resolved_config.latent_channels


def _frame_of(out: Tensor | npt.NDArray[Any] | None) -> Any:
    """The only frame of a tensor or an array to write to; what isn't one is refused later."""
    axes = getattr(out, "ndim", None)
    if out is None or axes is None:
        return out
    if axes != 5 or out.shape[2] != 1:
        raise ValueError(
            f"out must have the shape (N, C, 1, H, W), and has {tuple(out.shape)}. "
            "out.unsqueeze(2) of a tensor, or out[:, :, None] of an array, adds the axis of frames."
        )
    return out[:, :, 0]


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
