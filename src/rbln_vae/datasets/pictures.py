"""A sample of a source made ready for the encoder: read, decoded, scaled and cropped."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ..images import open_image, upright_rgb
from ..sizes import Placement, Size, format_size
from ..videos import read_head, read_video
from .buckets import Placer
from .options import Options
from .sources import Sample
from .sources.files import read_file, read_sidecars
from .trainers import Trainer

_ORIENTATION = 0x0112  # of EXIF; from 5 on, height and width change places
_GAP = 2
"""How much larger than what is wanted a JPEG is decoded at least."""

_LONG = 8
"""How many times the size of its bucket an image may be while it is scaled."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class Prepared:
    """An image as the encoder takes it.

    Attributes:
        key: Of the sample.
        caption: Of the sample.
        columns: Of the sample.
        placement: How the image was scaled and cropped.
        pixels: uint8 `(H, W, 3)`.
        mirrored: The same of the mirrored image, if it isn't the mirror image of `pixels`.
        opacity: uint8 `(H, W)`, if it is kept.
    """

    key: str
    caption: str | None
    columns: Mapping[str, Any]
    placement: Placement
    pixels: npt.NDArray[np.uint8]
    mirrored: npt.NDArray[np.uint8] | None = None
    opacity: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Clip:
    """A video as the encoder takes it, whose frames are not read yet.

    Attributes:
        key: Of the sample.
        caption: Of the sample.
        columns: Of the sample.
        placement: How each frame is scaled and cropped.
        file: The path of the video, or its bytes.
        fps: Its frames per second, if it tells.
    """

    key: str
    caption: str | None
    columns: Mapping[str, Any]
    placement: Placement
    file: str | bytes
    fps: float | None

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The frames, each uint8 `(H, W, 3)`, scaled and cropped.

        Raises:
            ValueError: It is damaged, or its rate or its size varies.
            OSError: It can't be read.
        """
        for number, frame in enumerate(read_video(_readable(self.file))):
            if tuple(frame.shape[:2]) != self.placement.original:
                raise ValueError(
                    f"its frame {number} is {format_size(frame.shape[:2])}, and those before it "
                    f"{format_size(self.placement.original)}"
                )
            picture = Image.fromarray(frame.numpy())
            yield np.array(_scaled(picture, self.placement, (0, 0, *picture.size)))


@dataclass(frozen=True)
class Rejected:
    """A sample that can't be encoded, and why."""

    key: str
    reason: str


UNREADABLE = (FileNotFoundError, IsADirectoryError, PermissionError)
"""What is wrong with one file alone. Other errors of reading may be of the disk."""


def unreadable(key: str, error: OSError) -> Rejected:
    """A sample whose file raised one of `UNREADABLE`."""
    return Rejected(key, f"it can't be read: {error.strerror or error}")


class _UnfitError(Exception):
    """An image isn't one that is wanted."""


def prepare(sample: Sample, options: Options, sizing: Placer) -> Prepared | Clip | Rejected:
    """Read and decode a sample, and give it the size of its bucket.

    Of a video only the head is read; its frames are when it is encoded.

    Args:
        sample: What a source gave.
        options: What is made of it.
        sizing: The buckets, or the trainer that prepares images in its own way.

    Raises:
        Exception: Its file can't be read at present; a file that is missing or that may not
            be read is rejected instead.
    """
    if sample.error is not None:
        return Rejected(sample.key, sample.error)
    try:
        caption, columns = _with_sidecars(sample)
        if options.frames is not None:
            return _as_clip(sample, caption, columns, options, sizing)
        content = sample.image if isinstance(sample.image, bytes) else read_file(sample.image)
    except UNREADABLE as error:
        return unreadable(sample.key, error)
    except (ValueError, _UnfitError) as error:
        return Rejected(sample.key, str(error))
    try:
        with open_image(io.BytesIO(content)) as image:
            _check((image.height, image.width), options)
            if isinstance(sizing, Trainer):
                return _as_trainer(sample, image, options, sizing)
            turn = image.getexif().get(_ORIENTATION, 1) if isinstance(image, JpegImageFile) else 0
            drafted = None
            if turn and options.prescale:
                drafted = _draft(image, turn, sample.key, options, sizing)
            picture = upright_rgb(image)
    except (UnidentifiedImageError, _UnfitError) as error:
        return Rejected(sample.key, str(error))
    except MemoryError:
        raise  # which says nothing of the image
    except Exception as error:
        # Damage leads decoders to errors of every kind, and none must end the job.
        return Rejected(sample.key, f"its decoder failed: {type(error).__name__}: {error}")
    if drafted is None:
        size = picture.height, picture.width
        placement = sizing.place(size, sample.key, options.crop, options.seed)
        box = None
    else:
        placement, box = drafted
    pixels = np.array(_scaled(picture, placement, box or (0, 0, *picture.size)))
    return Prepared(sample.key, caption, columns, placement, pixels)


def _as_clip(
    sample: Sample,
    caption: str | None,
    columns: Mapping[str, Any],
    options: Options,
    sizing: Placer,
) -> Clip:
    """Open a video, and choose the size of its frames."""
    file = sample.image
    if isinstance(file, str) and "://" in file:
        file = read_file(file)
    head = read_head(_readable(file))
    size = head.height, head.width
    _check(size, options)
    placement = sizing.place(size, sample.key, options.crop, options.seed)
    return Clip(sample.key, caption, columns, placement, file, head.fps)


def _readable(file: str | bytes) -> str | io.BytesIO:
    return file if isinstance(file, str) else io.BytesIO(file)


def _as_trainer(sample: Sample, image: Image.Image, options: Options, trainer: Trainer) -> Prepared:
    """Prepare an open picture as a trainer does."""
    if isinstance(sample.image, str) and not sample.image.endswith(sample.key):
        raise _UnfitError("its name isn't UTF-8")
    image.load()
    picture = trainer.read(image)
    try:
        place = trainer.place((picture.height, picture.width))
    except ValueError as error:
        raise _UnfitError(str(error)) from None
    if place.scaled[0] * place.scaled[1] > options.max_pixels:
        raise _UnfitError(
            f"it would be scaled to {format_size(place.scaled)}, which is more than max_pixels "
            f"{options.max_pixels}"
        )

    def cut(picture: Image.Image) -> npt.NDArray[np.uint8]:
        (row, column), (height, width) = place.offset, place.size
        return trainer.scale(picture, place.scaled)[row : row + height, column : column + width]

    pixels, mirrored = cut(picture), None
    if options.flip and trainer.mirrors_first:
        mirrored = cut(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[..., :3].copy()
    return Prepared(
        sample.key,
        sample.caption,
        sample.columns,
        place,
        pixels[..., :3].copy(),
        mirrored,
        pixels[..., 3].copy() if options.alpha_mask else None,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore what Pillow says of large pictures and odd metadata, in all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _with_sidecars(sample: Sample) -> tuple[str | None, Mapping[str, Any]]:
    beside = ((name.rpartition(".")[2].lower(), read_file(name)) for name in sample.sidecars)
    return read_sidecars(beside, sample.caption, sample.columns)


def _scaled(picture: Image.Image, placement: Placement, box: Box) -> Image.Image:
    """Scale a picture, and crop it.

    Args:
        picture: Upright.
        placement: Where it comes to.
        box: Which part of it is the image.
    """
    (row, column), (height, width) = placement.offset, placement.size
    if placement.scaled[0] * placement.scaled[1] <= _LONG * height * width:
        if picture.size != placement.scaled[::-1]:
            picture = picture.resize(placement.scaled[::-1], Image.Resampling.LANCZOS, box)
        return picture.crop((column, row, column + width, row + height))
    # The whole of a long and narrow image would be enormous: what is kept alone is computed.
    left, top, right, bottom = box
    across, down = (right - left) / placement.scaled[1], (bottom - top) / placement.scaled[0]
    region = (
        left + column * across,
        top + row * down,
        min(left + (column + width) * across, right),
        min(top + (row + height) * down, bottom),
    )
    return picture.resize((width, height), Image.Resampling.LANCZOS, region)


def _check(size: Size, options: Options) -> None:
    """Look at the size before anything is decoded."""
    if size[0] * size[1] > options.max_pixels:
        raise _UnfitError(
            f"it is {format_size(size)}, which is more than max_pixels {options.max_pixels}"
        )
    if min(size) < options.min_side:
        raise _UnfitError(
            f"it is {format_size(size)}, which is less than min_side {options.min_side}"
        )


def _draft(
    image: Image.Image, turn: int, key: str, options: Options, sizing: Placer
) -> tuple[Placement, Box | None]:
    """Choose size and crop of a JPEG from its header, and have it decoded at a fraction.

    Returns:
        The placement, and which part of the upright picture is the image: a fraction of its
        sides needn't be whole, and pixels beyond it would shift what is scaled.
    """
    sideways = turn in (5, 6, 7, 8)
    original = (image.width, image.height) if sideways else (image.height, image.width)
    placement = sizing.place(original, key, options.crop, options.seed)
    across, down = placement.scaled if sideways else placement.scaled[::-1]
    found = image.draft(None, (across * _GAP, down * _GAP))
    if found is None:
        return placement, None
    _, _, width, height = found[1]
    right, below = image.width - width, image.height - height
    left = right if turn in (2, 3) else below if turn in (6, 7) else 0.0
    top = below if turn in (3, 4) else right if turn in (7, 8) else 0.0
    if sideways:
        width, height = height, width
    return placement, (left, top, left + width, top + height)
