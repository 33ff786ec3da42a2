"""Small models of videos, and video files, that several tests share."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import tiny_vaes
from torch import Tensor

from rbln_vae import RBLNAutoencoder
from rbln_vae.models.video import RBLNVideoAutoencoder


@functools.cache
def wan(**options: Any) -> RBLNVideoAutoencoder:
    """A compiled Wan with random weights, in float32 on two threads unless told otherwise."""
    settings = {"target": "cpu", "dtype": "float32", "num_threads": 2, **options}
    compiled = RBLNAutoencoder.from_model(tiny_vaes.make("AutoencoderKLWan"), rbln_config=settings)
    assert isinstance(compiled, RBLNVideoAutoencoder)
    return compiled


def write_variable(path: Path, pictures: Iterable[Tensor]) -> None:
    """Write five pictures `(H, W, 3)` as a video whose frames don't follow at one rate."""
    tick = Fraction(1, 1000)
    first, *others = pictures
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        stream.time_base = tick
        for time, picture in zip((0, 33, 67, 200, 233), (first, *others), strict=True):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
