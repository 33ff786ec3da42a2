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
_CANT_BE_MOVED = (errno.EBUSY, errno.EXDEV, errno.EPERM)


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

    A directory that must stay the one it is (a mount point, the working directory, one in
    a directory that can't be written) is filled file by file instead: an error still rolls
    back, a crash leaves each file whole.

    Args:
        path: Where the directory goes. Parents are made. If it exists, the two are
            exchanged in one step where the system can (Linux), else in two.
        replaces: Glob patterns of the files that the new directory replaces; every other
            file of the old one is kept, unless one of its name is written.

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
    stays = path.exists() and _must_stay(path)
    temporary = _hidden_directory(path, path if stays else path.parent)
    try:
        yield temporary
        written = sorted(entry.name for entry in temporary.iterdir())
        if stays:
            _fill(path, temporary, written, replaces)
            return
        if path.exists():
            _keep_others(path, temporary, replaces)
            temporary.chmod(path.stat().st_mode)
        else:
            temporary.chmod(0o777 & ~_umask())
        _sync(temporary)
        try:
            _move_into_place(temporary, path)
        except OSError as error:
            if error.errno not in _CANT_BE_MOVED:
                raise
            inside = _hidden_directory(path, path)
            try:
                for name in written:
                    shutil.move(temporary / name, inside / name)
                _fill(path, inside, written, replaces)
            finally:
                shutil.rmtree(inside, ignore_errors=True)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hidden_directory(path: Path, parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=parent))


def _must_stay(path: Path) -> bool:
    """Whether an existing directory can't give its place to another, or must not."""
    try:
        current = Path.cwd()
    except FileNotFoundError:
        current = path.parent
    in_use = current == path or path in current.parents
    return in_use or path.is_mount() or not os.access(path.parent, os.W_OK | os.X_OK)


def _fill(path: Path, new: Path, written: list[str], replaces: tuple[str, ...]) -> None:
    """Move what was written into a directory, and what it replaces out, or neither."""
    backup = _hidden_directory(path, path)
    stale = [
        entry.name
        for entry in path.iterdir()
        if entry not in (new, backup)
        and (entry.name in written or any(entry.match(pattern) for pattern in replaces))
    ]
    placed: list[str] = []
    try:
        for name in stale:
            if (path / name).is_dir() or name not in written:
                (path / name).replace(backup / name)
            else:
                _link(path / name, backup / name)
        for name in written:
            (new / name).replace(path / name)
            placed.append(name)
        _sync(path)
    except BaseException:
        for name in set(placed) - set(stale):
            _remove(path / name)
        for entry in backup.iterdir():
            if entry.is_dir():
                _remove(path / entry.name)
            entry.replace(path / entry.name)
        raise
    finally:
        shutil.rmtree(backup, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _keep_others(old: Path, new: Path, replaces: tuple[str, ...]) -> None:
    """Link into the new directory what the old one has and nothing replaces."""
    for entry in old.iterdir():
        target = new / entry.name
        if os.path.lexists(target) or any(entry.match(pattern) for pattern in replaces):
            continue
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
