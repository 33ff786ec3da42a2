"""The interface of a shard, a file of encoded samples in any format."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoder import Encoded

FORMAT_NAME = "rbln-vae latents"
FORMAT_VERSION = 1
"""The version of written files; a change that older versions can't read increments it."""


class Shard(ABC):
    """A memory-mapped file of samples; data that is not accessed is never read.

    Args:
        path: The file. Each format raises its own exceptions for an invalid file;
            `open_shard` turns them into one error.
    """

    suffix: ClassVar[str]
    """The suffix of file names."""

    @staticmethod
    @abstractmethod
    def write(path: Path, samples: Sequence[Encoded]) -> None:
        """Write a file. The same samples give the same bytes.

        Args:
            path: The file to write.
            samples: At least one sample; all have tensors of the same names.
        """

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @property
    @abstractmethod
    def keys(self) -> npt.NDArray[np.int64]:
        """`seed_of(key)` for each sample, `(samples,)`."""

    @property
    @abstractmethod
    def sizes(self) -> npt.NDArray[np.int32]:
        """`size_of` of each sample: `(samples, 2)`, of videos `(samples, 3)`."""

    @abstractmethod
    def record(self, index: int) -> dict[str, Any]:
        """The record of a sample."""

    @abstractmethod
    def tensors(self, index: int) -> dict[str, Tensor]:
        """Copies of the tensors of a sample, by name, each `(C, h, w)` or `(C, t, h, w)`."""


def size_of(record: Mapping[str, Any]) -> tuple[int, ...]:
    """Height and width of a sample in pixels, after the number of frames if it is a video.

    Samples of one size have tensors of one shape.
    """
    frames = (record["frames"],) if "frames" in record else ()
    return (*frames, *record["target_size"])


def mapped(path: Path) -> npt.NDArray[np.uint8]:
    """Map a file; the map keeps no descriptor, so any number of files can be open."""
    size = path.stat().st_size
    return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()


def to_json(value: Mapping[str, Any]) -> bytes:
    """A record in the JSON form that shards store."""
    return json.dumps(value, separators=(",", ":")).encode()
