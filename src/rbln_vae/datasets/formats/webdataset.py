"""WebDataset: tar files in which members with the same key form a sample."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoder import Encoded
from ..seeds import seed_of
from .base import Shard, mapped, size_of, to_json


class WebDatasetShard(Shard):
    """Members for each sample: a `.npy` per tensor, the caption, and the record.

    Opening a shard reads only the headers. Keys and sizes are in the records, so accessing
    them reads all records.
    """

    suffix = ".tar"

    @staticmethod
    def write(path: Path, samples: Sequence[Encoded]) -> None:
        # USTAR does not support names of more than 256 bytes; PAX does.
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in samples:
                key = member_name(sample.record["key"])
                for name, tensor in sample.tensors.items():
                    content = io.BytesIO()
                    np.save(content, tensor.numpy(), allow_pickle=False)
                    _add(tar, f"{key}.{name}.npy", content.getvalue())
                if sample.record["caption"] is not None:
                    _add(tar, f"{key}.txt", sample.record["caption"].encode("utf-8", "replace"))
                _add(tar, f"{key}.json", to_json(sample.record))

    def __init__(self, path: Path) -> None:
        found: dict[str, list[tuple[int, int]]] = {}
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                suffix = member.name.rpartition("/")[2].partition(".")[2]
                start = member.offset_data
                found.setdefault(suffix, []).append((start, start + member.size))
        records = found.pop("json", [])
        tensors = {
            suffix.removesuffix(".npy"): spans
            for suffix, spans in found.items()
            if suffix.endswith(".npy")
        }
        if not records or any(len(spans) != len(records) for spans in tensors.values()):
            raise ValueError("its samples don't all have the same members")
        self._content = mapped(path)
        self._records = np.array(records)
        self._tensors = {name: np.array(spans) for name, spans in tensors.items()}

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        return np.array([seed_of(self.record(i)["key"]) for i in range(len(self._records))])

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        found = [size_of(self.record(i)) for i in range(len(self._records))]
        return np.array(found, np.int32)

    def record(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._bytes(self._records[index]))
        return record

    def tensors(self, index: int) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.load(io.BytesIO(self._bytes(spans[index]))))
            for name, spans in self._tensors.items()
        }

    def _bytes(self, span: npt.NDArray[np.int64]) -> bytes:
        return self._content[span[0] : span[1]].tobytes()


def member_name(key: str) -> str:
    """Encode a key as a member name without dots, because a name ends at its first dot.

    Example:
        >>> member_name("a.jpg")
        'a%2Ejpg'
    """
    return quote(key, safe="/ ").replace(".", "%2E")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # time and owner are 0, so equal data gives equal bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
