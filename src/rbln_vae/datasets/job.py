"""The record of a job on the disk: the request, the journal, and the manifest.

A part is a number of consecutive samples of a split. It is done when the journal has its
entry, which is written atomically after its shard. So a job that was interrupted at any
moment resumes with the parts that have no entry, and gives the same result.

A trainer's cache lies among the user's files, so the record of its job has a hidden directory of
its own there. That record only saves work: what it doesn't know is encoded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RBLNDatasetError
from ..files import atomic_path
from ..sizes import format_size
from ..version import __version__
from .encoder import Encoded
from .formats import FORMATS
from .formats.base import FORMAT_NAME, FORMAT_VERSION
from .options import Options
from .pictures import Rejected
from .shards import ShardInfo, holds_cache, unwritable, write_cache, write_shard

JOB = "job.json"
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
JOURNAL = "journal"
HIDDEN = ".rbln-vae"
"""The directory with the records of jobs that write the cache of a trainer."""

OF_THE_PACKAGE = {"library_version", "model.arithmetic"}
"""What in the record of a job no option sets, but the version of this package."""


@dataclass(frozen=True)
class Part:
    """Consecutive samples of a split, which become one shard.

    Attributes:
        split: The number of the split in the source.
        number: The number of the part in the split.
    """

    split: int
    number: int

    @property
    def name(self) -> str:
        """The name of the part's files; names sort in the order of the source."""
        return f"{self.split:06d}-{self.number:04d}"


@dataclass(frozen=True)
class Entry:
    """The journal's entry of a part that is done.

    Attributes:
        part: The part.
        last: Whether it is the last part of its split.
        fingerprint: The fingerprint of the split.
        shard: The shard, or `None` if every sample was rejected.
        rejected: The rejected samples, in order.
    """

    part: Part
    last: bool
    fingerprint: str
    shard: ShardInfo | None
    rejected: Sequence[Rejected]

    @property
    def samples(self) -> int:
        """The number of encoded samples."""
        return 0 if self.shard is None else self.shard.samples

    def to_json(self) -> str:
        """The contents of the entry's file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """Read the result of `to_json`.

        Raises:
            ValueError: The text is not an entry.
        """
        try:
            stored = json.loads(text)
            shard = stored["shard"]
            return cls(
                Part(**stored["part"]),
                stored["last"],
                stored["fingerprint"],
                None if shard is None else ShardInfo(**shard),
                [Rejected(**each) for each in stored["rejected"]],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not an entry of a journal: {error!r}") from None


class Job:
    """The record of a job.

    Args:
        directory: A directory with a job; `open_job` makes one.
        options: The options of the job.
    """

    def __init__(self, directory: Path, options: Options) -> None:
        self.directory, self.options = directory, options
        self.trainer = options.trainer
        self._out = directory if self.trainer is None else directory.parents[1]

    def done(self, part: Part) -> Entry | None:
        """The entry of a part if it is done and its shard exists, else `None`.

        Raises:
            RBLNDatasetError: The journal is damaged.
        """
        file = self._entry_file(part)
        try:
            entry = Entry.from_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RBLNDatasetError(f"{file} is damaged: {error}. Remove it to resume.") from None
        if entry.shard is not None:
            path = self.directory / entry.shard.file
            try:
                if path.stat().st_size != entry.shard.bytes:
                    return None
            except FileNotFoundError:
                return None
            if self.trainer is not None and not holds_cache(self.trainer, self._out, path):
                return None
        return entry

    def finish(
        self,
        part: Part,
        samples: Sequence[Encoded],
        rejected: Sequence[Rejected],
        *,
        last: bool,
        fingerprint: str,
    ) -> Entry:
        """Write the shard of a part, and then its entry.

        Raises:
            RBLNDatasetError: A file can't be written, for example because the disk is full.
        """
        if self.trainer is None:
            kind = FORMATS[self.options.format]
            suffix, write = kind.suffix, kind.write
        else:
            suffix, write = ".json", functools.partial(write_cache, self.trainer, self._out)
        path = self.directory / f"{part.name}{suffix}"
        shard = write_shard(path, write, samples) if samples else None
        entry = Entry(part, last, fingerprint, shard, rejected)
        _write(self._entry_file(part), [entry.to_json()])
        return entry

    def entries(self) -> Iterator[Entry]:
        """All entries, in the order of the source."""
        split = number = 0
        while entry := self.done(Part(split, number)):
            yield entry
            split, number = (split + 1, 0) if entry.last else (split, number + 1)

    def close(self, count: int | None = None) -> Totals:
        """Write the manifest and the list of rejected samples, after all parts are done.

        Args:
            count: The number of images in a folder, which may have been more when the job began;
                by default all entries of the journal count.
        """
        if count is not None:
            splits = -(-count // self.options.shard_size)
            for file in (self.directory / JOURNAL).glob("*.json"):
                if int(file.stem.partition("-")[0]) >= splits:
                    file.unlink()
        totals = Totals()
        for entry in self.entries():
            totals.add(entry)
        stored = read_record(self.directory / JOB)
        manifest = {
            **stored,
            "samples": totals.samples,
            "rejected": totals.rejected,
            "sizes": dict(sorted(totals.sizes.items())),
        }
        head = json.dumps(manifest, indent=1)[: -len("\n}")]

        def lines() -> Iterator[str]:
            yield head + ',\n "shards": ['
            comma = ""
            for entry in self.entries():
                if entry.shard is not None:
                    yield f"{comma}\n  {json.dumps(dataclasses.asdict(entry.shard))}"
                    comma = ","
            yield "\n ]\n}\n"

        self.remove_temporaries()
        self.write_rejected()
        _write(self.directory / MANIFEST, lines())
        return totals

    def remove_temporaries(self) -> None:
        """Remove the temporary files of a process that was killed: our own, and safetensors'."""
        for place in (self.directory, self.directory / JOURNAL):
            for stale in (*place.glob(".*.tmp"), *place.glob(".tmp??????")):
                stale.unlink(missing_ok=True)
        if self.trainer is not None:
            for stale in self._out.rglob(self.trainer.temporaries):
                stale.unlink(missing_ok=True)

    def write_rejected(self) -> None:
        """Write the list of samples that were rejected so far."""
        lines = (
            json.dumps(dataclasses.asdict(each)) + "\n"
            for entry in self.entries()
            for each in entry.rejected
        )
        _write(self.directory / REJECTED, lines)

    def _entry_file(self, part: Part) -> Path:
        return self.directory / JOURNAL / f"{part.name}.json"


@dataclass
class Totals:
    """Totals over the parts that are done.

    Attributes:
        samples: Number of encoded samples.
        rejected: Number of images that could not be encoded.
        shards: Number of shards.
        sizes: Number of samples of each image size, such as `{"512x512": 3}`.
    """

    samples: int = 0
    rejected: int = 0
    shards: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Add a part."""
        self.samples += entry.samples
        self.rejected += len(entry.rejected)
        if entry.shard is not None:
            self.shards += 1
            for size, count in entry.shard.sizes.items():
                self.sizes[size] = self.sizes.get(size, 0) + count


def local_directory(name: str | os.PathLike[str]) -> Path:
    """The directory of a data set; its files must support renaming, synchronising and mapping.

    Raises:
        ValueError: The name is the address of a remote file system.
    """
    # A Path has only one slash.
    if re.match(r"[A-Za-z][\w+.-]*:/", os.fspath(name)):
        raise ValueError(
            f"{os.fspath(name)} is an address, and encoded data sets are written to file "
            "systems of this machine: name a directory, and copy it when it is complete"
        )
    return Path(name)


def directory_of(out: Path, options: Options) -> Path:
    """The directory of a job's record.

    A trainer's cache can hold several jobs, of different architectures and, where the trainer
    tells their files apart, of different sizes.
    """
    if (trainer := options.trainer) is None:
        return out
    size = f"-{format_size(options.sizes[0])}" if trainer.architecture.by_size else ""
    return out / HIDDEN / f"{options.format}-{options.architecture}{size}"


@contextlib.contextmanager
def open_job(
    directory: Path, options: Options, source: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[Job]:
    """Start or resume a job in a directory, and lock it against other processes.

    A job for a trainer replaces one that was started with something else.

    Args:
        directory: The result of `directory_of`; it is made if it is missing.
        options: The options of the job.
        source: The result of `Source.describe`.
        model: The result of `identity_of`.

    Raises:
        RBLNDatasetError: The directory contains something else, or another process uses it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RBLNDatasetError(
            f"{directory} can't be made: {error.strerror}. Name another directory."
        ) from error
    with _locked(directory if options.trainer is None else directory.parent):
        wanted = job_record(options, source, model)
        if options.trainer is not None and not _is_same(directory, wanted):
            shutil.rmtree(directory)
            directory.mkdir()
        begins = not (directory / JOB).exists()
        if not begins:
            check_same(read_record(directory / JOB), wanted, directory)
        else:
            others = sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
            if others:
                raise RBLNDatasetError(
                    f"{directory} has no encoded data set, but {', '.join(others[:3])}; name an "
                    "empty directory"
                )
            _write(directory / JOB, [json.dumps(wanted, indent=1) + "\n"])
        (directory / JOURNAL).mkdir(exist_ok=True)
        job = Job(directory, options)
        job.remove_temporaries()
        try:
            yield job
        except Exception:
            if begins:
                _free(directory)
            raise


def _free(directory: Path) -> None:
    """Remove the record of a job of which nothing is done: the next may be another."""
    with contextlib.suppress(OSError):
        (directory / JOURNAL).rmdir()  # fails if parts are done
        (directory / REJECTED).unlink(missing_ok=True)
        (directory / JOB).unlink()


def job_record(
    options: Options, source: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """The request, as JSON values."""
    return {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "source": dict(source),
        "model": dict(model),
        "options": options.to_dict(),
    }


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> None:
    """Raise an `RBLNDatasetError` that names the differences between two records, if any."""
    stored, wanted = _flat(stored), _flat(json.loads(json.dumps(wanted)))
    names = [n for n in {**wanted, **stored} if stored.get(n) != wanted.get(n)]
    if names:
        listed = "; ".join(f"{n} {stored.get(n)!r}, not {wanted.get(n)!r}" for n in names)
        how = "Give the same values"
        if set(names) <= OF_THE_PACKAGE:
            how = "Its bits may differ from those of this version: use the one that started it"
        raise RBLNDatasetError(
            f"{directory} was started with {listed}. {how} to resume, or name another directory."
        )


def is_begun(directory: Path, wanted: Mapping[str, Any], options: Options) -> bool:
    """Whether a directory has a part of a job.

    Raises:
        RBLNDatasetError: It has another job, which this one can't replace.
    """
    if not (directory / JOB).exists():
        return False
    if options.trainer is not None:
        return _is_same(directory, wanted)
    check_same(read_record(directory / JOB), wanted, directory)
    return True


def _is_same(directory: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        check_same(read_record(directory / JOB), wanted, directory)
    except (RBLNDatasetError, FileNotFoundError):
        return False
    return True


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete job.

    Raises:
        RBLNDatasetError: The manifest is missing or damaged.
    """
    if not (directory / MANIFEST).exists():
        begun = (directory / JOB).exists()
        raise RBLNDatasetError(
            f"{directory} is not complete; run the command that started it again"
            if begun
            else f"{directory} has no encoded data set: there is no {MANIFEST}"
        )
    return read_record(directory / MANIFEST)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The names and values of a record, with nested names as `group.name`."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return flat


def read_record(path: Path) -> dict[str, Any]:
    """The contents of `job.json` or the manifest.

    Raises:
        RBLNDatasetError: The file is damaged, or has a format that this version can't read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RBLNDatasetError(f"{path} is damaged: {error}. Encode to a new directory.") from None
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    name, version = record.get("format"), record.get("format_version")
    if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
        raise RBLNDatasetError(
            f"{path} does not belong to an encoded data set that this version can read: expected "
            f"{FORMAT_NAME} {FORMAT_VERSION}, found {name} {version}"
        )
    return record


def _write(path: Path, lines: Any) -> None:
    try:
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise RBLNDatasetError(
                    f"another process is encoding to {directory}; wait for it, or end it"
                ) from None
            # A file system without locks. Writes are atomic, so two processes only waste time.
        yield
    finally:
        os.close(handle)
