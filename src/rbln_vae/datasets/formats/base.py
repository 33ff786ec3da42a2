"""What a shard is: a file of encoded samples, whatever its format."""

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
"""Of what is written; a change that older versions can't read makes it one more."""


class Shard(ABC):
    """A file of samples of one format, mapped: what isn't looked at is never read.

    Args:
        path: The file. What is wrong with it is raised in the format's own way;
            `open_shard` makes one error of these.
    """

    suffix: ClassVar[str]
    """What the names of its files end in."""

    @staticmethod
    @abstractmethod
    def write(path: Path, samples: Sequence[Encoded]) -> None:
        """Write a file. The same samples give the same bytes.

        Args:
            path: Where it goes.
            samples: At least one, all with tensors of the same names.
        """

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @property
    @abstractmethod
    def keys(self) -> npt.NDArray[np.int64]:
        """`seed_of` each key, `(samples,)`."""

    @property
    @abstractmethod
    def sizes(self) -> npt.NDArray[np.int32]:
        """Height and width in pixels of each sample, `(samples, 2)`."""

    @abstractmethod
    def record(self, index: int) -> dict[str, Any]:
        """The record of a sample."""

    @abstractmethod
    def tensors(self, index: int) -> dict[str, Tensor]:
        """Copies of the tensors of a sample, by name, each `(C, h, w)`."""


def mapped(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped; it keeps no descriptor, so that any number can be open."""
    size = path.stat().st_size
    return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()


def to_json(value: Mapping[str, Any]) -> bytes:
    """A record as shards hold it."""
    return json.dumps(value, separators=(",", ":")).encode()
