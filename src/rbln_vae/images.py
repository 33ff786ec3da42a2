"""Converts picture files to the tensors of a VAE and back.

A model needs RGB in `[-1, 1]` with sides that are multiples of its scale factor. `load_image`
converts the colours of any file, and `Fitting` changes the size and can undo that, so that a
result gets the size of the original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .levels import levels_of, sample_of
from .sizes import Placement, Size, check_image_size, format_size

FitMode: TypeAlias = Literal["pad", "resize", "crop"]
FIT_MODES: tuple[FitMode, ...] = ("pad", "resize", "crop")

_BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError)
"""Exceptions of Pillow's decoders for damaged files, besides Pillow's own."""


def load_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read a picture as upright RGB, 8 bits a channel.

    Transparent pixels are composited on white, only the first frame of an animation is read,
    and the EXIF orientation is applied. Grey levels of 16 bits are scaled to 8 bits. Grey
    levels in floating point range from 0 to 1, or from 0 to 255 if any exceeds 1. Colour
    profiles are ignored.

    Args:
        source: A path, or a file open for reading bytes.

    Raises:
        FileNotFoundError: There is no such file.
        PIL.UnidentifiedImageError: The file isn't a picture, is damaged, or holds what
            has no meaning as a colour.

    Example:
        >>> pixels = to_tensor(load_image("photo.jpg"))
    """
    with warnings.catch_warnings():
        # Warnings about large pictures, which are welcome here, and about odd metadata.
        warnings.simplefilter("ignore")
        with open_image(source) as image:
            return upright_rgb(image)


@contextlib.contextmanager
def open_image(
    source: str | os.PathLike[str] | IO[bytes], formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open a picture without decoding it, so that its size can be checked first.

    Args:
        source: A path, or a file open for reading bytes.
        formats: Names of the formats that are read. By default all that Pillow knows.

    Yields:
        The picture as Pillow opens it. If the block raises because the file is damaged, the
        exception becomes an `UnidentifiedImageError`. Pillow's warnings are not filtered,
        because filters apply to the whole process and are not thread-safe.

    Raises:
        FileNotFoundError: There is no such file.
        PIL.UnidentifiedImageError: The file isn't a picture, is damaged, or holds what
            has no meaning as a colour.

    Example:
        >>> with open_image("photo.jpg") as image:
        ...     pixels = upright_rgb(image)
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the image"
    try:
        with Image.open(source, formats=formats) as image:
            yield image
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError:
        raise UnidentifiedImageError(
            f"{name} is not a picture in a format that Pillow reads; convert it to PNG or JPEG"
        ) from None
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise UnidentifiedImageError(f"{name} can't be read as a picture: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an open picture as `load_image` does: upright RGB, 8 bits per channel."""
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit integers or floating point to 8-bit grey levels."""
    levels = np.asarray(image, dtype=np.float64)
    low, high = float(levels.min()), float(levels.max())
    white = 65535.0 if image.mode != "F" else 255.0 if high > 1 else 1.0
    # Written so that NaN fails, too.
    if not (low >= 0 and high <= white):
        raise ValueError(f"its levels go from {low:g} to {high:g}, expected 0 to {white:g}")
    return Image.fromarray(np.round(levels * (255 / white)).astype(np.uint8))


def to_levels(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB picture as uint8 `(1, H, W, 3)`, as encoders take them.

    Raises:
        ValueError: The picture is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, found {image.mode}; load_image makes one")
    return torch.from_numpy(np.array(image)).unsqueeze(0)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB picture as float32 `(1, 3, H, W)` in `[-1, 1]`.

    Raises:
        ValueError: The picture is not RGB.
    """
    return sample_of(to_levels(image).permute(0, 3, 1, 2)).contiguous()


def check_takes_pictures(channels: int) -> None:
    """Raise a `ValueError` if a model takes neither 3 channels nor 4."""
    if channels not in (3, 4):
        raise ValueError(
            f"pictures have 3 channels, or 4 with their opacity, and this model takes {channels}; "
            "use it from Python, with tensors"
        )


def with_opacity(levels: torch.Tensor, channels: int) -> torch.Tensor:
    """RGB pictures as an encoder takes them: with an opaque fourth channel if it has one.

    Args:
        levels: uint8 `(N, H, W, 3)`.
        channels: The channels that the model takes.

    Raises:
        ValueError: The model takes neither 3 nor 4.
    """
    check_takes_pictures(channels)
    if channels == 3:
        return levels
    return torch.cat([levels, torch.full_like(levels[..., :1], 255)], dim=3)


def from_levels(levels: torch.Tensor) -> Image.Image:
    """Convert uint8 `(1, H, W, 3)`, as `decode_images` gives, to a picture.

    Args:
        levels: A fourth channel is the opacity.

    Raises:
        ValueError: The shape is another one.
    """
    shape = tuple(levels.shape)
    if len(shape) != 4 or shape[0] != 1 or shape[3] not in (3, 4):
        raise ValueError(f"expected one picture (1, H, W, 3), or of 4 channels, found {shape}")
    return Image.fromarray(levels[0].numpy())


def to_image(sample: torch.Tensor) -> Image.Image:
    """Convert a sample to a picture; values outside `[-1, 1]` are clipped.

    Args:
        sample: `(3, H, W)` or `(1, 3, H, W)`, floating point; -1 is black and 1 is white. A
            fourth channel is the opacity.

    Raises:
        ValueError: The shape is another one, or a value is not finite.
    """
    shape = tuple(sample.shape)
    if sample.ndim == 4 and shape[0] == 1:
        sample = sample[0]
    if sample.ndim != 3 or sample.shape[0] not in (3, 4):
        raise ValueError(
            f"expected one sample (3, H, W) or (1, 3, H, W), or of 4 channels, found {shape}"
        )
    sample = sample.detach().to("cpu", torch.float32)
    if not torch.isfinite(sample).all():
        raise ValueError("the sample holds values that aren't finite")
    return from_levels(levels_of(sample).permute(1, 2, 0).contiguous().unsqueeze(0))


@dataclass(frozen=True)
class Fitting(Placement):
    """Fits a picture to a size that a model accepts, and undoes it.

    Where the scaled picture is too small, it is padded with copies of its last row and column.

    Attributes:
        mode: The requested mode.

    Example:
        >>> fitting = Fitting.plan((333, 500), multiple=8)
        >>> fitting.size
        (336, 504)
        >>> x = to_tensor(fitting.apply(image))
        >>> result = fitting.undo(to_image(model(x).sample))
    """

    mode: FitMode

    @classmethod
    def plan(
        cls, original: Size, *, multiple: int, mode: FitMode = "pad", size: Size | None = None
    ) -> Fitting:
        """Choose how to fit a picture.

        Args:
            original: The size of the picture.
            multiple: The number of which both sides must be a multiple: the model's scale
                factor.
            mode: `"pad"` (default) keeps the whole picture and its proportions, `"crop"` keeps
                the proportions and crops, `"resize"` keeps the whole picture and stretches it.
            size: The size to reach; by default the nearest to that of the picture, so that
                only `"resize"` scales it.

        Raises:
            ValueError: `size` is not a multiple, the mode is unknown, or the picture
                is too small to be cropped.
        """
        if mode not in FIT_MODES:
            raise ValueError(f"expected a fit of {', '.join(FIT_MODES)}, found {mode!r}")
        if size is None:
            size = _nearest(original, multiple, mode)
            scaled = size if mode == "resize" else original
        else:
            check_image_size(size, multiple)
            scaled = _scaled(original, size, mode)
        height, width = (max(0, s - t) // 2 for s, t in zip(scaled, size, strict=True))
        return cls(original, scaled, (height, width), size, mode)

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture in the size for the model.

        Raises:
            ValueError: The picture does not have the size `original`.
        """
        _require_size(image, self.original)
        image = _resize(image, self.scaled)
        top, left = self.offset
        height, width = self.size
        right, bottom = min(left + width, image.width), min(top + height, image.height)
        image = image.crop((left, top, right, bottom))
        missing = ((0, height - image.height), (0, width - image.width), (0, 0))
        return Image.fromarray(np.pad(np.asarray(image), missing, mode="edge"))

    @property
    def content(self) -> Size:
        """The size of the picture without padding, from the upper left corner of `size`."""
        height, width = (min(a, b) for a, b in zip(self.scaled, self.size, strict=True))
        return height, width

    def undo(self, image: Image.Image) -> Image.Image:
        """A result of the model at the scale of the original, without padding.

        Cropped parts are lost, so the result shows only the part that was kept.

        Raises:
            ValueError: The picture does not have the size `size`.
        """
        _require_size(image, self.size)
        height, width = self.content
        image = image.crop((0, 0, width, height))
        # Undo the scaling of each side.
        back = (
            round(height * self.original[0] / self.scaled[0]),
            round(width * self.original[1] / self.scaled[1]),
        )
        return _resize(image, (max(1, back[0]), max(1, back[1])))

    def to_dict(self) -> dict[str, Any]:
        """The fitting as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Fitting:
        """Read the result of `to_dict`.

        Raises:
            ValueError: `stored` does not describe a fitting.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if set(stored) != set(names) or stored["mode"] not in FIT_MODES:
            raise ValueError(f"expected a fitting with {', '.join(names)}, found {stored!r}")
        sizes = {name: _stored_size(stored[name]) for name in names if name != "mode"}
        return cls(mode=stored["mode"], **sizes)


def _stored_size(item: Any) -> Size:
    match item:
        case [int(height), int(width)] if height >= 0 and width >= 0:
            return height, width
    raise ValueError(f"expected a height and a width, found {item!r}")


def _nearest(original: Size, multiple: int, mode: FitMode) -> Size:
    rounded: dict[FitMode, Callable[[int], int]] = {
        "pad": lambda side: -(-side // multiple),
        "crop": lambda side: side // multiple,
        "resize": lambda side: max(1, round(side / multiple)),
    }
    height, width = (rounded[mode](side) * multiple for side in original)
    if not (height and width):
        raise ValueError(
            f"a picture of {format_size(original)} is too small to be cropped to multiples of "
            f"{multiple}; pad or resize it"
        )
    return height, width


def _scaled(original: Size, size: Size, mode: FitMode) -> Size:
    if mode == "resize":
        return size
    ratios = [target / side for target, side in zip(size, original, strict=True)]
    pick = min if mode == "pad" else max
    ratio = pick(ratios)
    height, width = (max(1, round(side * ratio)) for side in original)
    return height, width


def _require_size(image: Image.Image, size: Size) -> None:
    found = (image.height, image.width)
    if found != size:
        raise ValueError(f"expected a picture of {format_size(size)}, found {format_size(found)}")


def _resize(image: Image.Image, size: Size) -> Image.Image:
    height, width = size
    if (image.height, image.width) == size:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def error_image(image: Image.Image, other: Image.Image, gain: float = 8) -> Image.Image:
    """A picture of the absolute difference of two RGB pictures, times `gain` (default 8).

    Raises:
        ValueError: Their sizes differ.
    """
    _require_size(other, (image.height, image.width))
    difference = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    return Image.fromarray((difference * gain).clip(0, 255).astype(np.uint8))


def side_by_side(panels: Mapping[str, Image.Image]) -> Image.Image:
    """A row of RGB pictures on white, each under its label."""
    tallest = max(panel.height for panel in panels.values())
    letters = max(14, min(tallest // 24, 40))
    gap, bar = letters // 2, 2 * letters
    font = ImageFont.load_default(letters)
    widths = [max(p.width, round(font.getlength(label))) for label, p in panels.items()]
    row = Image.new("RGB", (sum(widths) + gap * (len(panels) - 1), tallest + bar), "white")
    draw = ImageDraw.Draw(row)
    left = 0
    for (label, panel), width in zip(panels.items(), widths, strict=True):
        draw.text((left, bar // 2), label, fill="black", font=font, anchor="lm")
        row.paste(panel, (left, bar))
        left += width + gap
    return row
