"""Shards: files of encoded samples, written atomically (see docs/datasets.md)."""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import RBLNDatasetError
from ..files import atomic_path
from ..sizes import format_size
from .encoder import Encoded
from .formats import FORMATS, Shard
from .formats.base import size_of
from .options import Format
from .trainers import Trainer


@dataclass(frozen=True)
class ShardInfo:
    """The description of a shard on the disk.

    Attributes:
        file: The name of the file.
        samples: The number of samples.
        bytes: The size of the file.
        sha256: The checksum of the file.
        sizes: The number of samples of each image size, such as `{"512x512": 3}`.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    sizes: Mapping[str, int]


def write_shard(
    path: Path, write: Callable[[Path, Sequence[Encoded]], None], samples: Sequence[Encoded]
) -> ShardInfo:
    """Write a shard atomically. The same samples give the same bytes.

    Args:
        path: The file to write; its directory must exist.
        write: Writes the file, such as `Shard.write` of a format.
        samples: At least one sample; all have tensors of the same names.

    Raises:
        RBLNDatasetError: The file can't be written, for example because the disk is full.
    """
    try:
        with atomic_path(path) as temporary:
            write(temporary, samples)
            size, digest = temporary.stat().st_size, checksum(temporary)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    sizes: dict[str, int] = {}
    for sample in samples:
        name = format_size(size_of(sample.record))
        sizes[name] = sizes.get(name, 0) + 1
    return ShardInfo(path.name, len(samples), size, digest, dict(sorted(sizes.items())))


def write_cache(trainer: Trainer, out: Path, path: Path, samples: Sequence[Encoded]) -> None:
    """Write the files of some samples to the cache of a trainer, and the list of these files.

    Args:
        trainer: The trainer.
        out: The directory of the cache.
        path: The list: a shard that has its samples elsewhere.
        samples: The samples.
    """
    files: dict[str, Any] = {}
    for sample in samples:
        files |= trainer.write(out, sample.record, sample.tensors)
    path.write_text(json.dumps(files, indent=1), encoding="utf-8")


def holds_cache(trainer: Trainer, out: Path, path: Path) -> bool:
    """Whether the files of a list by `write_cache` are all there."""
    files: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return all(trainer.holds(out / name, arrays) for name, arrays in files.items())


def open_shard(directory: Path, shard: ShardInfo, kind: Format) -> Shard:
    """Open a shard of a directory.

    Raises:
        RBLNDatasetError: The file is missing, truncated or of another format. Only its
            checksum detects other damage.
    """
    path = directory / shard.file
    try:
        found = path.stat().st_size
        if found != shard.bytes:
            raise ValueError(f"it has {found} bytes, expected {shard.bytes}")
        return FORMATS[kind](path)
    except (OSError, ValueError, SafetensorError, tarfile.TarError) as error:
        raise RBLNDatasetError(
            f"{path} can't be read: {error}. Remove it, and run the command that wrote it again."
        ) from error


def unwritable(path: Path, error: Exception) -> RBLNDatasetError:
    """The error of a file that can't be written."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(
        error
    )
    what = "the disk is full" if full else str(error)
    return RBLNDatasetError(
        f"{path} can't be written: {what}. All earlier shards are complete; free some space and "
        "run the same command again to resume."
    )


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
