"""Reads and writes videos frame by frame: files that PyAV opens, or numbered PNG pictures.

While frames are written on a thread of their own, the caller's thread makes the next ones: what
decodes them and what compresses them both have work.

PyAV is the extra `video`: `pip install rbln-vae[video]`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .errors import RBLNRuntimeError
from .files import atomic_path
from .levels import levels_of

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""The formats of files that are written, by their suffixes."""

QUALITY = 17
"""The constant rate factor of H.264: 0 is lossless, and about 18 looks so."""

_STREAMED = {
    # A fragment for each frame, sent on at once; nothing is written again at the end.
    "movflags": "frag_every_frame+empty_moov+default_base_moof",
    "flush_packets": "1",
}
_MOST_AHEAD = 2
"""The frames that wait to be written: enough that both sides always have work."""

Frame: TypeAlias = Tensor | NDArray[Any]
"""What `write_video` takes of each frame."""

Item = TypeVar("Item")


class Writable(Protocol):
    """What takes the bytes of a file one after the other: a socket's file, a pipe, `io.BytesIO`."""

    def write(self, data: bytes, /) -> Any:
        """Take the next bytes; called on a thread of its own."""


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a video: a file of `FORMATS`, or a pattern such as `out/%05d.png`."""
    return Path(path).suffix.lower() in FORMATS or is_pattern(path)


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a place for the number of a picture."""
    try:
        return Path(path).name % 7 != Path(path).name
    except (TypeError, ValueError):
        return False


def write_video(
    path: str | os.PathLike[str] | Writable, frames: Iterable[Frame], fps: float = 16.0
) -> int:
    """Write a video frame by frame, so that only a few are in memory.

    The calling thread makes the frames, and another one writes those before. A file is written
    beside its place and renamed at the end: where anything fails, nothing is left. Of pictures,
    each is there as a whole or not at all.

    Args:
        path: A file of `FORMATS`, in H.264 with 4:2:0 colours; or a pattern such as
            `out/%05d.png`, for numbers from 0. The directory must exist. What has a method
            `write`, such as a pipe, gets an MP4 in fragments, each frame as soon as it is there.
        frames: Samples `(3, H, W)` or `(1, 3, H, W)` in `[-1, 1]`, as `decode_frames` yields
            them; or pictures `(H, W, 3)` of uint8. Tensors or NumPy's arrays of the same size.
            Where pictures are written, a fourth channel is the opacity; files have none.
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
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}: expected a positive number of frames per second.")
    if not isinstance(path, (str, os.PathLike)):
        return _write_file(path, "mp4", frames, fps, {"tune": "zerolatency"}, _STREAMED)
    path = Path(path)
    if is_pattern(path):
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path}: pictures are written as PNG. Name them {path.stem}.png.")
        return _write_pictures(path, frames)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path}: expected a file with one of {', '.join(FORMATS)}, or a pattern such as "
            "out/%05d.png."
        )
    with atomic_path(path) as temporary:
        return _write_file(temporary, FORMATS[path.suffix.lower()], frames, fps)


def _write_pictures(path: Path, frames: Iterable[Frame]) -> int:
    def write(numbered: tuple[int, Image.Image]) -> None:
        number, picture = numbered
        with atomic_path(path.with_name(path.name % number)) as temporary:
            picture.save(temporary, "PNG")

    # The pictures are copies: whoever makes the frames may write to them again.
    copies = (Image.fromarray(_picture(frame, 3, 4).numpy()).copy() for frame in frames)
    return _some(_each_meanwhile(write, enumerate(copies)))


def _write_file(
    to: str | os.PathLike[str] | Writable,
    kind: str,
    frames: Iterable[Frame],
    fps: float,
    codec: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
) -> int:
    av = require_pyav()
    with av.open(to, "w", format=kind, options=dict(container or {})) as file:
        stream: Any = None

        def copies() -> Iterator[Any]:
            nonlocal stream
            for frame in frames:
                picture = _picture(frame, 3)
                height, width, _ = picture.shape
                if stream is None:
                    if height % 2 or width % 2:
                        raise ValueError(
                            f"The frames are {height}x{width}, and videos have even sides. Write "
                            "pictures instead, such as out/%05d.png."
                        )
                    rate = Fraction(fps).limit_denominator(100_000)
                    stream = file.add_stream("libx264", rate=rate)
                    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                    stream.options = {"crf": str(QUALITY), **(codec or {})}
                elif (height, width) != (stream.height, stream.width):
                    raise ValueError(
                        f"A frame is {height}x{width}, and those before it {stream.height}x"
                        f"{stream.width}: all frames of a video have the same size."
                    )
                yield av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")

        count = _some(_each_meanwhile(lambda frame: file.mux(stream.encode(frame)), copies()))
        file.mux(stream.encode())
    return count


def _each_meanwhile(work: Callable[[Item], None], items: Iterable[Item]) -> int:
    """Work on each item on another thread, in order, while this one makes the next; count them.

    What is made already is still worked on if the next item fails; if the work fails, none is.
    """
    waiting: deque[Future[None]] = deque()
    failed = False
    count = 0

    def unless_failed(item: Item) -> None:
        nonlocal failed
        if failed:
            return
        failed = True  # unless this succeeds
        work(item)
        failed = False

    with ThreadPoolExecutor(1, "write-video") as thread:
        for item in items:
            waiting.append(thread.submit(unless_failed, item))
            count += 1
            while waiting and (waiting[0].done() or len(waiting) > _MOST_AHEAD):
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    return count


def _some(count: int) -> int:
    if not count:
        raise ValueError("There are no frames to write.")
    return count


def _picture(frame: Frame, *channels: int) -> Tensor:
    """A frame as a picture `(H, W, C)` of one of some numbers of channels."""
    if not isinstance(frame, Tensor):
        frame = torch.from_numpy(np.array(frame, order="C"))  # whatever its strides and flags
    if frame.dtype != torch.uint8:
        frame = frame[0] if frame.dim() == 4 and len(frame) == 1 else frame
        frame = levels_of(frame).movedim(0, -1) if frame.dim() == 3 else frame
    if frame.dim() != 3 or frame.shape[-1] not in channels:
        raise ValueError(
            f"A frame has the shape {tuple(frame.shape)}, expected (3, H, W), or pictures "
            "(H, W, 3) of uint8. Opacity is kept in pictures, such as out/%05d.png."
        )
    return frame.cpu().contiguous()


@dataclass(frozen=True)
class VideoHead:
    """What a video says of itself before its frames.

    Attributes:
        height: Rows of a frame.
        width: Columns of a frame.
        fps: Frames per second; `None` if it doesn't tell.
    """

    height: int
    width: int
    fps: float | None


def read_head(path: str | os.PathLike[str] | BinaryIO) -> VideoHead:
    """Read what a video says of itself.

    Args:
        path: As of `read_video`.

    Raises:
        ValueError: It is no video.
        OSError: It can't be read.
        RBLNRuntimeError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate
        size = stream.height, stream.width
        first = next(container.decode(stream), None)
        if first is not None and _quarter_turns(first) % 2:
            size = size[::-1]
        return VideoHead(*size, None if rate is None else float(rate))


def read_video(path: str | os.PathLike[str] | BinaryIO) -> Iterator[Tensor]:
    """Read a video frame by frame.

    Args:
        path: Any file that PyAV opens, by its name or open.

    Yields:
        Pictures `(H, W, 3)` of uint8, turned as the file says, as phones write it.

    Raises:
        ValueError: It is no video, it is damaged, or its rate varies: its frames are then not
            those that a model of a fixed rate expects.
        OSError: It can't be read.
        RBLNRuntimeError: PyAV is not installed.

    Example:
        >>> frames = (picture[None] for picture in read_video("clip.mp4"))
        >>> moments = vae.encode_frames(frames)  # doctest: +SKIP
    """
    with _opened(path) as (container, stream):
        times: list[Fraction] = []
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"{_name(path)} is damaged: a frame can't be decoded as a whole.")
            if frame.pts is not None and frame.time_base:
                times = [*times[-2:], frame.pts * frame.time_base]
            _check_rate(_name(path), times, frame.time_base)
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            turns = _quarter_turns(frame)
            yield picture.rot90(turns) if turns else picture  # rot90 copies


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The open file and its first video; what PyAV finds wrong with it is a `ValueError`."""
    av = require_pyav()
    try:
        with av.open(str(path) if isinstance(path, os.PathLike) else path) as container:
            if not container.streams.video:
                raise ValueError(f"{_name(path)} has no video.")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # of the disk, which says nothing of the video
            raise
        raise ValueError(f"{_name(path)} can't be read as a video: {error}") from error


def _quarter_turns(frame: Any) -> int:
    """By how many quarters of a turn a frame is shown counterclockwise."""
    return round(int(frame.rotation) / 90)


def _name(path: str | os.PathLike[str] | BinaryIO) -> str:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else "the video"


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


def require_pyav() -> Any:
    """Import PyAV.

    Raises:
        RBLNRuntimeError: It is not installed.
    """
    try:
        return importlib.import_module("av")
    except ImportError:
        raise RBLNRuntimeError(
            "Videos need PyAV, which is not installed. Run pip install 'rbln-vae[video]'."
        ) from None
