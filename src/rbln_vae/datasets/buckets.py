"""Which size an image is given, and what is cut off: buckets by area and aspect."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..sizes import Placement, Size, check_image_size
from .seeds import seed_of

Crop: TypeAlias = Literal["center", "random"]


class Placer(ABC):
    """Chooses the size of each image, and how the image comes to it."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[Size, ...]:
        """All sizes, each once, in order; none if they depend on the images."""

    @abstractmethod
    def place(self, original: Size, key: str, crop: Crop, seed: int) -> Placement:
        """How an image is scaled and cropped.

        Args:
            original: `(height, width)` of the upright image.
            key: Of the sample; random crops are drawn by it.
            crop: Which part is kept.
            seed: Of random crops.

        Raises:
            ValueError: The image can't be given a size.
        """


@dataclass(frozen=True)
class Sizing(Placer):
    """The sizes that images can be given, in groups of about one area.

    Attributes:
        groups: Sizes by area, the smallest first.
    """

    groups: tuple[tuple[Size, ...], ...]

    @classmethod
    def make(
        cls,
        sizes: Sequence[Size],
        *,
        aspect: bool = False,
        step: int = 64,
        max_aspect: float = 2.0,
        multiple: int = 8,
    ) -> Sizing:
        """Lay out the buckets.

        With `aspect`, a square of side `n` stands for all rectangles whose sides are
        multiples of `step`, of at most the area `n * n`, and as large as that allows: the
        buckets of NovelAI's aspect ratio bucketing, which most trainers follow.

        Args:
            sizes: `(height, width)` in pixels.
            aspect: Whether rectangles are added.
            step: What their sides are multiples of.
            max_aspect: Their longer side over the shorter, at most.
            multiple: What all sides must be multiples of.

        Raises:
            ValueError: There are no sizes, or one can't be.

        Example:
            >>> Sizing.make([(256, 256)], aspect=True, max_aspect=2).sizes
            ((192, 320), (256, 256), (320, 192))
        """
        if not sizes:
            raise ValueError("expected a size, found none")
        for size in sizes:
            check_image_size(size, multiple)
        if not aspect:
            by_area: dict[int, list[Size]] = {}
            for size in sizes:
                by_area.setdefault(size[0] * size[1], []).append(size)
            return cls(tuple(tuple(sorted(set(by_area[area]))) for area in sorted(by_area)))
        if step % multiple:
            raise ValueError(f"bucket_step is {step}, expected a multiple of {multiple}")
        if max_aspect < 1:
            raise ValueError(f"max_aspect is {max_aspect}, expected at least 1")
        sides = []
        for height, width in sizes:
            if height != width or height < step:
                raise ValueError(
                    f"with aspect, a size is the side of a square of at least {step} pixels, "
                    f"found {height}x{width}"
                )
            sides.append(height)
        return cls(tuple(_rectangles(side, step, max_aspect) for side in sorted(set(sides))))

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(sorted({size for group in self.groups for size in group}))

    def choose(self, original: Size) -> Size:
        """The size for an image of `(height, width)`.

        It is of the largest area that needs no enlarging, else of the smallest, and in it the
        one with the nearest proportions.
        """
        height, width = original
        fitting = [g for g in self.groups if _area(g) <= height * width] or [self.groups[0]]
        aspect = math.log(width / height)
        return min(fitting[-1], key=lambda size: (abs(math.log(size[1] / size[0]) - aspect), size))

    def place(self, original: Size, key: str, crop: Crop, seed: int) -> Placement:
        """How an image is scaled and cropped.

        Args:
            original: `(height, width)` of the upright image.
            key: Of the sample; random crops are drawn by it.
            crop: Which part is kept.
            seed: Of random crops.

        Example:
            >>> Sizing.make([(64, 64)]).place((100, 200), "a", "center", 0)
            Placement(original=(100, 200), scaled=(64, 128), offset=(0, 32), size=(64, 64))
        """
        size = self.choose(original)
        ratio = max(size[0] / original[0], size[1] / original[1])
        scaled = tuple(
            max(side, round(whole * ratio)) for whole, side in zip(original, size, strict=True)
        )
        spare = scaled[0] - size[0], scaled[1] - size[1]
        if crop == "center":
            offset = spare[0] // 2, spare[1] // 2
        else:
            drawn = seed_of(seed, "crop", key)
            row, rest = drawn % (spare[0] + 1), drawn // (spare[0] + 1)
            offset = row, rest % (spare[1] + 1)
        return Placement(original, (scaled[0], scaled[1]), offset, size)


def _area(group: Sequence[Size]) -> int:
    return max(height * width for height, width in group)


def _rectangles(side: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    found = {(side // step * step, side // step * step)}
    for long in range(step, int(side * math.sqrt(max_aspect)) + step, step):
        short = min(side * side // long // step * step, long)
        if short and long / short <= max_aspect:
            found |= {(short, long), (long, short)}
    # Of those with one side in common, the largest.
    return tuple(
        sorted(
            size
            for size in found
            if not any(
                other != size and other[0] >= size[0] and other[1] >= size[1] for other in found
            )
        )
    )
