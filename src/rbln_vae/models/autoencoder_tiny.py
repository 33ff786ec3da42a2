"""`RBLNAutoencoderTiny`: small autoencoders such as TAESD, for previews and real time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import RBLNAutoencoderTinyConfig
from ..graph.capture import replica
from .autoencoder import RBLNAutoencoderModel, decoded
from .base import RunArguments
from .family import ENCODER, Family

if TYPE_CHECKING:
    import numpy.typing as npt
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DecoderOutput
    from typing_extensions import Unpack


class AutoencoderTinyFamily(Family):
    """`AutoencoderTiny`: TAESD, TAESDXL, TAESD3 and TAEF1."""

    original_class_name = "AutoencoderTiny"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "in_channels": config.get("in_channels"),
            "out_channels": config.get("out_channels"),
            "latent_channels": config.get("latent_channels"),
            "vae_scale_factor": 2 ** (len(config["encoder_block_out_channels"]) - 1),
        }

    def sample_size(self, config: Mapping[str, Any]) -> Any:
        return 512

    def check_image_size(
        self, size: tuple[int, int], factor: int, config: Mapping[str, Any]
    ) -> None:
        """Nothing to check: each level rounds up, so the encoder takes every size."""

    def module(self, model: torch.nn.Module, part: str) -> torch.nn.Module:
        return replica(_Encoder(model) if part == ENCODER else _Decoder(model))


class RBLNAutoencoderTiny(RBLNAutoencoderModel):
    """A compiled `AutoencoderTiny`, which stands wherever that of diffusers stands.

    Its encoder gives latents, not a distribution. Results keep the dtype and the device of
    the input.

    Example:
        >>> vae = RBLNAutoencoderTiny.from_pretrained("madebyollin/taesd", export=True)
        ... # doctest: +SKIP
        >>> image = vae.decode(latent).sample  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderTinyConfig
    family = AutoencoderTinyFamily()
    draws = False

    rbln_config: RBLNAutoencoderTinyConfig

    def encode(
        self, x: Tensor, return_dict: bool = True, **arguments: Unpack[RunArguments]
    ) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Turn images into latents.

        Args:
            x: Images `(N, in_channels, H, W)` in `[-1, 1]`, of any size, floating dtype and
                strides; or pictures `(N, H, W, in_channels)` of uint8.
            return_dict: Whether to return an output class (default) or a tuple.
            **arguments: `should_stop`, `progress` and `memory_limit`: see `RunArguments`.

        Returns:
            `AutoencoderTinyOutput(latents=…)`, or `(latents,)`: `(N, latent_channels, H / f, W
            / f)`, where each level rounds up.

        Raises:
            ValueError: The shape or the device is wrong.
            TypeError: It is no tensor of floats or uint8.
            RBLNRuntimeError: The encoder was not compiled, or there are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> latents = vae.encode(image).latents  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

        latents = self._encoded(x, **arguments)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into images.

        Args:
            x: Latents `(N, latent_channels, h, w)`, of any floating dtype and strides.
            generator: Accepted, and draws nothing.
            return_dict: Whether to return an output class (default) or a tuple.
            out: As of `RBLNAutoencoderKL.decode`. By default the result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            `DecoderOutput(sample=…)`, or `(sample,)`: images `(N, out_channels, f * h, f * w)`,
            about in `[-1, 1]`.

        Raises:
            ValueError: The shape or the device is wrong, of `x` or of `out`.
            TypeError: One is no floating tensor.
            RBLNRuntimeError: There are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> image = vae.decode(latents).sample  # doctest: +SKIP
        """
        sample = self.decode_latents(x, out=out, **arguments)
        return decoded(sample, return_dict)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode images, round the latents to bytes as diffusers does, and decode them.

        Args:
            sample: Images, as `encode` takes them.
            return_dict: Whether to return an output class (default) or a tuple.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode`.
        """
        (latents,) = self.encode(sample, return_dict=False)
        levels = self.scale_latents(latents).mul(255).round() / 255
        return self.decode(self.unscale_latents(levels), return_dict=return_dict)

    __call__ = forward

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents as numbers in `[0, 1]`, for example to keep them as a picture."""
        magnitude, shift = self._config["latent_magnitude"], self._config["latent_shift"]
        return x.div(2 * magnitude).add(shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """The inverse of `scale_latents`."""
        magnitude, shift = self._config["latent_magnitude"], self._config["latent_shift"]
        return x.sub(shift).mul(2 * magnitude)


class _Encoder(torch.nn.Module):
    """Image to latent, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder

    def forward(self, x: Tensor) -> Tensor:
        latent: Tensor = self.encoder(x)
        return latent


class _Decoder(torch.nn.Module):
    """Latent to image, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.decoder(z)
        return image
