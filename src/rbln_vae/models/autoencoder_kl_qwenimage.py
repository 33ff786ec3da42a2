"""`RBLNAutoencoderKLQwenImage`: the autoencoder of Qwen-Image, Krea 2 and Anima.

Its network is Wan 2.1's under other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import RBLNAutoencoderKLQwenImageConfig
from .autoencoder_kl_wan import AutoencoderKLWanFamily, RBLNAutoencoderKLWan


class AutoencoderKLQwenImageFamily(AutoencoderKLWanFamily):
    """`AutoencoderKLQwenImage`: Qwen-Image, its variants Edit and Layered, Krea 2 and Anima."""

    original_class_name = "AutoencoderKLQwenImage"

    def image_channels(self, config: Mapping[str, Any], name: str) -> int:
        channels: int = config.get("input_channels") or 3
        return channels

    def sample_size(self, config: Mapping[str, Any]) -> Any:
        return (1024, 1024)


class RBLNAutoencoderKLQwenImage(RBLNAutoencoderKLWan):
    """A compiled `AutoencoderKLQwenImage`, which stands wherever that of diffusers stands.

    Everything is as in `RBLNAutoencoderKLWan`; images of Qwen-Image-Layered have 4 channels, of
    which the last is the opacity.

    Example:
        >>> vae = RBLNAutoencoderKLQwenImage.from_pretrained(
        ...     "Qwen/Qwen-Image", subfolder="vae", export=True
        ... )  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLQwenImageConfig
    family = AutoencoderKLQwenImageFamily()
