"""What decides every bit of an encoded data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from ..config import reject_unknown, setting
from ..sizes import Size
from .buckets import Crop, Sizing

Format: TypeAlias = Literal["safetensors", "webdataset", "parquet"]
Dtype: TypeAlias = Literal["float16", "bfloat16", "float32"]

_LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""The pixels beyond which Pillow itself refuses a picture."""


@dataclass(frozen=True)
class Options:
    """What is made of each image. The same options give the same bits on one machine.

    Raises:
        ValueError: A value is out of range, or two don't go together.

    Example:
        >>> Options(sizes=((512, 512), (768, 768)), aspect=True, sample=True).seed
        0
    """

    sizes: tuple[Size, ...] = setting(
        ((512, 512),),
        "`(height, width)` in pixels that images are given, one or more, multiples of the "
        "model's scale factor.",
    )
    aspect: bool = setting(
        False,
        "Whether each of the sizes, which are squares then, stands for rectangles of about its "
        "area, too.",
    )
    bucket_step: int = setting(64, "What sides of those rectangles are multiples of, in pixels.")
    max_aspect: float = setting(
        2.0, "The longer side of those rectangles over the shorter, at most."
    )
    crop: Crop = setting(
        "center",
        "What is cut off where proportions differ: center cuts both ends alike, random cuts by "
        "seed and key.",
    )
    prescale: bool = setting(
        True,
        "Whether a JPEG that is far too large is decoded at 1/2, 1/4 or 1/8 of its size, as long "
        "as that is twice the size that is wanted. Faster, and off by about half a level of 255.",
    )
    sample: bool = setting(
        False,
        "Whether a latent drawn by seed and key is kept, instead of mean and log-variance.",
    )
    flip: bool = setting(False, "Whether the mirrored image is encoded and kept beside, too.")
    scale: bool = setting(False, "Whether latents are scaled as the pipelines of the model do it.")
    seed: int = setting(0, "Of random crops and samples.")
    latent_dtype: Dtype = setting("float16", "How latents are kept.")
    format: Format = setting("safetensors", "Of the shards.")
    shard_size: int = setting(256, "The most samples of a shard.")
    batch_size: int | None = setting(
        None,
        "Images of a run. By default what the model is compiled for. On targets with exact "
        "batches, the bits don't depend on it.",
    )
    max_pixels: int = setting(100_000_000, "Images of more pixels are rejected.")
    min_side: int = setting(32, "Images with a side of fewer pixels are rejected.")

    def __post_init__(self) -> None:
        for name, kind in (("crop", Crop), ("latent_dtype", Dtype), ("format", Format)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        for name in ("bucket_step", "shard_size", "batch_size", "max_pixels", "min_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.max_pixels > _LARGEST:
            raise ValueError(f"max_pixels is {self.max_pixels}, expected at most {_LARGEST}")
        if self.format != "safetensors" and self.latent_dtype == "bfloat16":
            raise ValueError(
                f"{self.format} files can't hold bfloat16; choose latent_dtype float16 or "
                "float32, or format safetensors"
            )
        self.sizing(1)

    def sizing(self, multiple: int) -> Sizing:
        """What chooses the size of an image, for a model with that scale factor.

        Raises:
            ValueError: A size is no multiple of it.
        """
        return Sizing.make(
            self.sizes,
            aspect=self.aspect,
            step=self.bucket_step,
            max_aspect=self.max_aspect,
            multiple=multiple,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        return {**dataclasses.asdict(self), "sizes": [list(size) for size in self.sizes]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Options:
        """What `to_dict` gave, once more.

        Raises:
            ValueError: A name or a value is unknown.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        reject_unknown(stored, names, "option of a data set", ValueError)
        sizes = tuple((int(height), int(width)) for height, width in stored["sizes"])
        return cls(**{**stored, "sizes": sizes})
