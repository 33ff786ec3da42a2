"""Pictures in files, as the tensors that a VAE takes and gives.

A model wants RGB in `[-1, 1]` with sides that are multiples of its scale factor; a file
holds anything. `load_image` makes the colours right, `Fitting` the size, and each
remembers or says what it did, so that a result can be given the size of the original.
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

from .config import check_image_size
from .sizes import Placement, Size, format_size

FitMode: TypeAlias = Literal["pad", "resize", "crop"]
FIT_MODES: tuple[FitMode, ...] = ("pad", "resize", "crop")

_BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError)
"""What Pillow's decoders raise on damaged files, beside its own exceptions."""


def load_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read a picture as upright RGB, 8 bits a channel.

    What is transparent is laid on white; of an animation the first frame is taken; the
    orientation that EXIF gives is applied. Grey levels of 16 bits are scaled to 8; those
    in floating point are taken as 0 to 1, or as 0 to 255 if one of them exceeds 1. Colour
    profiles are not applied.

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
        # About large pictures, which are welcome here, and about odd metadata.
        warnings.simplefilter("ignore")
        with open_image(source) as image:
            return upright_rgb(image)


@contextlib.contextmanager
def open_image(
    source: str | os.PathLike[str] | IO[bytes], formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open a picture without decoding it, so that its size can be looked at first.

    Args:
        source: A path, or a file open for reading bytes.
        formats: Names of the formats that are read. By default all that Pillow knows.

    Yields:
        The picture as Pillow opens it. What the block raises because the file is damaged
        becomes an `UnidentifiedImageError`. Pillow's warnings are the caller's to filter,
        which is done for a whole process and so not in each of several threads.

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
    """What `load_image` makes of an open picture: upright RGB, 8 bits a channel."""
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
    """Eight bits from whole numbers of 16 bits, or from floating point."""
    levels = np.asarray(image, dtype=np.float64)
    low, high = float(levels.min()), float(levels.max())
    white = 65535.0 if image.mode != "F" else 255.0 if high > 1 else 1.0
    # Written so that nan fails too.
    if not (low >= 0 and high <= white):
        raise ValueError(f"its levels go from {low:g} to {high:g}, expected 0 to {white:g}")
    return Image.fromarray(np.round(levels * (255 / white)).astype(np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB picture, float32 `(1, 3, H, W)` in `[-1, 1]`.

    Raises:
        ValueError: The picture isn't RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, found {image.mode}; load_image makes one")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.float() / 127.5 - 1).unsqueeze(0).contiguous()


def to_image(sample: torch.Tensor) -> Image.Image:
    """The picture that a sample shows; what lies outside `[-1, 1]` is clipped.

    Args:
        sample: `(3, H, W)` or `(1, 3, H, W)`, floating point, -1 black and 1 white.

    Raises:
        ValueError: Another shape, or values that aren't finite.
    """
    shape = tuple(sample.shape)
    if sample.ndim == 4 and shape[0] == 1:
        sample = sample[0]
    if sample.ndim != 3 or sample.shape[0] != 3:
        raise ValueError(f"expected one RGB sample (3, H, W) or (1, 3, H, W), found {shape}")
    sample = sample.detach().to("cpu", torch.float32)
    if not torch.isfinite(sample).all():
        raise ValueError("the sample holds values that aren't finite")
    levels = ((sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


@dataclass(frozen=True)
class Fitting(Placement):
    """How a picture is given a size that a model takes, and how that is undone.

    Where the scaled picture is too small, it is continued with its last row and column.

    Attributes:
        mode: What was asked for.

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
        """Choose how a picture is fitted.

        Args:
            original: The size of the picture.
            multiple: What both sides must be a multiple of: the model's scale factor.
            mode: `"pad"` keeps all of the picture and its proportions, `"crop"` keeps the
                proportions and cuts off what is too much, `"resize"` keeps all and
                stretches.
            size: The size to reach; by default the nearest to the picture's own, so that
                only `"resize"` scales it.

        Raises:
            ValueError: `size` isn't made of multiples, the mode is unknown, or the picture
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
        """The picture at the size that the model takes.

        Raises:
            ValueError: The picture hasn't the size that was planned for.
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
        """The part of `size`, from its upper left, that is picture and not padding."""
        height, width = (min(a, b) for a, b in zip(self.scaled, self.size, strict=True))
        return height, width

    def undo(self, image: Image.Image) -> Image.Image:
        """A result of the model at the scale of the original, without padding.

        What was cropped is gone, so the result of a crop shows only what was kept.

        Raises:
            ValueError: The picture hasn't the size that the model was given.
        """
        _require_size(image, self.size)
        height, width = self.content
        image = image.crop((0, 0, width, height))
        # Each side goes back by the factor that it came.
        back = (
            round(height * self.original[0] / self.scaled[0]),
            round(width * self.original[1] / self.scaled[1]),
        )
        return _resize(image, (max(1, back[0]), max(1, back[1])))

    def to_dict(self) -> dict[str, Any]:
        """The fitting as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Fitting:
        """What `to_dict` gave, once more.

        Raises:
            ValueError: It isn't the description of a fitting.
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
    """How far apart two RGB pictures of one size are: `gain` times the difference.

    Raises:
        ValueError: Their sizes differ.
    """
    _require_size(other, (image.height, image.width))
    difference = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    return Image.fromarray((difference * gain).clip(0, 255).astype(np.uint8))


def side_by_side(panels: Mapping[str, Image.Image]) -> Image.Image:
    """RGB pictures in a row on white, each under its label."""
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
