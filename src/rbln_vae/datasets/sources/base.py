"""The interface of a source: an ordered list of splits, each an ordered list of samples.

Splits and samples are streamed, so a source of any length takes little memory. A split can be
sent to another process. Its samples can be read from any position, so a job can resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One image with its metadata.

    Attributes:
        key: The name of the sample, unique in its source.
        image: The bytes of the file, or its path or address.
        caption: The caption, if it is known.
        columns: All other metadata, as JSON values.
        sidecars: Paths or addresses of files with the caption (`.txt`) or columns (`.json`),
            which are read together with the image.
        error: The reason why there is no image, if there is none.
    """

    key: str
    image: bytes | str = b""
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    sidecars: tuple[str, ...] = ()
    error: str | None = None


class Split(ABC):
    """Consecutive samples of a source; can be pickled."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that changes if the split gets other samples; it is quick to compute."""

    @abstractmethod
    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The samples in order.

        Args:
            start: The number of samples to skip, by default 0.

        Raises:
            OSError: The samples can't be read at the moment.
        """


class Source(ABC):
    """An ordered list of splits."""

    @abstractmethod
    def splits(self, size: int) -> Iterator[Split]:
        """The splits in order.

        Args:
            size: The number of samples of a shard. A source that is free to choose makes
                splits of this size.

        Raises:
            RBLNDatasetError: The source is empty or of another kind.
        """

    @abstractmethod
    def count(self) -> int | None:
        """The number of samples, or `None` if counting would read all of them."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The description of the source in the record of a job, as JSON values."""
