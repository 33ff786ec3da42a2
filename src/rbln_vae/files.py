"""Writing files so that a crash leaves the old ones or none, never half of the new."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well.

    Args:
        path: Where the file goes; its directory must exist.

    Yields:
        The temporary path to write to. If the block raises, it is removed and `path` is
        what it was.
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
def atomic_directory(path: Path, replaces: tuple[str, ...]) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends well.

    Args:
        path: Where the directory goes. Parents are made. If it exists, the two are
            exchanged in one step where the system can (Linux), else in two.
        replaces: Glob patterns of the files that the new directory replaces; every other
            file of the old one is kept.

    Yields:
        The temporary directory to write to. If the block raises, it is removed and `path`
        is what it was.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name a directory to save to.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        if path.exists():
            _keep_others(path, temporary, replaces)
            temporary.chmod(path.stat().st_mode)
        else:
            temporary.chmod(0o777 & ~_umask())
        _sync(temporary)
        _move_into_place(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_others(old: Path, new: Path, replaces: tuple[str, ...]) -> None:
    """Link into the new directory what the old one has and nothing replaces."""
    for entry in old.iterdir():
        if any(entry.match(pattern) for pattern in replaces):
            continue
        target = new / entry.name
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _move_into_place(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        aside = new.with_name(new.name + ".old")
        path.rename(aside)
        try:
            new.rename(path)
        except OSError:
            aside.rename(path)
            raise
        aside.rename(new)  # where the caller removes it


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; `False` where the system can't."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


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
