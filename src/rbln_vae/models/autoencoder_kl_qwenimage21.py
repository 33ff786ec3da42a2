"""`RBLNAutoencoderKLQwenImage21`: the autoencoder of Qwen-Image-2.1.

Its network is that of Wan 2.2 for single images, without patches, and its images have a fourth
channel, their opacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import RBLNAutoencoderKLQwenImage21Config
from .autoencoder_kl_wan import AutoencoderKLWanFamily, RBLNAutoencoderKLWan


class AutoencoderKLQwenImage21Family(AutoencoderKLWanFamily):
    """`AutoencoderKLQwenImage21`: Qwen-Image-2.1."""

    original_class_name = "AutoencoderKLQwenImage21"
    videos = False

    def sample_size(self, config: Mapping[str, Any]) -> Any:
        return (1024, 1024)


class RBLNAutoencoderKLQwenImage21(RBLNAutoencoderKLWan):
    """A compiled `AutoencoderKLQwenImage21`, which stands wherever that of diffusers stands.

    Everything is as in `RBLNAutoencoderKLWan`; images have 4 channels.

    Example:
        >>> vae = RBLNAutoencoderKLQwenImage21.from_pretrained(
        ...     "Qwen/Qwen-Image-2.1", subfolder="vae", export=True
        ... )  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLQwenImage21Config
    family = AutoencoderKLQwenImage21Family()
