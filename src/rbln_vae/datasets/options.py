"""What decides every bit of an encoded data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from ..config import reject_unknown, setting
from ..sizes import Size
from .buckets import Crop, Placer, Sizing
from .sources.files import Media
from .trainers import TRAINERS, Trainer

Format: TypeAlias = Literal[
    "safetensors", "webdataset", "parquet", "sd-scripts", "musubi", "ai-toolkit"
]
Dtype: TypeAlias = Literal["float16", "bfloat16", "float32"]

_DEFAULTS: Mapping[str, Any] = {"latent_dtype": "float16", "bucket_step": 64, "shard_size": 256}
"""Of options whose defaults differ for trainers."""

_SHARD_OF_VIDEOS = 16
"""The most samples of a shard of videos, which are as large as many images."""

_OF_SHARDS = ("max_aspect", "crop", "sample", "scale", "frames")
"""Options that no trainer has."""

_OF_TRAINERS = ("architecture", "upscale", "min_bucket", "max_bucket", "alpha_mask")
"""Options that only trainers have."""

_OF_SOME_TRAINERS = (*_OF_TRAINERS[1:], "flip")

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
        "model's scale factor. For trainers one, the resolution.",
    )
    aspect: bool = setting(
        False,
        "Whether each of the sizes, which are squares then, stands for rectangles of about its "
        "area, too.",
    )
    bucket_step: int = setting(
        None,
        "What sides of those rectangles are multiples of, in pixels. By default 64; musubi and "
        "ai-toolkit have their own.",
    )
    max_aspect: float = setting(
        2.0, "The longer side of those rectangles over the shorter, at most. Not for trainers."
    )
    min_bucket: int | None = setting(
        None, "The shortest side of those rectangles, for sd-scripts. By default 256."
    )
    max_bucket: int | None = setting(
        None, "The longest side of those rectangles, for sd-scripts. By default 1024."
    )
    upscale: bool = setting(
        True,
        "Whether small images are enlarged to those rectangles. Only trainers have the choice.",
    )
    crop: Crop = setting(
        "center",
        "What is cut off where proportions differ: center cuts both ends alike, random cuts by "
        "seed and key.",
    )
    prescale: bool = setting(
        True,
        "Whether a JPEG that is far too large is decoded at 1/2, 1/4 or 1/8 of its size, as long "
        "as that is twice the size that is wanted. Faster, and off by about half a level of 255. "
        "Never for trainers.",
    )
    sample: bool = setting(
        False,
        "Whether a latent drawn by seed and key is kept, instead of mean and log-variance.",
    )
    flip: bool = setting(False, "Whether the mirrored image is encoded and kept beside, too.")
    scale: bool = setting(False, "Whether latents are scaled as the pipelines of the model do it.")
    alpha_mask: bool = setting(
        False, "Whether the opacity is kept as a mask of the loss, for sd-scripts."
    )
    seed: int = setting(0, "Of random crops and samples.")
    latent_dtype: Dtype = setting(
        None, "How latents are kept. By default float16, and float32 for trainers."
    )
    format: Format = setting(
        "safetensors", "Of the shards, or the trainer whose cache of latents is written."
    )
    architecture: str | None = setting(
        None,
        "What the trainer trains: "
        + "; ".join(f"{', '.join(t.architectures)} for {n}" for n, t in TRAINERS.items())
        + ".",
    )
    shard_size: int = setting(
        None, "The most samples of a shard. By default 256, and 16 if they are videos."
    )
    batch_size: int | None = setting(
        None,
        "Images of a run. By default what the model is compiled for. On targets with exact "
        "batches, the bits don't depend on it.",
    )
    frames: int | None = setting(
        None,
        "Encode videos: the most frames of each, 1 + 4 n; what is longer is cut off at the end. By "
        "default images are encoded, and videos left out.",
    )
    max_pixels: int = setting(100_000_000, "Images of more pixels are rejected.")
    min_side: int = setting(32, "Images with a side of fewer pixels are rejected.")

    def __post_init__(self) -> None:
        if self.format in get_args(Format):
            self._set_defaults()
        for name, kind in (("crop", Crop), ("latent_dtype", Dtype), ("format", Format)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        for name in (
            *("bucket_step", "min_bucket", "max_bucket"),
            *("shard_size", "batch_size", "max_pixels", "min_side", "frames"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.max_pixels > _LARGEST:
            raise ValueError(f"max_pixels is {self.max_pixels}, expected at most {_LARGEST}")
        if self.format in ("webdataset", "parquet") and self.latent_dtype == "bfloat16":
            raise ValueError(
                f"{self.format} files can't hold bfloat16; choose latent_dtype float16 or "
                "float32, or format safetensors"
            )
        if self.format == "parquet" and self.frames is not None:
            raise ValueError(
                "parquet files hold latents of images; choose format safetensors or webdataset for "
                "videos"
            )
        self.sizing(1)

    def _set_defaults(self) -> None:
        """Set what depends on the format, and refuse what has no place in it."""
        refused: tuple[str, ...] = _OF_TRAINERS
        fixed: tuple[str, ...] = ()
        defaults = dict(_DEFAULTS)
        if self.frames is not None:
            defaults["shard_size"] = _SHARD_OF_VIDEOS
        if (kind := TRAINERS.get(self.format)) is not None:
            defaults = dict(kind.defaults(self.architecture))
            fixed = kind.fixed(str(self.architecture))
            refused = (*_OF_SHARDS, *(n for n in _OF_SOME_TRAINERS if n not in kind.offers))
            if len(self.sizes) != 1:
                raise ValueError(f"{self.format} takes one size at a time; run it for each size")
        for field in dataclasses.fields(self):
            if field.name in refused and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} has no place in format {self.format!r}; omit it")
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            elif name in fixed and getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and {self.format} takes only {value}"
                )

    @property
    def trainer(self) -> Trainer | None:
        """The trainer whose cache is written, if any."""
        kind = TRAINERS.get(self.format)
        return None if kind is None else kind(self)

    @property
    def media(self) -> Media:
        """What the samples are."""
        return "image" if self.frames is None else "video"

    @property
    def kept(self) -> Literal["moments", "drawn", "mean"]:
        """What is kept of a distribution of latents."""
        kind = TRAINERS.get(self.format)
        if kind is None:
            return "drawn" if self.sample else "moments"
        return "drawn" if kind.architectures[str(self.architecture)].drawn else "mean"

    @property
    def scaled(self) -> bool:
        """Whether latents are scaled for the denoiser."""
        kind = TRAINERS.get(self.format)
        return self.scale if kind is None else kind.architectures[str(self.architecture)].scaled

    def sizing(self, multiple: int) -> Placer:
        """What chooses the size of an image, for a model with that scale factor.

        Raises:
            ValueError: A size is no multiple of it.
        """
        if (trainer := self.trainer) is not None:
            trainer.check(multiple)
            return trainer
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
