"""What a source is: an ordered list of splits, and a split an ordered list of samples.

Both are streamed, so that a source of any length takes little memory. A split can be sent to
another process, and can begin in its middle, which is how a job goes on where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it.

    Attributes:
        key: What it is called, unique in its source.
        image: The bytes of the file, or its path or address.
        caption: What it shows, where that is known.
        columns: All else, as JSON can hold it.
        sidecars: Paths or addresses of files beside it that hold the caption (`.txt`) or
            columns (`.json`), to be read with the image.
        error: Why there is no image, if there is none.
    """

    key: str
    image: bytes | str = b""
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    sidecars: tuple[str, ...] = ()
    error: str | None = None


class Split(ABC):
    """Some consecutive samples of a source; can be pickled."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What changes if other samples stand here; quick to tell."""

    @abstractmethod
    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The samples in order.

        Args:
            start: How many of the first are left out.

        Raises:
            OSError: They can't be read at present.
        """


class Source(ABC):
    """An ordered list of splits."""

    @abstractmethod
    def splits(self, size: int) -> Iterator[Split]:
        """The splits in order.

        Args:
            size: The samples of a shard. Where it is free to choose, a source makes splits
                of that size.

        Raises:
            RBLNDatasetError: There is nothing in it, or it isn't what it was taken for.
        """

    @abstractmethod
    def count(self) -> int | None:
        """How many samples there are, where that can be told without reading them all."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is, as the record of a job holds it."""
