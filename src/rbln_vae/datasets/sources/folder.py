"""Folders of images, with subfolders and sidecar files."""

from __future__ import annotations

import functools
import heapq
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...errors import RBLNDatasetError
from .base import Sample, Source, Split
from .files import CAPTION_SUFFIXES, SUFFIXES, Media, digest, file_system, printable

_NAMES_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class FolderSource(Source):
    """The images of a folder and its subfolders, sorted by name, with their sidecars.

    Attributes:
        root: The folder.
        takes: Which files are images, by their paths in the folder; sidecars are left out then.
            `None` takes all that Pillow may read.
        media: What the files are, by default images.
    """

    root: str
    takes: Callable[[str], bool] | None = None
    media: Media = "image"

    def splits(self, size: int) -> Iterator[Split]:
        files = self._files()
        empty = True
        while group := tuple(itertools.islice(files, size)):
            empty = False
            yield FolderSplit(self.root, group)
        if empty:
            raise RBLNDatasetError(
                f"there are no {self.media}s in {self.root}: expected files that end in "
                f"{', '.join(sorted(SUFFIXES[self.media]))}"
                + (", of the kinds that the trainer takes" if self.takes else "")
            )

    def count(self) -> int:
        return sum(1 for _ in self._files())

    def names(self) -> Iterator[str]:
        """The images, as paths in the folder, in order."""
        return (image for image, *_ in self._files())

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "name": self.root}

    def _files(self) -> Iterator[tuple[str, ...]]:
        """Each image with its sidecars, as paths relative to the root."""
        if "://" in self.root:
            fs, root = file_system(self.root)
            entries = functools.partial(_remote_entries, fs, root)
        else:
            entries = functools.partial(_local_entries, self.root)
        found = _walk(entries, "", (), SUFFIXES[self.media])
        if (takes := self.takes) is None:
            return found
        return ((image,) for image, *_ in found if takes(image))


Entry: TypeAlias = tuple[str, str, Any]
"""The stem, the suffix with its dot, and the identity of a directory (`None` for a file)."""


def _walk(
    entries: Callable[[str, bool], Iterator[Entry]],
    directory: str,
    above: tuple[Any, ...],
    wanted: frozenset[str],
) -> Iterator[tuple[str, ...]]:
    for stem, group in itertools.groupby(entries(directory, False), key=lambda entry: entry[0]):
        suffixes = [entry[1] for entry in group]
        plain = {suffix: suffix[1:].lower() for suffix in suffixes}
        known = (*CAPTION_SUFFIXES, "json")
        sidecars = tuple(f"{directory}{stem}{s}" for s in suffixes if plain[s] in known)
        for suffix in suffixes:
            if plain[suffix] in wanted:
                yield (f"{directory}{stem}{suffix}", *sidecars)
    for name, suffix, identity in entries(directory, True):
        if identity not in above:  # a link to a parent would recurse forever
            yield from _walk(entries, f"{directory}{name}{suffix}/", (*above, identity), wanted)


def _local_entries(root: str, directory: str, directories: bool) -> Iterator[Entry]:
    """Sorted entries of a directory, with a bounded number of them in memory."""
    last: tuple[str, str] | None = None

    def further() -> Iterator[Entry]:
        with os.scandir(os.path.join(root, directory)) as found:  # noqa: PTH118 - a suffix stays
            for entry in found:
                if entry.name.startswith("."):
                    continue
                name = _stem_and_suffix(entry.name)
                if last is not None and name <= last:
                    continue
                if entry.is_dir() == directories:
                    info = entry.stat() if directories else None
                    yield (*name, info and (info.st_dev, info.st_ino))

    while some := heapq.nsmallest(_NAMES_AT_ONCE, further(), key=lambda entry: entry[:2]):
        yield from some
        last = some[-1][:2]
        if len(some) < _NAMES_AT_ONCE:
            return


def _remote_entries(fs: Any, root: str, directory: str, directories: bool) -> Iterator[Entry]:
    found = []
    for entry in fs.ls(f"{root}/{directory}".rstrip("/"), detail=True):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        if not name.startswith(".") and (entry["type"] == "directory") == directories:
            found.append((*_stem_and_suffix(name), entry["name"] if directories else None))
    yield from sorted(found, key=lambda entry: entry[:2])


def _stem_and_suffix(name: str) -> tuple[str, str]:
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if stem else (name, "")


@dataclass(frozen=True)
class FolderSplit(Split):
    """Consecutive files of a folder, each with its sidecars."""

    root: str
    files: tuple[tuple[str, ...], ...]

    def fingerprint(self) -> str:
        return digest(self.files)

    def samples(self, start: int = 0) -> Iterator[Sample]:
        root = self.root.rstrip("/")
        for image, *sidecars in self.files[start:]:
            beside = tuple(f"{root}/{name}" for name in sidecars)
            yield Sample(printable(image), f"{root}/{image}", sidecars=beside)
