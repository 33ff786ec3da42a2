"""Reads and writes videos frame by frame: files that PyAV opens, or numbered PNG pictures.

PyAV is the extra `video`: `pip install rbln-vae[video]`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import RBLNRuntimeError
from .files import atomic_path
from .levels import levels_of

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""The formats of files that are written, by their suffixes."""

QUALITY = 17
"""The constant rate factor of H.264: 0 is lossless, and about 18 looks so."""


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a video: a file of `FORMATS`, or a pattern such as `out/%05d.png`."""
    return Path(path).suffix.lower() in FORMATS or is_pattern(path)


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a place for the number of a picture."""
    try:
        return Path(path).name % 7 != Path(path).name
    except (TypeError, ValueError):
        return False


def write_video(path: str | os.PathLike[str], frames: Iterable[Tensor], fps: float = 16.0) -> int:
    """Write a video frame by frame, so that only one is in memory.

    A file is written beside its place and renamed at the end: where anything fails, nothing is
    left. Of pictures, each is there as a whole or not at all.

    Args:
        path: A file of `FORMATS`, in H.264 with 4:2:0 colours; or a pattern such as
            `out/%05d.png`, for numbers from 0. The directory must exist.
        frames: Samples `(3, H, W)` or `(1, 3, H, W)` in `[-1, 1]`, as `decode_frames` yields
            them; or pictures `(H, W, 3)` of uint8. All have the same size.
        fps: Frames per second, by default 16. Pictures have no rate.

    Returns:
        The number of frames.

    Raises:
        ValueError: There are no frames, or they or the path are wrong; sides must be even in
            files.
        OSError: The file can't be written.
        RBLNRuntimeError: PyAV is not installed.

    Example:
        >>> write_video("out.mp4", vae.decode_frames(latent), fps=16)  # doctest: +SKIP
    """
    path = Path(path)
    pictures = map(_picture, frames)
    if is_pattern(path):
        return _write_pictures(path, pictures)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path}: expected a file with one of {', '.join(FORMATS)}, or a pattern such as "
            "out/%05d.png."
        )
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}: expected a positive number of frames per second.")
    with atomic_path(path) as temporary:
        return _write_file(temporary, FORMATS[path.suffix.lower()], pictures, fps)


def _write_pictures(path: Path, pictures: Iterable[Tensor]) -> int:
    count = 0
    for count, picture in enumerate(pictures, 1):
        with atomic_path(path.with_name(path.name % (count - 1))) as temporary:
            Image.fromarray(picture.numpy()).save(temporary, "PNG")
    return _some(count)


def _write_file(path: Path, kind: str, pictures: Iterator[Tensor], fps: float) -> int:
    av = _av()
    count = 0
    with av.open(str(path), "w", format=kind) as container:
        stream: Any = None
        for picture in pictures:
            height, width, _ = picture.shape
            if stream is None:
                if height % 2 or width % 2:
                    raise ValueError(
                        f"The frames are {height}x{width}, and videos have even sides. Write "
                        "pictures instead, such as out/%05d.png."
                    )
                rate = Fraction(fps).limit_denominator(100_000)
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.options = {"crf": str(QUALITY)}
            elif (height, width) != (stream.height, stream.width):
                raise ValueError(
                    f"A frame is {height}x{width}, and those before it {stream.height}x"
                    f"{stream.width}: all frames of a video have the same size."
                )
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
            count += 1
        if stream is not None:
            container.mux(stream.encode())
    return _some(count)


def _some(count: int) -> int:
    if not count:
        raise ValueError("There are no frames to write.")
    return count


def _picture(frame: Tensor) -> Tensor:
    """A frame as a picture `(H, W, 3)`."""
    if frame.dtype != torch.uint8:
        frame = frame[0] if frame.dim() == 4 and len(frame) == 1 else frame
        frame = levels_of(frame).movedim(0, -1) if frame.dim() == 3 else frame
    if frame.dim() != 3 or frame.shape[-1] != 3:
        raise ValueError(
            f"A frame has the shape {tuple(frame.shape)}, expected (3, H, W), or pictures "
            "(H, W, 3) of uint8."
        )
    return frame.cpu().contiguous()


def read_video(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Read a video frame by frame.

    Args:
        path: Any file that PyAV opens.

    Yields:
        Pictures `(H, W, 3)` of uint8.

    Raises:
        ValueError: It is no video, it is damaged, or its rate varies: its frames are then not
            those that a model of a fixed rate expects.
        RBLNRuntimeError: PyAV is not installed.

    Example:
        >>> frames = (picture[None] for picture in read_video("clip.mp4"))
        >>> moments = vae.encode_frames(frames)  # doctest: +SKIP
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video.")
            times: list[Fraction] = []
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    raise ValueError(f"{path} is damaged: a frame can't be decoded as a whole.")
                if frame.pts is not None and frame.time_base:
                    times.append(frame.pts * frame.time_base)
                _check_rate(path, times[-3:], frame.time_base)
                yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except av.FFmpegError as error:
        raise ValueError(f"{path} can't be read as a video: {error}") from error


def _check_rate(path: Any, times: list[Fraction], tick: Fraction | None) -> None:
    """Raise unless the last three frames follow each other at the same rate."""
    if len(times) < 3:
        return
    first, second = (b - a for a, b in itertools.pairwise(times))
    # Times are rounded to ticks, and a frame and its rate differ by one at most.
    if abs(second - first) > 2 * (tick or 0):
        raise ValueError(
            f"{path} has a variable frame rate: frames follow after {float(first):.3f} s and then "
            f"after {float(second):.3f} s. Convert it first, for example by "
            f"ffmpeg -i {path} -vf fps=16 constant.mp4."
        )


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise RBLNRuntimeError(
            "Videos need PyAV, which is not installed. Run pip install 'rbln-vae[video]'."
        ) from None
