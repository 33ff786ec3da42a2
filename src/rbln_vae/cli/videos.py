"""What the commands encode and decode do with videos."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_path
from ..images import with_opacity
from ..models.video import RBLNVideoAutoencoder
from ..sizes import format_size
from ..videos import is_pattern, read_video, write_video
from .models import open_model
from .pictures import LATENTS, finish, milliseconds, outputs, read_tensor
from .terminal import err, out


def decode(
    latents: Path,
    target: Path,
    model_name: str | None,
    settings: Mapping[str, Any],
    *,
    fps: float,
    **loading: Any,
) -> None:
    """Write the video of a file of latents, each frame as it is done."""
    z, _ = read_tensor(latents)
    z = z.unsqueeze(0) if z.dim() == 4 else z
    if z.dim() != 5 or len(z) != 1:
        raise ValueError(
            f"{latents}: expected the latents of one video, (C, T, h, w) or (1, C, T, h, w), "
            f"found {tuple(z.shape)}"
        )
    model = _open(model_name, settings, loading)
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    total = 1 + (z.shape[2] - 1) * model.temporal_compression_ratio
    frames = _shown("Decoding", _finite(model.decode_frames(z.float())), total)
    count = write_video(target, frames, fps)
    took = time.perf_counter() - start
    what = "pictures" if is_pattern(target) else f"frames at {fps:g} per second"
    out().print(f"{target}: {count} {what}, in {took:.1f} s", highlight=False, soft_wrap=True)


def encode(
    clips: Sequence[Path],
    model_name: str | None,
    output: Path,
    settings: Mapping[str, Any],
    *,
    seed: int | None,
    **loading: Any,
) -> None:
    """Write the latents of each video: the mean, or a sample if there is a seed."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    written = outputs(clips, output, ".safetensors")
    model = _open(model_name, settings, loading)
    channels = model.resolved_config.in_channels

    def work(path: Path) -> tuple[str, ...]:
        start = time.perf_counter()
        pictures = (with_opacity(each.unsqueeze(0), channels) for each in read_video(path))
        moments = torch.stack(list(model.encode_frames(pictures)), 2)
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mode()
        if seed is not None:
            latents = posterior.sample(torch.Generator().manual_seed(seed))
        end = time.perf_counter()
        with atomic_path(written[path]) as temporary:
            save_file({LATENTS: latents.contiguous()}, temporary, {"model": model_name or ""})
        shape = f"{latents.shape[2]} frames of {format_size(latents[:, :, 0].shape)}"
        return (path.name, shape, milliseconds(end - start), str(written[path]))

    finish("Encoding", clips, work, ("video", "latents", "ms", "written to"))


def _open(
    name: str | None, settings: Mapping[str, Any], loading: Mapping[str, Any]
) -> RBLNVideoAutoencoder:
    model = open_model(name, settings, **loading)
    if not isinstance(model, RBLNVideoAutoencoder):
        raise ValueError(
            f"{name or 'the shipped model'} is a {type(model).__name__}, which runs images. Name a "
            "model of videos by --model, such as Wan's."
        )
    return model


def _finite(frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """The frames, or an error where one can't be shown."""
    for number, frame in enumerate(frames):
        if not frame.isfinite().all():
            raise ValueError(f"the decoded frame {number} holds values that aren't finite")
        yield frame


def _shown(what: str, frames: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    """The frames, under a progress bar."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield from bar.track(frames, total=total, description=what)
