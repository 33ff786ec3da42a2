"""Parquet: each sample is a row, and its tensors are flat lists."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoder import Encoded
from ..seeds import seed_of
from ..sources.files import require
from .base import Shard, mapped, to_json

_SHAPE = "latent_shape"
_ROW_GROUP = 64
"""Rows that are compressed together: few, so that reading one row reads few others."""

_GROUPS_KEPT = 4
"""Row groups that a process caches."""


class ParquetShard(Shard):
    """Columns for the fields of the record and for each tensor.

    Reading a row reads its whole row group. The last groups are cached, so reading in order
    decompresses each group once, but reading in random order decompresses one per sample.
    """

    suffix = ".parquet"

    @staticmethod
    def write(path: Path, samples: Sequence[Encoded]) -> None:
        parquet, pyarrow = require("pyarrow.parquet"), require("pyarrow")
        number = pyarrow.from_numpy_dtype(next(iter(samples[0].tensors.values())).numpy().dtype)
        side = pyarrow.list_(pyarrow.int32())
        columns: dict[str, Any] = {
            name: pyarrow.array([_clean(s.record[name]) for s in samples], pyarrow.string())
            for name in ("key", "caption")
        }
        for name, value in samples[0].record.items():
            if isinstance(value, list):
                columns[name] = pyarrow.array([s.record[name] for s in samples], side)
        # As text, because the types of values may differ between shards.
        texts = [to_json(s.record["columns"]).decode() for s in samples]
        columns["columns"] = pyarrow.array(texts, pyarrow.string())
        first = next(iter(samples[0].tensors))
        columns[_SHAPE] = pyarrow.array([list(s.tensors[first].shape) for s in samples], side)
        for name in samples[0].tensors:
            flat = [s.tensors[name].numpy().reshape(-1) for s in samples]
            # pyarrow raises for ends above int32; numpy would overflow.
            ends = pyarrow.array(np.cumsum([0, *map(len, flat)]), pyarrow.int32())
            columns[name] = pyarrow.ListArray.from_arrays(
                ends, pyarrow.array(np.concatenate(flat), number)
            )
        parquet.write_table(
            pyarrow.table(columns),
            path,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            use_dictionary=False,
        )

    def __init__(self, path: Path) -> None:
        # pyarrow's own map would keep a file descriptor.
        self._content = require("pyarrow").py_buffer(mapped(path))
        self._metadata: Any = None
        with self._file() as file:
            self._metadata = file.metadata
        names = self._metadata.schema.to_arrow_schema().names
        shape = names.index(_SHAPE)
        self._fields, self._tensors = names[:shape], names[shape + 1 :]
        groups = range(self._metadata.num_row_groups)
        rows = [self._metadata.row_group(group).num_rows for group in groups]
        self._starts = np.cumsum([0, *rows])

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        return np.array([seed_of(key) for key in self._column("key")])

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        return np.array(self._column("target_size"), np.int32)

    def record(self, index: int) -> dict[str, Any]:
        group, row = self._row(index)
        record = {name: group[name][row].as_py() for name in self._fields}
        return {**record, "columns": json.loads(record["columns"])}

    def tensors(self, index: int) -> dict[str, Tensor]:
        group, row = self._row(index)
        shape = group[_SHAPE][row].as_py()
        return {
            name: torch.from_numpy(group[name][row].values.to_numpy().reshape(shape).copy())
            for name in self._tensors
        }

    def group(self, number: int) -> Any:
        """A row group as a table."""
        with self._file() as file:
            return file.read_row_group(number)

    def _row(self, index: int) -> tuple[Any, int]:
        """The row group of a sample, and its row in the group."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return _group(self, number), index - int(self._starts[number])

    def _column(self, name: str) -> list[Any]:
        with self._file() as file:
            values: list[Any] = file.read([name])[name].to_pylist()
        return values

    def _file(self) -> Any:
        # A new one for each use, so that threads share none.
        reader = require("pyarrow").BufferReader(self._content)
        return require("pyarrow.parquet").ParquetFile(reader, metadata=self._metadata)


@functools.lru_cache(maxsize=_GROUPS_KEPT)
def _group(shard: ParquetShard, number: int) -> Any:
    return shard.group(number)


def _clean(text: str | None) -> str | None:
    """A text with characters replaced that UTF-8 can't encode."""
    return None if text is None else text.encode("utf-8", "replace").decode()
