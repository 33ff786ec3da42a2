"""Shards: files of encoded samples, each written whole or not at all (see docs/datasets.md)."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RBLNDatasetError
from ..files import atomic_path
from ..images import Size, format_size
from .encoder import Encoded
from .options import Format
from .seeds import seed_of

FORMAT_NAME = "rbln-vae latents"
FORMAT_VERSION = 1
SUFFIXES: dict[Format, str] = {
    "safetensors": ".safetensors",
    "webdataset": ".tar",
    "parquet": ".parquet",
}
_ROW_GROUP = 64


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a shard that is on the disk.

    Attributes:
        file: Its name.
        samples: How many it holds.
        bytes: Its size.
        sha256: Of its bytes.
        sizes: How many samples of each image size, such as `{"512x512": 3}`.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    sizes: Mapping[str, int]


def write_shard(path: Path, kind: Format, samples: Sequence[Encoded]) -> ShardInfo:
    """Write a shard so that it is there whole or not at all.

    The same samples give the same bytes.

    Args:
        path: Where it goes; its directory must exist.
        kind: Its format.
        samples: At least one, all with tensors of the same names.

    Raises:
        RBLNDatasetError: It can't be written, for example on a full disk.
    """
    try:
        with atomic_path(path) as temporary:
            _WRITERS[kind](temporary, samples)
            size, digest = temporary.stat().st_size, checksum(temporary)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    sizes: dict[str, int] = {}
    for sample in samples:
        name = format_size(sample.record["target_size"])
        sizes[name] = sizes.get(name, 0) + 1
    return ShardInfo(path.name, len(samples), size, digest, dict(sorted(sizes.items())))


def unwritable(path: Path, error: Exception) -> RBLNDatasetError:
    """The error of a file that can't be written."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(
        error
    )
    what = "the disk is full" if full else str(error)
    return RBLNDatasetError(
        f"{path} can't be written: {what}. All shards before it are whole; make room and run the "
        "same command again, and it goes on from there."
    )


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


# safetensors


def _write_safetensors(path: Path, samples: Sequence[Encoded]) -> None:
    rows: dict[Size, list[Encoded]] = {}
    places = []
    for sample in samples:
        height, width = sample.record["target_size"]
        group = rows.setdefault((height, width), [])
        places.append((height, width, len(group)))
        group.append(sample)
    tensors = {
        f"{name}.{format_size(size)}": torch.stack([sample.tensors[name] for sample in group])
        for size, group in rows.items()
        for name in group[0].tensors
    }
    records = [_json(sample.record) for sample in samples]
    keys = [seed_of(sample.record["key"]) for sample in samples]
    tensors["places"] = torch.tensor(places, dtype=torch.int32)
    tensors["keys"] = torch.tensor(keys, dtype=torch.int64)
    ends = np.cumsum([0, *map(len, records)], dtype=np.int64)
    tensors["records.ends"] = torch.from_numpy(ends)
    tensors["records"] = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
    # One key, since the order of several is not kept.
    description = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION}
    save_file(tensors, path, {"rbln_vae": json.dumps(description)})


class Shard:
    """A safetensors shard, mapped: what isn't looked at is never read.

    Args:
        path: The file.

    Raises:
        RBLNDatasetError: It is missing, damaged or none of this format.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as stored:
                description = json.loads((stored.metadata() or {}).get("rbln_vae", "{}"))
                names = list(stored.keys())
                self._tensors: dict[str, Tensor] = {n: stored.get_tensor(n) for n in names}
        except (OSError, SafetensorError, ValueError) as error:
            raise RBLNDatasetError(
                f"{path} can't be read: {error}. Remove it and its journal, and encode again."
            ) from error
        found = description.get("format"), description.get("format_version")
        if found != (FORMAT_NAME, FORMAT_VERSION):
            raise RBLNDatasetError(
                f"{path} is not a shard that this version reads: expected {FORMAT_NAME} "
                f"{FORMAT_VERSION}, found {found}"
            )
        self._names: dict[str, list[str]] = {}
        for name in self._tensors:
            kept, dot, size = name.partition(".")
            if dot and kept != "records":
                self._names.setdefault(size, []).append(kept)

    def __len__(self) -> int:
        return len(self._tensors["places"])

    @property
    def keys(self) -> Tensor:
        """`seed_of` each key, int64 `(samples,)`."""
        return self._tensors["keys"]

    @property
    def sizes(self) -> Tensor:
        """Height and width in pixels of each sample, int32 `(samples, 2)`."""
        return self._tensors["places"][:, :2]

    def record(self, index: int) -> dict[str, Any]:
        """The record of a sample."""
        start, end = self._tensors["records.ends"][index : index + 2].tolist()
        text = self._tensors["records"][start:end].numpy().tobytes()
        record: dict[str, Any] = json.loads(text)
        return record

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Copies of the tensors of a sample, by name, each `(C, h, w)`."""
        height, width, row = self._tensors["places"][index].tolist()
        size = format_size((height, width))
        return {name: self._tensors[f"{name}.{size}"][row].clone() for name in self._names[size]}


# WebDataset


def _write_webdataset(path: Path, samples: Sequence[Encoded]) -> None:
    # USTAR holds no names of more than 256 bytes; PAX does.
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            key = member_name(sample.record["key"])
            for name, tensor in sample.tensors.items():
                content = io.BytesIO()
                np.save(content, tensor.numpy(), allow_pickle=False)
                _add(tar, f"{key}.{name}.npy", content.getvalue())
            if sample.record["caption"] is not None:
                _add(tar, f"{key}.txt", sample.record["caption"].encode("utf-8", "replace"))
            _add(tar, f"{key}.json", _json(sample.record))


def member_name(key: str) -> str:
    """A key as the name of members, which ends at the first dot: `"a%2Ejpg"`."""
    return quote(key, safe="/ ").replace(".", "%2E")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # its time and owner are 0, so that equal data is equal bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# Parquet


def _write_parquet(path: Path, samples: Sequence[Encoded]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RBLNDatasetError(
            "Parquet needs pyarrow, which isn't installed: pip install 'rbln-vae[datasets]'"
        ) from error
    number = pyarrow.from_numpy_dtype(next(iter(samples[0].tensors.values())).numpy().dtype)
    side = pyarrow.list_(pyarrow.int32())
    columns: dict[str, Any] = {
        "key": pyarrow.array([_clean(s.record["key"]) for s in samples], pyarrow.string()),
        "caption": pyarrow.array([_clean(s.record["caption"]) for s in samples], pyarrow.string()),
    }
    for name, value in samples[0].record.items():
        if isinstance(value, list):
            columns[name] = pyarrow.array([s.record[name] for s in samples], side)
    # As text, since types found in one shard may not be those of the next.
    texts = [_json(s.record["columns"]).decode() for s in samples]
    columns["columns"] = pyarrow.array(texts, pyarrow.string())
    first = next(iter(samples[0].tensors))
    columns["latent_shape"] = pyarrow.array([list(s.tensors[first].shape) for s in samples], side)
    for name in samples[0].tensors:
        flat = [s.tensors[name].numpy().reshape(-1) for s in samples]
        ends = np.cumsum([0, *map(len, flat)], dtype=np.int32)
        columns[name] = pyarrow.ListArray.from_arrays(
            pyarrow.array(ends), pyarrow.array(np.concatenate(flat), number)
        )
    # Few rows in a group, so that one sample is read without many others.
    parquet.write_table(
        pyarrow.table(columns),
        path,
        row_group_size=_ROW_GROUP,
        compression="zstd",
        use_dictionary=False,
    )


def _clean(text: str | None) -> str | None:
    """A text without what UTF-8 can't hold."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


_WRITERS: dict[Format, Callable[[Path, Sequence[Encoded]], None]] = {
    "safetensors": _write_safetensors,
    "webdataset": _write_webdataset,
    "parquet": _write_parquet,
}
