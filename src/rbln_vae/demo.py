"""The small trained model that the package ships."""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """The directory of a small trained `AutoencoderKL` in diffusers' format.

    It has all the parts of the large ones (f8, 16 latent channels, attention, quant convs)
    and is good for trials and tests, not for art; README.md beside it says what it was
    trained on.

    Returns:
        A directory with `config.json` and the weights, to be read and not written to.

    Example:
        >>> demo_model().joinpath("config.json").exists()
        True
    """
    return Path(__file__).parent / "checkpoints" / "demo"
