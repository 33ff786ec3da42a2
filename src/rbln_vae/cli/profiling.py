"""`rbln-vae profile`: where the time of a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import RBLNAutoencoderKL
from ..images import parse_size
from ..profiler import Profile
from .models import image_size, in_channels, scale_factor
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
    """
    with working(f"Loading {directory} …"):
        model = RBLNAutoencoderKL.from_pretrained(
            directory, rbln_config={**settings, "activate_profiler": True}
        )
    config = model.rbln_config
    height, width = image_size(config) if size is None else parse_size(size)
    batch = batch_size or config.batch_size
    factor = scale_factor(config)
    generator = torch.Generator().manual_seed(0)
    latent_channels = config.latent_channels or 0
    latent = torch.randn(
        batch, latent_channels, height // factor, width // factor, generator=generator
    )
    image = torch.rand(batch, in_channels(config), height, width, generator=generator) * 2 - 1
    with working("Running …"):
        for _ in range(WARM_UPS + 1):
            if config.uses_encoder:
                model.encode(image)
            model.decode(latent)
    latest = {run.part: run for run in model.profile().runs}
    profile = Profile(list(latest.values()))
    out().print(str(profile))
    if trace is not None:
        profile.save(trace)
        out().print(f"the trace is {trace}; open it at https://ui.perfetto.dev")
