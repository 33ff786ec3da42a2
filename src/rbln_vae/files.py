"""Writes files so that a crash leaves no partial file, and no mixture of old and new unnoticed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file next to `path`, which replaces it if the block succeeds.

    Args:
        path: The file to write; its directory must exist.

    Yields:
        The temporary path to write to. If the block raises, it is removed and `path` is
        unchanged.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_files(path: Path, patterns: tuple[str, ...], marker: str) -> Iterator[Path]:
    """A temporary directory whose files move to `path` if the block succeeds.

    Readers refuse a directory without its marker. The old marker is removed before the first
    file moves, and the new one moves last. So a crash leaves the old files, the new files, or
    a directory that is clearly incomplete. The directory itself stays, so it may be a mount
    point or the working directory.

    Args:
        path: The directory to write. It and its parents are made if they are missing.
        patterns: Glob patterns of the old files that are removed. All other files are kept,
            except those that are written again.
        marker: The name of the file without which readers refuse the directory.

    Yields:
        The temporary directory to write to. If the block raises, `path` is unchanged.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name a directory to save to.")
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=path) as name:
            temporary = Path(name)
            yield temporary
            written = sorted(temporary.iterdir(), key=lambda file: file.name == marker)
            for file in written:
                _sync(file)
            (path / marker).unlink(missing_ok=True)
            _sync(path)
            stale = {file for pattern in patterns for file in path.glob(pattern)}
            for file in stale - {path / new.name for new in written}:
                file.unlink()
            for file in written:
                if file.name == marker:
                    _sync(path)
                file.replace(path / file.name)
            _sync(path)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
