"""What sd-scripts and musubi-tuner, both by kohya-ss, have in common: one file for each image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from ...sizes import Size
from .base import UPPER_OR_LOWER, Pixels, Trainer, area_or_lanczos, stem_of, suffix_of

if TYPE_CHECKING:
    from ..options import Options


class KohyaTrainer(Trainer):
    """A trainer whose buckets are known before, and whose files are named by the image's size."""

    suffix: ClassVar[str]
    """Of the files of a cache."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        height, width = options.sizes[0]
        self._area = width * height
        # Each as width and height.
        self._buckets = sorted(self._rectangles()) if options.aspect else [(width, height)]

    @abstractmethod
    def _rectangles(self) -> set[Size]:
        """The buckets of about the area of the resolution, each as width and height."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        return () if not self.options.upscale else tuple(sorted(b[::-1] for b in self._buckets))

    def takes(self, name: str) -> bool:
        return suffix_of(name) in UPPER_OR_LOWER

    def scale(self, picture: Image.Image, size: Size) -> Pixels:
        return area_or_lanczos(picture, size)

    def file_of(self, record: Mapping[str, Any]) -> str:
        """The file of an image, relative to the directory of the cache."""
        height, width = record["original_size"]
        return f"{stem_of(record['key'])}_{width:04d}x{height:04d}{self._ending}"

    @property
    def temporaries(self) -> str:
        return f".*{self._ending}.*.tmp"

    @property
    def _ending(self) -> str:
        return f"_{self.architecture.name}{self.suffix}"
