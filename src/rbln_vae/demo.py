"""The small trained model that the package ships."""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """The directory of a small trained `AutoencoderKL` in diffusers' format.

    It has all features of large models (f8, 16 latent channels, attention, quant convs), and
    is meant for trials and tests. The README.md in the directory describes its training.

    Returns:
        A directory with `config.json` and the weights; treat it as read-only.

    Example:
        >>> demo_model().joinpath("config.json").exists()
        True
    """
    return Path(__file__).parent / "checkpoints" / "demo"
