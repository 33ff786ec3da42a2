"""`rbln-vae profile`: where the time of a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import RBLNAutoencoder
from ..models.family import DECODER, ENCODER
from ..profiler import Profile
from .models import input_shapes
from .terminal import out, working

WARM_UPS = 1


def profile_model(
    directory: Path,
    size: str | None,
    batch_size: int | None,
    trace: Path | None,
    settings: Mapping[str, Any],
) -> None:
    """Run each part on noise and print the time of its operations.

    Args:
        directory: A compiled model.
        size: Of the image; `None` is the model's own.
        batch_size: `None` is the model's own.
        trace: Where to write the trace, if anywhere.
        settings: For `rbln_config`.

    Raises:
        FileNotFoundError: The directory of the trace isn't there.
    """
    if trace is not None and not trace.parent.is_dir():
        raise FileNotFoundError(
            f"{trace.parent} is no directory. Make it, or name another --trace."
        )
    with working(f"Loading {directory} …"):
        model = RBLNAutoencoder.from_pretrained(
            directory, rbln_config={**settings, "activate_profiler": True}
        )
    generator = torch.Generator().manual_seed(0)
    shapes = input_shapes(model, size, batch_size)
    noise = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    with working("Running …"):
        for _ in range(WARM_UPS + 1):
            if ENCODER in noise:
                model.encode_images(noise[ENCODER])
            model.decode_latents(noise[DECODER])
    latest = {run.part: run for run in model.profile().runs}
    profile = Profile(list(latest.values()))
    out().print(str(profile))
    if trace is not None:
        profile.save(trace)
        out().print(f"the trace is {trace}; open it at https://ui.perfetto.dev")
