"""Tables with a column of images: Parquet files and Hugging Face data sets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RBLNDatasetError
from .base import Sample, Source, Split
from .files import caption_of, digest, file_fingerprint, file_system, names_of, require, text_of

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Columns:
    """The columns of the image and the caption; `None` looks for the usual names."""

    image: str | None = None
    caption: str | None = None

    def image_of(self, names: Sequence[str], where: str) -> str:
        """The column of the image.

        Args:
            names: The names of all columns.
            where: The name of the table, for the error.

        Raises:
            RBLNDatasetError: There is no such column.
        """
        wanted = _IMAGE_COLUMNS if self.image is None else (self.image,)
        for name in wanted:
            if name in names:
                return name
        raise RBLNDatasetError(
            f"{where} has no column {' or '.join(wanted)}, only {', '.join(names)}; name the one "
            "that holds the image"
        )

    def sample(self, key: str, row: Mapping[str, Any], image: str, folder: str) -> Sample:
        """The sample of a row.

        Args:
            key: The key of the sample.
            row: The values of the row by column.
            image: The column of the image: bytes, a path, or both in the layout of Hugging
                Face.
            folder: The folder that paths are relative to.
        """
        value = row[image]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and "://" not in value:
            value = f"{folder}/{value}" if not value.startswith("/") else value
        columns = {name: _json_value(v) for name, v in row.items() if name != image}
        if not isinstance(value, (bytes, str)) or not value:
            return Sample(key, error=f"the column {image} holds no image")
        return Sample(key, value, caption_of(row, self.caption), columns)

    def describe(self) -> dict[str, Any]:
        """The given names, as JSON values."""
        return {"image_column": self.image, "caption_column": self.caption}


def _json_value(value: Any) -> Any:
    """The value in JSON: bytes become text or base64, times ISO 8601, other objects text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return text_of(value)
    if isinstance(value, Mapping):
        return {str(name): _json_value(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(each) for each in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


@dataclass(frozen=True)
class ParquetSource(Source):
    """Parquet files with a column of images."""

    name: str
    files: Sequence[str]
    columns: Columns

    def splits(self, size: int) -> Iterator[Split]:
        for file, name in zip(self.files, names_of(self.files), strict=True):
            with _open_parquet(file) as table:
                image = self.columns.image_of(table.schema_arrow.names, file)
                rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            fingerprint = file_fingerprint(file)
            start, offset = 0, 0
            while start < len(rows):
                end, total = start + 1, rows[start]
                while end < len(rows) and total + rows[end] <= size:
                    total += rows[end]
                    end += 1
                stem = name.removesuffix(".parquet")
                yield ParquetSplit(
                    file, stem, fingerprint, image, self.columns, (start, end), offset
                )
                start, offset = end, offset + total

    def count(self) -> int | None:
        total = 0
        for file in self.files:
            with _open_parquet(file) as table:
                total += table.metadata.num_rows
        return total

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "name": self.name, **self.columns.describe()}


@dataclass(frozen=True)
class ParquetSplit(Split):
    """Consecutive row groups of a file."""

    file: str
    name: str
    of_file: str
    image: str
    columns: Columns
    groups: tuple[int, int]
    offset: int

    def fingerprint(self) -> str:
        return digest([self.of_file, self.groups])

    def samples(self, start: int = 0) -> Iterator[Sample]:
        folder = self.file.rpartition("/")[0]
        with _open_parquet(self.file) as table:
            first, number = self.groups[0], self.offset
            while (
                first < self.groups[1]
                and number + (rows := table.metadata.row_group(first).num_rows)
                <= self.offset + start
            ):
                first, number = first + 1, number + rows
            groups = list(range(first, self.groups[1]))
            for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups) if groups else ():
                for row in batch.to_pylist():
                    if number >= self.offset + start:
                        key = f"{self.name}/{number:08d}"
                        yield self.columns.sample(key, row, self.image, folder)
                    number += 1


@contextlib.contextmanager
def _open_parquet(file: str) -> Iterator[Any]:
    parquet = require("pyarrow.parquet")
    fs, path = file_system(file)
    with fs.open(path, "rb") as opened:
        try:
            # Read pages when they are needed, not a whole row group of images at once.
            yield parquet.ParquetFile(opened, pre_buffer=False)
        except (ValueError, OSError) as error:
            if type(error).__module__.startswith("pyarrow"):
                raise RBLNDatasetError(f"{file} can't be read as Parquet: {error}") from error
            raise


@dataclass(frozen=True)
class HuggingFaceSource(Source):
    """A `datasets.Dataset` with a column of images."""

    dataset: Any
    columns: Columns
    name: str = ""

    def __post_init__(self) -> None:
        datasets = require("datasets")
        if not isinstance(self.dataset, datasets.Dataset):
            raise TypeError(
                "expected a name, a Source or a datasets.Dataset, found a "
                f"{type(self.dataset).__name__}; of a DatasetDict choose a split, and for "
                "streaming name its Parquet files, hf://datasets/…"
            )

    def splits(self, size: int) -> Iterator[Split]:
        datasets = require("datasets")
        image = self.columns.image_of(self.dataset.column_names, "the data set")
        dataset = self.dataset.with_format(None)
        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        for start in range(0, len(dataset), size):
            end = min(start + size, len(dataset))
            yield HuggingFaceSplit(dataset, image, self.columns, start, end)

    def count(self) -> int | None:
        return len(self.dataset)

    def describe(self) -> dict[str, Any]:
        # Without its fingerprint, which datasets may draw at random.
        return {"kind": "huggingface", "name": self.name, **self.columns.describe()}


@dataclass(frozen=True)
class HuggingFaceSplit(Split):
    """Consecutive rows of a data set."""

    dataset: Any
    image: str
    columns: Columns
    start: int
    end: int

    def fingerprint(self) -> str:
        return digest([len(self.dataset), self.dataset.column_names, self.start, self.end])

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for number in range(self.start + start, self.end):
            key = f"{number:08d}"
            yield self.columns.sample(key, self.dataset[number], self.image, ".")


def load_dataset(name: str, split: str) -> Any:
    """Load a split of a data set from a directory that `datasets` saved, or from the hub."""
    datasets = require("datasets")
    if Path(name).is_dir() and any(
        (Path(name) / each).exists() for each in ("state.json", "dataset_dict.json")
    ):
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"{name} has no split {split}, only {', '.join(found)}")
            return found[split]
        return found
    return datasets.load_dataset(name, split=split)
