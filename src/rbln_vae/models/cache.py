"""Compiled parts on disk, so that a program that starts again needn't compile again.

Each entry is a directory, named by the digest of everything that the compiled parts depend on.
It is written under another name and renamed, so that it is there whole or not at all, whoever
else writes or reads at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..artifact import FORMAT_VERSION, SUFFIX
from ..errors import RBLNArtifactError
from ..targets.base import CompiledPart, Target
from ..version import __version__

LIMIT = 10 * 2**30
"""The most bytes that the entries take together."""

_KEY_NAME = "key.json"
_ENTRY = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}\.tmp")
_ABANDONED = 3600.0  # seconds after which nobody writes a part any more

_WARNED: set[Path] = set()
"""The directories that can't be written, which has been said."""

Key = Mapping[str, Any]
"""What compiled parts depend on, as JSON."""


@dataclass(frozen=True)
class Entry:
    """The compiled parts of one model.

    Attributes:
        directory: Where they are.
        key: What they depend on; empty if the entry is damaged.
        size: Bytes that they take.
        used: When they were last written or read, in seconds since 1970.
    """

    directory: Path
    key: Key
    size: int
    used: float


class Cache:
    """A directory of compiled parts, of which the least recently used go first.

    Args:
        directory: Made when something is written to it.
        limit: The most bytes that the entries take together. By default 10 GiB.
    """

    def __init__(self, directory: Path, limit: int = LIMIT) -> None:
        self.directory = directory
        self.limit = limit

    @classmethod
    def of_user(cls) -> Cache | None:
        """The cache of this user; `None` if `RBLN_VAE_CACHE` is `off`.

        It is `rbln-vae` in `XDG_CACHE_HOME`, by default `~/.cache`; `RBLN_VAE_CACHE` names
        another directory.
        """
        named = os.environ.get("RBLN_VAE_CACHE")
        if named == "off":
            return None
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return cls(Path(named or Path(caches, "rbln-vae")).expanduser())

    def load(self, key: Key, target: Target, parts: Iterable[str]) -> dict[str, CompiledPart]:
        """Read the parts of an entry.

        Args:
            key: What they depend on.
            target: The target that they were compiled for.
            parts: Their names.

        Returns:
            The parts by name; empty if the entry is missing or damaged.
        """
        directory = self._entry(key)
        try:
            if _read_key(directory) != key:
                return {}
            found = {part: target.load(directory / f"{part}{SUFFIX}") for part in parts}
        except RBLNArtifactError:
            return {}
        with contextlib.suppress(OSError):  # others may own it
            os.utime(directory)
        return found

    def save(self, key: Key, parts: Mapping[str, CompiledPart]) -> None:
        """Write an entry, and remove the least recently used ones beyond the limit.

        Where nothing can be written, there is a warning instead.

        Args:
            key: What the parts depend on.
            parts: The parts by name.
        """
        directory = self._entry(key)
        temporary = self._unfinished(directory)
        try:
            temporary.mkdir(parents=True)
            for name, part in parts.items():
                part.save(temporary / f"{name}{SUFFIX}")
            (temporary / _KEY_NAME).write_text(json.dumps(key, indent=2), encoding="utf-8")
            self._remove(directory)
            temporary.rename(directory)
        except (OSError, RBLNArtifactError) as error:
            if _read_key(directory) != key:  # else another process was faster
                self._warn(error.__cause__ or error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._shrink()

    def entries(self) -> list[Entry]:
        """The entries, from the most to the least recently used."""
        found = []
        for directory in self._directories(_ENTRY):
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                size = sum(file.stat().st_size for file in directory.iterdir())
                used = directory.stat().st_mtime
                found.append(Entry(directory, _read_key(directory), size, used))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Remove every entry, and give their number."""
        removed = self._directories(_ENTRY)
        for directory in removed:
            self._remove(directory)
        for directory in self._directories(_UNFINISHED):
            shutil.rmtree(directory, ignore_errors=True)
        return len(removed)

    def _warn(self, error: BaseException) -> None:
        """Warn that nothing is kept, once for each directory."""
        if self.directory not in _WARNED:
            _WARNED.add(self.directory)
            warnings.warn(
                f"Compiled models are not kept for the next start: {error}. Set RBLN_VAE_CACHE to "
                "a directory that can be written, or to off.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _entry(self, key: Key) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.directory / xxhash.xxh3_128(text.encode()).hexdigest()

    def _unfinished(self, entry: Path) -> Path:
        """A new name beside an entry, which no reader takes for one."""
        return entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.tmp")

    def _directories(self, pattern: re.Pattern[str]) -> list[Path]:
        """The directories of these names; others may keep files of theirs beside them."""
        try:
            return [path for path in self.directory.iterdir() if pattern.fullmatch(path.name)]
        except OSError:
            return []

    def _remove(self, entry: Path) -> None:
        """Remove an entry at once for all readers; those that have it open may go on."""
        temporary = self._unfinished(entry)
        with contextlib.suppress(OSError):
            entry.rename(temporary)
            shutil.rmtree(temporary, ignore_errors=True)

    def _shrink(self) -> None:
        """Remove the least recently used entries beyond the limit, and what a crash left."""
        total = 0
        for entry in self.entries():
            total += entry.size
            if total > self.limit:
                self._remove(entry.directory)
        for directory in self._directories(_UNFINISHED):
            with contextlib.suppress(OSError):
                if time.time() - directory.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(directory, ignore_errors=True)


def key_of(
    model: torch.nn.Module,
    name: str,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    target: Target,
) -> Key | None:
    """What the compiled parts of a model depend on, down to each byte of its weights.

    Args:
        model: The diffusers model.
        name: What the parts will say that they were compiled from.
        config: The configuration of the model.
        options: Those that are fixed by compiling, with nothing left open.
        target: The target.

    Returns:
        The key; `None` if someone has put functions of their own into the model, which no key
        can tell from others.
    """
    import diffusers

    if any(map(_is_patched, model.modules())):
        return None
    key = {
        "model": name,
        "class": type(model).__name__,
        "config": {k: v for k, v in config.items() if not k.startswith("_")},
        "modules": _digest_of_modules(model),
        "weights": _digest_of_weights(model),
        "options": options,
        "target": target.name,
        "arithmetic": target.arithmetic,
        "toolchain": target.toolchain(),
        "format": FORMAT_VERSION,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "rbln_vae": f"{__version__} {_digest_of_package()}",
    }
    found: Key = json.loads(json.dumps(key, default=str))  # as it is read from a file
    return found


def _is_patched(module: torch.nn.Module) -> bool:
    """Whether a module has hooks, or functions in place of methods of its class."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return any(vars(module)[name] for name in hooks) or any(
        callable(value) and hasattr(type(module), name) for name, value in vars(module).items()
    )


def _digest_of_weights(model: torch.nn.Module) -> str:
    digest = xxhash.xxh3_128()
    weights = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, weight in sorted(weights, key=lambda item: item[0]):
        tensor = weight.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_modules(model: torch.nn.Module) -> str:
    """The classes of the modules and their plain attributes, such as strides and factors."""
    digest = xxhash.xxh3_128()
    for name, module in model.named_modules():
        found = vars(module).items()
        plain = sorted((k, v) for k, v in found if not k.startswith("_") and _is_plain(v))
        digest.update(f"{name} {type(module)} {plain}\n".encode())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@functools.cache
def _digest_of_package() -> str:
    """The code of this package, whose version stays the same while it is developed."""
    package = Path(__file__).parents[1]
    digest = xxhash.xxh3_128()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read_key(directory: Path) -> Key:
    """The key of an entry; empty if it is missing or damaged."""
    try:
        found = json.loads((directory / _KEY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
