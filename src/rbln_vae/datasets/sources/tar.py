"""Tar shards in the WebDataset layout."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Sample, Source, Split
from .files import (
    SUFFIXES,
    Media,
    file_fingerprint,
    file_system,
    names_of,
    printable,
    read_sidecars,
)

_DAMAGED = (tarfile.TarError, EOFError, zlib.error)
_NONE = 1 << 62
"""More samples than any file can have."""


@dataclass(frozen=True)
class TarSource(Source):
    """WebDataset shards: members with the same key and different suffixes form a sample."""

    name: str
    files: Sequence[str]
    media: Media = "image"

    def splits(self, size: int) -> Iterator[Split]:
        for file, name in zip(self.files, names_of(self.files), strict=True):
            yield TarSplit(file, name.removesuffix(".tar"), self.media)

    def count(self) -> int | None:
        if any("://" in file or not file.endswith(".tar") for file in self.files):
            return None
        return sum(TarSplit(file, "").count() for file in self.files)

    def describe(self) -> dict[str, Any]:
        return {"kind": "webdataset", "name": self.name}


@dataclass(frozen=True)
class TarSplit(Split):
    """One tar file."""

    file: str
    name: str
    media: Media = "image"

    def fingerprint(self) -> str:
        return file_fingerprint(self.file)

    def count(self) -> int:
        """The number of samples; reads only the headers."""
        return sum(1 for _ in self._groups(_NONE))

    def samples(self, start: int = 0) -> Iterator[Sample]:
        seen: set[bytes] = set()
        for number, (key, members) in enumerate(self._groups(start)):
            identity = hashlib.blake2b(key.encode(), digest_size=8).digest()
            repeated = identity in seen
            seen.add(identity)
            if number < start:
                continue
            name = f"{self.name}/{key}"
            if members is None:
                yield Sample(self.name, error=f"{self.file} is damaged: {key}")
            elif repeated:
                yield Sample(f"{name}#{number}", error=f"{self.file} has several samples {key}")
            else:
                yield _sample_of(name, members, self.media)

    def _groups(self, start: int) -> Iterator[tuple[str, dict[str, bytes] | None]]:
        """The key and the members of each sample; the members are empty before `start`.

        If the file is damaged, the last item is the error text and `None`.
        """
        number, current, members = -1, None, dict[str, bytes]()
        try:
            for tar, info in self._members():
                key, suffix = _split_member(info.name)
                if key != current:
                    if current is not None:
                        yield current, members
                    number, current, members = number + 1, key, {}
                if number >= start:
                    content = tar.extractfile(info)
                    assert content is not None
                    members[suffix] = content.read()
            if current is not None:
                yield current, members
        except _DAMAGED as error:
            # Keep the samples before the damage, and report the loss.
            yield f"{error}; {current or 'the first sample'} and all after it are lost", None

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        fs, path = file_system(self.file)
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file) as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                if info.isreg() and not info.name.rsplit("/", 1)[-1].startswith("."):
                    yield tar, info
            # tarfile mistakes a damaged header for the end, which consists of zeros.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at byte {tar.offset}")


def _split_member(name: str) -> tuple[str, str]:
    """The key and suffix of a member; as in WebDataset, the key ends at the first dot."""
    directory, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return printable(directory + slash + stem), suffix.lower()


def _sample_of(key: str, members: Mapping[str, bytes], media: Media) -> Sample:
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in SUFFIXES[media]]
    if not images:
        found = ", ".join(members) or "nothing"
        return Sample(key, error=f"there is no {media} in it, only {found}")
    beside = (member for member in members.items() if member[0] != images[0])
    try:
        caption, columns = read_sidecars(beside)
    except ValueError as error:
        return Sample(key, error=str(error))
    return Sample(key, members[images[0]], caption, columns)
