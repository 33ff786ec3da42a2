"""`RBLNAutoencoderKL` and its configuration: what is special to a VAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..config import RBLNAutoencoderKLConfig, reject_unknown
from ..graph.capture import replica
from .autoencoder import RBLNAutoencoderModel, decoded
from .base import RunArguments
from .family import ENCODER, Family

if TYPE_CHECKING:
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from typing_extensions import Unpack

_ARGUMENTS = ("generator", *RunArguments.__annotations__)
"""What `encode` and `decode` take by name, besides their own."""


class AutoencoderKLFamily(Family):
    """`AutoencoderKL`: Stable Diffusion, SDXL, SD 3, FLUX.1, Z-Image and many others."""

    original_class_name = "AutoencoderKL"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        blocks = config.get("block_out_channels")
        if not isinstance(blocks, (list, tuple)) or not blocks:
            raise ValueError(f"block_out_channels={blocks!r} of the model is no list of channels.")
        return {
            "in_channels": config.get("in_channels"),
            "out_channels": config.get("out_channels"),
            "latent_channels": config.get("latent_channels"),
            "vae_scale_factor": 2 ** (len(blocks) - 1),
        }

    def module(self, model: torch.nn.Module, part: str) -> torch.nn.Module:
        module = replica(_Encoder(model) if part == ENCODER else _Decoder(model))
        use_standard_attention(module)
        return module


class RBLNAutoencoderKL(RBLNAutoencoderModel):
    """A compiled `AutoencoderKL`, which stands wherever that of diffusers stands.

    The *encoder* turns an image into a distribution of latents, the *decoder* a latent into
    an image. Results keep the dtype and the device of what came in.

    Example:
        >>> vae = RBLNAutoencoderKL.from_pretrained(
        ...     demo_model(), export=True, rbln_sample_size=512
        ... )  # doctest: +SKIP
        >>> latent = vae.encode(image).latent_dist.mode()  # doctest: +SKIP
        >>> image = vae.decode(latent).sample  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLConfig
    family: ClassVar[Family] = AutoencoderKLFamily()

    rbln_config: RBLNAutoencoderKLConfig

    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,
        *,
        generator: torch.Generator | None = None,
        **arguments: Unpack[RunArguments],
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Turn images into distributions of latents.

        Args:
            x: Images `(N, in_channels, H, W)` in `[-1, 1]`, of any floating dtype and
                strides; or pictures `(N, H, W, in_channels)` of uint8, which are taken as
                diffusers' `VaeImageProcessor` takes them. Each level halves the height and width,
                and leaves out the last row or column of an odd one. HunyuanImage's encoder takes
                multiples of its scale factor alone.
            return_dict: Whether to return an output class (default) or a tuple.
            generator: Accepted, and draws nothing.
            **arguments: `should_stop`, a function that can stop the run; `progress`, one that is
                told how far it is; and `memory_limit`, for this run alone: see `RunArguments`.

        Returns:
            `AutoencoderKLOutput(latent_dist=…)`, or `(latent_dist,)`; `latent_dist` is
            diffusers' `DiagonalGaussianDistribution` over `(N, latent_channels, H / f, W /
            f)`. The latents are unscaled, in the dtype of `x`, or float32 if `x` is uint8.

        Raises:
            ValueError: The shape or the device is wrong.
            TypeError: It is no tensor of floats or uint8, or a name is unknown.
            RBLNRuntimeError: The encoder was not compiled, or there are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> latent = vae.encode(image).latent_dist.sample()  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        reject_unknown(arguments, _ARGUMENTS, "argument of encode")
        posterior = self.encode_images(x, **arguments)
        assert isinstance(posterior, DiagonalGaussianDistribution)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into images.

        Args:
            z: Unscaled latents `(N, latent_channels, H, W)`, of any floating dtype and
                strides.
            return_dict: Whether to return an output class (default) or a tuple.
            generator: Accepted, and draws nothing.
            out: Where to write the images instead of to a new tensor: a tensor on the CPU,
                an array or a memory map `(N, out_channels, f * H, f * W)` of float32,
                float16 or (a tensor) bfloat16, of any strides. It doesn't count against
                `memory_limit`. By default the result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            `DecoderOutput(sample=…)`, or `(sample,)`: images `(N, out_channels, f * H, f *
            W)`, about in `[-1, 1]`.

        Raises:
            ValueError: The shape or the device is wrong, of `z` or of `out`.
            TypeError: One is no floating tensor, or a name is unknown.
            RBLNRuntimeError: There are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> image = vae.decode(latent / vae.config.scaling_factor).sample
            ... # doctest: +SKIP
            >>> pixels = numpy.lib.format.open_memmap(
            ...     "images.npy", "w+", "float16", (1000, 3, 512, 512)
            ... )  # doctest: +SKIP
            >>> vae.decode(latents, out=pixels)  # doctest: +SKIP
        """
        reject_unknown(arguments, _ARGUMENTS, "argument of decode")
        sample = self.decode_latents(z, out=out, **arguments)
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
            sample_posterior: Whether to draw the latent, or to take the mode.
            return_dict: Whether to return an output class or a tuple.
            generator: Where to draw from.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode`.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    __call__ = forward

    @property
    def post_quant_conv(self) -> _PostQuantConv:
        """A stand-in on which pipelines look up the dtype of the decoder."""
        return _PostQuantConv(self.dtype)


@dataclasses.dataclass(frozen=True)
class _PostQuantConv:
    """What is left of the first layer of the decoder once it is compiled: its dtype."""

    dtype: torch.dtype

    def parameters(self) -> Iterator[Tensor]:
        yield torch.empty(0, dtype=self.dtype)

    def to(self, *args: Any, **kwargs: Any) -> _PostQuantConv:
        return self


class _Encoder(torch.nn.Module):
    """Image to moments, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)


class _Decoder(torch.nn.Module):
    """Latent to image, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = vae.post_quant_conv

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return image


def use_standard_attention(module: torch.nn.Module) -> None:
    """Give attention one form, whatever processors the model has.

    All processors of diffusers compute the same function from the same weights.

    Args:
        module: Of which each attention gets the standard processor.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    standard: Any = AttnProcessor2_0()  # type: ignore[no-untyped-call]
    for submodule in module.modules():
        if isinstance(submodule, Attention):
            submodule.set_processor(standard)
