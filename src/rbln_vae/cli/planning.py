"""`rbln-vae plan`: what a size costs, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import RBLNAutoencoder
from ..models.family import ENCODER
from ..models.video import RBLNVideoAutoencoder
from .models import input_shapes
from .terminal import out, working


def describe_model(
    directory: Path,
    size: str | None,
    batch_size: int | None,
    steps: bool,
    settings: Mapping[str, Any],
    frames: int | None = None,
) -> None:
    """Print what encoding and decoding images of a size takes.

    Args:
        directory: A compiled model.
        size: Of the image; `None` is the model's own.
        batch_size: `None` is the model's own.
        steps: Whether to list the steps of the runs.
        settings: For `rbln_config`.
        frames: Of a video; by default it is an image.
    """
    with working(f"Loading {directory} …"):
        model = RBLNAutoencoder.from_pretrained(directory, rbln_config=dict(settings))
    shapes = input_shapes(model, size, batch_size)
    for number, (part, image) in enumerate(shapes.items()):
        if number:
            out().print()
        shape: tuple[int, ...] = image
        if frames is not None:
            if not isinstance(model, RBLNVideoAutoencoder):
                raise ValueError(f"{directory} runs images, not videos: leave --frames out.")
            ratio = model.temporal_compression_ratio
            count = frames if part == ENCODER else 1 + -(-(frames - 1) // ratio)
            shape = (*image[:2], count, *image[2:])
        with working("Planning …"):
            text = model.describe(part, shape, steps=steps)
        out().print(text, highlight=False, markup=False, soft_wrap=True)
