"""Where images come from: folders, tar shards, Parquet files, Hugging Face data sets.

A source is an ordered list of splits, and a split an ordered list of samples. Both are
streamed, so that a source of any length takes little memory. A split can be sent to another
process, and can begin in its middle, which is how a job goes on where it was.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import math
import os
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ..errors import RBLNDatasetError

Kind: TypeAlias = Literal["auto", "folder", "webdataset", "parquet", "huggingface"]

_IMAGES = "avif bmp dib gif heic heif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
"""What files of a folder and members of a tar are taken for images."""

_CAPTION_SUFFIXES = ("txt", "caption")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "txt", "TEXT")
_NAMES_AT_ONCE = 1 << 16
_ROWS_AT_ONCE = 16
_DAMAGED = (tarfile.TarError, EOFError, zlib.error)


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


def open_source(
    where: Any,
    *,
    kind: Kind = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
) -> Source:
    """The source that a name stands for.

    Args:
        where: A folder of images; a `.tar` or `.parquet` file, a folder of these, a pattern
            with `*` or `{000..099}`; a directory that `datasets.Dataset.save_to_disk`
            wrote; the id of a data set on the hub, with `kind="huggingface"`. All but the
            last two may be addresses that fsspec opens, such as `s3://…` or `hf://…`. Or a
            `datasets.Dataset`, or a `Source`.
        kind: What it is; `"auto"` looks.
        image_column: Of Parquet and Hugging Face data sets; by default `image` or the like.
        caption_column: By default `caption`, `text` or the like, where there is one.
        split: Of a Hugging Face data set.

    Raises:
        ValueError: It can't be told what it is.
        FileNotFoundError: There is nothing of that name.
        RBLNDatasetError: A package is missing that reads it.

    Example:
        >>> source = open_source("photos")  # doctest: +SKIP
        >>> [sample.key for sample in next(source.splits(256)).samples()]  # doctest: +SKIP
        ['a/1.jpg', 'a/2.png']
    """
    if isinstance(where, Source):
        return where
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    columns = Columns(image_column, caption_column)
    if not isinstance(where, (str, os.PathLike)):
        return HuggingFaceSource(where, columns)
    name = os.fspath(where)
    if kind == "auto":
        kind = _kind_of(name)
    if kind == "folder":
        return FolderSource(name)
    if kind == "huggingface":
        return HuggingFaceSource(_load_dataset(name, split), columns, f"{name} {split}")
    suffixes = (".parquet",) if kind == "parquet" else (".tar", ".tar.gz", ".tgz")
    files = _find_files(name, suffixes)
    return ParquetSource(name, files, columns) if kind == "parquet" else TarSource(name, files)


def _kind_of(name: str) -> Kind:
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet"
    fs, path = _file_system(name)
    if not fs.isdir(path):
        if not fs.exists(path):
            raise FileNotFoundError(
                f"there is no {name}; a data set on the hub needs kind huggingface"
            )
        raise ValueError(
            f"{name} is no source that is known: expected a folder of images, .tar or .parquet "
            "files, or a data set that datasets saved; or name its kind"
        )
    top = [str(entry).rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    if "state.json" in top or "dataset_dict.json" in top:
        return "huggingface"
    for suffix, kind in (
        (".tar", "webdataset"),
        (".tar.gz", "webdataset"),
        (".parquet", "parquet"),
    ):
        if any(each.endswith(suffix) for each in top):
            return kind  # type: ignore[return-value]
    return "folder"


# Files, by fsspec


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url)
    return fs, str(path)


def read_file(url: str) -> bytes:
    """The bytes of a local file, or of one at an address."""
    if "://" not in url:
        return Path(url).read_bytes()
    fs, path = _file_system(url)
    return bytes(fs.cat_file(path))


def _find_files(name: str, suffixes: Sequence[str]) -> list[str]:
    """The files that a name or a pattern stands for, in order; addresses keep their protocol."""
    found = []
    for each in _expand_braces(name):
        fs, path = _file_system(each)
        if "*" in path:
            paths = fs.glob(path)
        elif fs.isdir(path):
            paths = [p for p in fs.find(path) if str(p).endswith(tuple(suffixes))]
        else:
            if not fs.exists(path):
                raise FileNotFoundError(f"there is no {each}")
            paths = [path]
        found += [str(p) if "://" not in name else fs.unstrip_protocol(p) for p in sorted(paths)]
    if not found:
        raise RBLNDatasetError(f"there are no {suffixes[0]} files in {name}")
    return list(dict.fromkeys(found))


def _expand_braces(name: str) -> list[str]:
    if "{" not in name:
        return [name]
    braceexpand = _require("braceexpand")
    return list(braceexpand.braceexpand(name))


def _require(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RBLNDatasetError(
            f"this needs {module}, which isn't installed: pip install 'rbln-vae[datasets]'"
        ) from error


def _names_of(files: Sequence[str]) -> list[str]:
    """What tells files apart: their paths below the folder that they have in common."""
    if len(files) == 1:
        return [files[0].rsplit("/", 1)[-1]]
    folders = [file.split("/")[:-1] for file in files]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    depth = len(list(shared))
    return ["/".join(file.split("/")[depth:]) for file in files]


def _file_fingerprint(file: str) -> str:
    fs, path = _file_system(file)
    info = fs.info(path)
    return _digest([file.rsplit("/", 1)[-1], info.get("size")])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _printable(name: str) -> str:
    """A name that UTF-8 can hold, whatever bytes the file system has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return base64.b64encode(content).decode("ascii")


def read_sidecar(suffix: str, content: bytes) -> tuple[str | None, dict[str, Any]]:
    """The caption and the columns that a file beside an image holds, by its suffix.

    Raises:
        ValueError: It is a `.json` file that holds no JSON object.
    """
    if suffix in _CAPTION_SUFFIXES:
        return content.decode("utf-8", "replace").strip(), {}
    if suffix != "json":
        return None, {suffix: _text(content)}
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("its .json file holds no object")
    return _caption(found, None), found


def _caption(columns: Mapping[str, Any], name: str | None) -> str | None:
    for each in _CAPTION_COLUMNS if name is None else (name,):
        if isinstance(columns.get(each), str):
            return str(columns[each])
    return None


# Folders


@dataclass(frozen=True)
class FolderSource(Source):
    """The images of a folder and those below it, by name; `.txt` and `.json` beside them."""

    root: str

    def splits(self, size: int) -> Iterator[Split]:
        files = self._files()
        empty = True
        while group := tuple(itertools.islice(files, size)):
            empty = False
            yield FolderSplit(self.root, group)
        if empty:
            raise RBLNDatasetError(
                f"there are no images in {self.root}: expected files that end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def count(self) -> int | None:
        return sum(1 for _ in self._files())

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "name": self.root}

    def _files(self) -> Iterator[tuple[str, ...]]:
        """Each image and its sidecars, as paths below the root."""
        if "://" in self.root:
            fs, root = _file_system(self.root)
            entries = functools.partial(_remote_entries, fs, root)
        else:
            entries = functools.partial(_local_entries, self.root)
        return _walk(entries, "", ())


Entry: TypeAlias = tuple[str, str, Any]
"""The stem, the suffix with its dot, and what tells a directory from all others, or `None`."""


def _walk(
    entries: Callable[[str, bool], Iterator[Entry]], directory: str, above: tuple[Any, ...]
) -> Iterator[tuple[str, ...]]:
    for stem, group in itertools.groupby(entries(directory, False), key=lambda entry: entry[0]):
        suffixes = [entry[1] for entry in group]
        plain = {suffix: suffix[1:].lower() for suffix in suffixes}
        known = (*_CAPTION_SUFFIXES, "json")
        sidecars = tuple(f"{directory}{stem}{s}" for s in suffixes if plain[s] in known)
        for suffix in suffixes:
            if plain[suffix] in IMAGE_SUFFIXES:
                yield (f"{directory}{stem}{suffix}", *sidecars)
    for name, suffix, identity in entries(directory, True):
        if identity not in above:  # a link to a directory above would never end
            yield from _walk(entries, f"{directory}{name}{suffix}/", (*above, identity))


def _local_entries(root: str, directory: str, directories: bool) -> Iterator[Entry]:
    """Sorted entries, of which only some are in memory, however many there are."""
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
    """Some files of a folder, each with its sidecars."""

    root: str
    files: tuple[tuple[str, ...], ...]

    def fingerprint(self) -> str:
        return _digest(self.files)

    def samples(self, start: int = 0) -> Iterator[Sample]:
        root = self.root.rstrip("/")
        for image, *sidecars in self.files[start:]:
            beside = tuple(f"{root}/{name}" for name in sidecars)
            yield Sample(_printable(image), f"{root}/{image}", sidecars=beside)


# Tar shards


@dataclass(frozen=True)
class TarSource(Source):
    """WebDataset shards: members of one name and several suffixes make a sample."""

    name: str
    files: Sequence[str]

    def splits(self, size: int) -> Iterator[Split]:
        for file, name in zip(self.files, _names_of(self.files), strict=True):
            yield TarSplit(file, name.removesuffix(".tar"))

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

    def fingerprint(self) -> str:
        return _file_fingerprint(self.file)

    def count(self) -> int:
        """How many samples there are, by the headers alone."""
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
                yield _sample_of(name, members)

    def _groups(self, start: int) -> Iterator[tuple[str, dict[str, bytes] | None]]:
        """Members by the name that they share, with their content from `start` on.

        Where a file is damaged, it ends with what is wrong, and `None`.
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
            # The samples before it are kept, and the loss is listed.
            yield f"{error}; {current or 'the first sample'} and all after it are lost", None

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        fs, path = _file_system(self.file)
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file) as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if info.isreg() and not info.name.rsplit("/", 1)[-1].startswith("."):
                    yield tar, info
            # tarfile takes a damaged header for the end, which is made of zeros.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at byte {tar.offset}")


_NONE = 1 << 62


def _split_member(name: str) -> tuple[str, str]:
    """Key and suffix of a member: its name ends at the first dot, as WebDataset has it."""
    directory, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return _printable(directory + slash + stem), suffix.lower()


def _sample_of(key: str, members: Mapping[str, bytes]) -> Sample:
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    if not images:
        found = ", ".join(members) or "nothing"
        return Sample(key, error=f"there is no image in it, only {found}")
    caption, columns = None, dict[str, Any]()
    for suffix, content in members.items():
        if suffix == images[0]:
            continue
        try:
            said, more = read_sidecar(suffix, content)
        except ValueError as error:
            return Sample(key, error=f"its .{suffix} can't be read: {error}")
        columns.update(more)
        if said is not None and (suffix != "json" or caption is None):
            caption = said
    return Sample(key, members[images[0]], caption, columns)


# Tables


@dataclass(frozen=True)
class Columns:
    """Which columns hold the image and the caption; `None` looks for the usual names."""

    image: str | None = None
    caption: str | None = None

    def image_of(self, names: Sequence[str], where: str) -> str:
        """The column of the image.

        Raises:
            RBLNDatasetError: There is none.
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
        """The sample that a row holds.

        Args:
            key: What it is called.
            row: Its values by the names of columns.
            image: The column of the image: bytes, a path, or both as Hugging Face has them.
            folder: Where paths begin.
        """
        value = row[image]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and "://" not in value:
            value = f"{folder}/{value}" if not value.startswith("/") else value
        columns = {name: _json_value(v) for name, v in row.items() if name != image}
        if not isinstance(value, (bytes, str)) or not value:
            return Sample(key, error=f"the column {image} holds no image")
        return Sample(key, value, _caption(row, self.caption), columns)

    def describe(self) -> dict[str, Any]:
        """The names that were given."""
        return {"image_column": self.image, "caption_column": self.caption}


def _json_value(value: Any) -> Any:
    """The value as JSON holds it: bytes as text or base64, times in ISO 8601."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return _text(value)
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
        for file, name in zip(self.files, _names_of(self.files), strict=True):
            with _open_parquet(file) as table:
                image = self.columns.image_of(table.schema_arrow.names, file)
                rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            fingerprint = _file_fingerprint(file)
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
    """Some row groups of a file."""

    file: str
    name: str
    of_file: str
    image: str
    columns: Columns
    groups: tuple[int, int]
    offset: int

    def fingerprint(self) -> str:
        return _digest([self.of_file, self.groups])

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
    parquet = _require("pyarrow.parquet")
    fs, path = _file_system(file)
    with fs.open(path, "rb") as opened:
        try:
            # Pages are read as they are needed, not a whole row group of images at once.
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
        datasets = _require("datasets")
        if not isinstance(self.dataset, datasets.Dataset):
            raise TypeError(
                "expected a name, a Source or a datasets.Dataset, found a "
                f"{type(self.dataset).__name__}; of a DatasetDict choose a split, and for "
                "streaming name its Parquet files, hf://datasets/…"
            )

    def splits(self, size: int) -> Iterator[Split]:
        datasets = _require("datasets")
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
        # Not its fingerprint, which datasets gives anew where it can't tell.
        return {"kind": "huggingface", "name": self.name, **self.columns.describe()}


@dataclass(frozen=True)
class HuggingFaceSplit(Split):
    """Some consecutive rows."""

    dataset: Any
    image: str
    columns: Columns
    start: int
    end: int

    def fingerprint(self) -> str:
        return _digest([len(self.dataset), self.dataset.column_names, self.start, self.end])

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for number in range(self.start + start, self.end):
            key = f"{number:08d}"
            yield self.columns.sample(key, self.dataset[number], self.image, ".")


def _load_dataset(name: str, split: str) -> Any:
    datasets = _require("datasets")
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
