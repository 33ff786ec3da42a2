"""What a trainer does with an image before it encodes it, and the files that it then reads.

A trainer prepares images in its own way: which files it takes, how it turns, converts, scales and
crops them, and what it keeps of the distribution of their latents. `docs/datasets.md` says which
versions were compared.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import RBLNDatasetError
from ...sizes import Placement, Size, check_image_size, format_size
from ..buckets import Crop, Placer

if TYPE_CHECKING:
    from torch import Tensor

    from ..options import Options

Pixels = npt.NDArray[np.uint8]
"""Levels of a picture, `(H, W, 3)` or `(H, W, 4)`."""

MASK = "alpha_mask"
"""The tensor of an image's opacity, float32 `(H, W)` from 0 to 1, if the trainer keeps it."""


@dataclass(frozen=True)
class Architecture:
    """A family of denoisers, as the cache of a trainer names it.

    Attributes:
        kind: The kind of its autoencoder, one of `KINDS`.
        name: Its name in the files of the cache.
        full_name: Its name in the metadata; `None` if there is none.
        step: The number of pixels that sides of images are multiples of; `None` if the user
            chooses it.
        drawn: Whether latents are drawn from their distribution; if not, their means are kept.
        scaled: Whether latents are scaled for the denoiser.
        by_size: Whether caches of several sizes can share a directory.
    """

    kind: str
    name: str
    full_name: str | None = None
    step: int | None = None
    drawn: bool = True
    scaled: bool = False
    by_size: bool = True


class Trainer(Placer):
    """A trainer with its options: it sizes images, and writes its cache.

    Args:
        options: The options of the job.

    Raises:
        ValueError: The trainer has no such configuration.
    """

    architectures: ClassVar[Mapping[str, Architecture]]
    """By the names that users give."""

    offers: ClassVar[frozenset[str]]
    """The options that the trainer offers among those that not all do."""

    uses_opencv: ClassVar[bool] = True
    """Whether it scales images with OpenCV."""

    mirrors_first: ClassVar[bool] = False
    """Whether it mirrors an image before it scales it, and not after."""

    conflict: ClassVar[str | None] = None
    """Why images of a folder whose names differ only in the suffix can't be cached, if so."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.architecture = self.architectures[str(options.architecture)]
        if not (options.upscale or options.aspect):
            raise ValueError("upscale=False (--no-upscale) is for buckets: set aspect (--aspect)")

    @classmethod
    def defaults(cls, architecture: str | None) -> dict[str, Any]:
        """The options whose defaults depend on the trainer.

        Raises:
            ValueError: There is no such architecture.
        """
        if (found := cls.architectures.get(architecture or "")) is None:
            raise ValueError(
                f"architecture is {architecture!r}, expected one of {', '.join(cls.architectures)}"
            )
        # A part is what is lost if a run is killed, and here it needn't be a file of some size.
        return {"latent_dtype": "float32", "bucket_step": found.step or 64, "shard_size": 32}

    @classmethod
    def fixed(cls, architecture: str) -> tuple[str, ...]:
        """The options among `defaults` that can't have another value."""
        step = cls.architectures[architecture].step
        return ("shard_size",) if step is None else ("shard_size", "bucket_step")

    # Sizes

    def check(self, multiple: int) -> None:
        """Raise a `ValueError` if sides of images are not multiples of a number of pixels."""
        step = self.options.bucket_step
        if not self.options.aspect:
            check_image_size(self.options.sizes[0], max(multiple, self.architecture.step or 1))
        elif step % multiple:
            raise ValueError(f"bucket_step is {step}, expected a multiple of {multiple}")

    def place(
        self, original: Size, key: str = "", crop: Crop = "center", seed: int = 0
    ) -> Placement:
        """How the trainer scales and crops an image; only `original` matters.

        Raises:
            ValueError: The image is too small for the trainer.
        """
        width, height = original[1], original[0]
        try:
            scaled, bucket = self._fit(width, height)
        except ZeroDivisionError:
            scaled = bucket = (0, 0)
        if not all(bucket):
            raise ValueError(f"it is {format_size(original)}, which is too small for its bucket")
        spare = scaled[1] - bucket[1], scaled[0] - bucket[0]
        return Placement(
            original, scaled[::-1], (spare[0] // 2, spare[1] // 2), (bucket[1], bucket[0])
        )

    @abstractmethod
    def _fit(self, width: int, height: int) -> tuple[Size, Size]:
        """The scaled size and the bucket of an image, each as width and height."""

    # Pictures

    @abstractmethod
    def takes(self, name: str) -> bool:
        """Whether a file is one of the images, by its path in the folder."""

    @abstractmethod
    def read(self, image: Image.Image) -> Image.Image:
        """Convert an open picture to RGB, or to RGBA if it is scaled with its opacity."""

    @abstractmethod
    def scale(self, picture: Image.Image, size: Size) -> Pixels:
        """Scale a picture to `(height, width)`."""

    # Files

    @abstractmethod
    def write(
        self, out: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, list[str]]:
        """Write the files of an image atomically.

        Args:
            out: The directory that stands for the folder of images.
            record: The record of the image.
            tensors: Its latents: `latent`, also `latent_flipped` if it was mirrored, and `MASK`.

        Returns:
            The names of arrays in each file, by its path relative to `out`.
        """

    def holds(self, path: Path, arrays: Sequence[str]) -> bool:
        """Whether a file that was written still has these arrays."""
        return path.is_file()

    @property
    @abstractmethod
    def temporaries(self) -> str:
        """A pattern of the temporary files that a killed process leaves below the directory."""

    def shadows(self, name: str) -> str | None:
        """A file that the trainer would read instead of what is written for an image, if any."""
        return None

    @abstractmethod
    def configuration(self, source: str, out: str) -> str:
        """The lines of the trainer's configuration that the cache depends on."""


def nearest(buckets: Sequence[Size], aspect: float) -> Size:
    """The first of the buckets, as width and height, that is nearest to a width over height."""
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def down(number: int, step: int) -> int:
    """A number rounded down to a multiple."""
    return number - number % step


def area_or_lanczos(picture: Image.Image, size: Size) -> Pixels:
    """Scale with OpenCV's area filter, or with Pillow's Lanczos filter if a side grows."""
    height, width = size
    if picture.width < width or picture.height < height:
        return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    pixels = np.asarray(picture)
    if picture.size == (width, height):
        return pixels
    cv2 = require_opencv()
    scaled: Pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return scaled


def require_opencv() -> Any:
    """Import OpenCV.

    Raises:
        RBLNDatasetError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise RBLNDatasetError(
            "the trainer scales images with OpenCV, which isn't installed: "
            "pip install 'rbln-vae[trainers]'"
        ) from error
    return cv2


_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "avif")
UPPER_OR_LOWER = frozenset(_SUFFIXES) | {suffix.upper() for suffix in _SUFFIXES}
"""Suffixes of images for trainers that look for them in lower and upper case only."""


def quoted(text: str) -> str:
    """A text as a string of TOML or YAML."""
    return json.dumps(text, ensure_ascii=False)


def switch(value: bool) -> str:
    """A truth value of TOML or YAML."""
    return "true" if value else "false"


def suffix_of(name: str) -> str:
    """The suffix of a file, without its dot."""
    return name.rpartition(".")[2]


def stem_of(name: str) -> str:
    """The path of a file without its suffix."""
    return name.rpartition(".")[0]


def safetensors_file(name: str, tensor: Tensor, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with one tensor.

    The library keeps no order of metadata, so the same call would give other bytes.
    """
    import torch  # the help of the command line reads this module, and torch takes seconds

    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    entry = {
        "dtype": dtypes[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [0, len(content)],
    }
    header = json.dumps({"__metadata__": metadata, name: entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content
