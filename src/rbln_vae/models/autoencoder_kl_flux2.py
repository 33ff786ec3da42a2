"""`RBLNAutoencoderKLFlux2`: the autoencoder of FLUX.2, and of ERNIE-Image and Ideogram 4.

Its network is `AutoencoderKL`'s. Its latents are not scaled by constants, but put together
two by two and normalised by statistics that the model holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ..config import RBLNAutoencoderKLFlux2Config
from .autoencoder_kl import AutoencoderKLFamily, RBLNAutoencoderKL
from .latents import LatentScaling

_MEAN, _VARIANCE = "bn.running_mean", "bn.running_var"


class AutoencoderKLFlux2Family(AutoencoderKLFamily):
    """`AutoencoderKLFlux2`: FLUX.2, its small decoder, ERNIE-Image and Ideogram 4."""

    original_class_name = "AutoencoderKLFlux2"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        patch = config.get("patch_size")
        if not isinstance(patch, (list, tuple)) or len(set(patch)) != 1 or len(patch) != 2:
            raise ValueError(f"patch_size={patch!r} of the model is no pair of equal sides.")
        return super().facts(config)

    def buffers(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        channels = math.prod(config["patch_size"]) * config["latent_channels"]
        return {_MEAN: (channels,), _VARIANCE: (channels,)}

    def latent_scaling(
        self, config: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]
    ) -> LatentScaling:
        spread = (buffers[_VARIANCE].double() + config["batch_norm_eps"]).sqrt()
        return LatentScaling(
            latents_mean=tuple(buffers[_MEAN].tolist()),
            latents_std=tuple(spread.tolist()),
            patch_size=config["patch_size"][0],
        )


class RBLNAutoencoderKLFlux2(RBLNAutoencoderKL):
    """A compiled `AutoencoderKLFlux2`, which stands wherever that of diffusers stands.

    `encode` and `decode` work on latents `(N, latent_channels, H / f, W / f)`, as those of
    diffusers do; pipelines put them together and normalise them by `bn`.

    Example:
        >>> vae = RBLNAutoencoderKLFlux2.from_pretrained(
        ...     "black-forest-labs/FLUX.2-dev", subfolder="vae", export=True
        ... )  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLFlux2Config
    family = AutoencoderKLFlux2Family()

    @property
    def bn(self) -> Any:
        """The statistics by which pipelines normalise latents: `running_mean`, `running_var`."""
        buffers = self._compiled.buffers
        return SimpleNamespace(running_mean=buffers[_MEAN], running_var=buffers[_VARIANCE])
