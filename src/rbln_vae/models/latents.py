"""How pipelines scale the latents of a model for its denoiser, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


@dataclass(frozen=True)
class LatentScaling:
    """The constants between a model's latents `z` and what a denoiser was trained on.

    A denoiser sees `(z - shift_factor - latents_mean) * scaling_factor / latents_std`, where the
    cells of a patch come first as channels of their own. A constant that is `None` changes
    nothing.

    Attributes:
        scaling_factor: One number for all channels.
        shift_factor: The same.
        latents_mean: One number for each channel, after patches.
        latents_std: The same.
        patch_size: Cells of a side of a patch, which become channels: `(C, H, W)` becomes
            `(C * patch_size², H / patch_size, W / patch_size)`, in the order of
            `torch.nn.functional.pixel_unshuffle`.
        known: Whether the constants are known. If not, whatever needs them raises a
            `ValueError`.

    Example:
        >>> LatentScaling(scaling_factor=0.5, shift_factor=1.0).scale(torch.tensor([3.0]))
        tensor([1.])
    """

    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    patch_size: int = 1
    known: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentScaling:
        """The constants in the configuration of a diffusers model, if it has any."""
        factor, deviations = config.get("scaling_factor"), config.get("latents_std")
        return cls(
            factor,
            config.get("shift_factor"),
            _numbers(config.get("latents_mean")),
            _numbers(deviations),
            known=factor is not None or deviations is not None,
        )

    def check_known(self) -> None:
        """Raise a `ValueError` if the constants aren't known."""
        if not self.known:
            raise ValueError(
                "The scaling of the model's latents isn't known: the file that it was compiled "
                "from doesn't tell it. Compile the model again and name its kind, such as "
                "kind='sdxl' or --kind sdxl; or pass the scaling in a configuration."
            )

    def scale(self, latent: Tensor) -> Tensor:
        """From what the encoder gives to what the denoiser sees.

        Args:
            latent: `(…, C, H, W)`, whose sides are multiples of `patch_size`.
        """
        self.check_known()
        latent = self.patched(latent)
        if self.shift_factor is not None:
            latent = latent - self.shift_factor
        if self.latents_mean is not None:
            latent = latent - _by_channel(self.latents_mean, latent)
        if self.scaling_factor is not None:
            latent = latent * self.scaling_factor
        return (
            latent if self.latents_std is None else latent / _by_channel(self.latents_std, latent)
        )

    def patched(self, latent: Tensor) -> Tensor:
        """The cells of each patch as channels, and no other change."""
        return latent if self.patch_size == 1 else F.pixel_unshuffle(latent, self.patch_size)

    def scale_log_variance(self, log_variance: Tensor) -> Tensor:
        """The logarithm of the variance that latents of this one have after `scale`.

        Args:
            log_variance: `(…, C, H, W)`.
        """
        self.check_known()
        # The variance of a multiple is the variance times the square of the factor.
        log_variance = self.patched(log_variance)
        ones = torch.ones_like(log_variance[..., :1, :1])
        factor = LatentScaling(self.scaling_factor, latents_std=self.latents_std).scale(ones)
        return log_variance + 2 * factor.log()

    def unscale(self, latent: Tensor) -> Tensor:
        """From what the denoiser gives to what the decoder takes: the inverse of `scale`.

        Args:
            latent: As `scale` gives it.
        """
        self.check_known()
        if self.latents_std is not None:
            latent = latent * _by_channel(self.latents_std, latent)
        if self.scaling_factor is not None:
            latent = latent / self.scaling_factor
        if self.latents_mean is not None:
            latent = latent + _by_channel(self.latents_mean, latent)
        if self.shift_factor is not None:
            latent = latent + self.shift_factor
        return latent if self.patch_size == 1 else F.pixel_shuffle(latent, self.patch_size)


def mode(encoded: DiagonalGaussianDistribution | Tensor) -> Tensor:
    """The most likely latents: those of a distribution, or those that the encoder gave."""
    if isinstance(encoded, Tensor):
        return encoded
    found: Tensor = encoded.mode()
    return found


def _numbers(values: Iterable[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def _by_channel(values: tuple[float, ...], latent: Tensor) -> Tensor:
    return torch.tensor(values, dtype=latent.dtype, device=latent.device).view(-1, 1, 1)
