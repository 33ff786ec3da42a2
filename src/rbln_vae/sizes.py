"""Sizes of pictures, and how a picture comes to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Size: TypeAlias = tuple[int, int]
"""`(height, width)` in pixels."""


def format_size(size: Sequence[int]) -> str:
    """Format a size or a shape, height before width: `"512x768"`."""
    return "x".join(map(str, size))


def parse_size(text: str) -> Size:
    """Parse a size: `"512"` for both sides, or `"512x768"`, height first.

    Raises:
        ValueError: The text is not one or two positive integers.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"expected a size in pixels, such as 512 or 512x768, found {text!r}")
    return int(sides[0]), int(sides[-1])


def nearest_multiples(size: int, factor: int) -> list[int]:
    """The multiples of `factor` next to `size`, below and above; never 0."""
    below = size // factor * factor
    near = {below, size if below == size else below + factor}
    return sorted(near - {0})


def check_image_size(size: tuple[int, int], factor: int) -> None:
    """Raise a `ValueError` that names the nearest valid sizes, if there is a remainder.

    Args:
        size: Height and width in pixels.
        factor: Pixels per latent cell in a direction.
    """
    if any(side % factor for side in size):
        height, width = (" or ".join(map(str, nearest_multiples(side, factor))) for side in size)
        raise ValueError(
            f"{size[0]}x{size[1]} is no image size of this model: height and width must be "
            f"multiples of {factor}. The nearest are height {height} and width {width}."
        )


@dataclass(frozen=True)
class Placement:
    """How a picture comes to a size: scaled, then cut.

    Attributes:
        original: The size of the picture, upright; `original_size` of SDXL.
        scaled: Its size after scaling.
        offset: Rows and columns cut off above and to the left; `crops_coords_top_left` of SDXL.
        size: The size that the model gets; `target_size` of SDXL.
    """

    original: Size
    scaled: Size
    offset: Size
    size: Size

    @property
    def mirrored_offset(self) -> Size:
        """The offset in the mirrored picture."""
        return self.offset[0], self.scaled[1] - self.size[1] - self.offset[1]
