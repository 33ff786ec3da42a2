"""`rbln-vae plan`: what a size costs, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import RBLNAutoencoder
from .models import input_shapes
from .terminal import out, working


def describe_model(
    directory: Path,
    size: str | None,
    batch_size: int | None,
    steps: bool,
    settings: Mapping[str, Any],
) -> None:
    """Print what encoding and decoding images of a size takes.

    Args:
        directory: A compiled model.
        size: Of the image; `None` is the model's own.
        batch_size: `None` is the model's own.
        steps: Whether to list the steps of the runs.
        settings: For `rbln_config`.
    """
    with working(f"Loading {directory} …"):
        model = RBLNAutoencoder.from_pretrained(directory, rbln_config=dict(settings))
    shapes = input_shapes(model, size, batch_size)
    for number, (part, shape) in enumerate(shapes.items()):
        if number:
            out().print()
        with working("Planning …"):
            text = model.describe(part, shape, steps=steps)
        out().print(text, highlight=False, markup=False, soft_wrap=True)
