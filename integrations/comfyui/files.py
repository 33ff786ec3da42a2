"""The models in ComfyUI's folders for VAEs, by the names that the loader lists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

_SUFFIX = ".safetensors"
_MARKERS = ("rbln_config.json", "config.json")
"""What a directory of a compiled model has, and one of a diffusers model."""


def names() -> list[str]:
    """The models in all folders for VAEs: directories and `.safetensors` files, sorted."""
    return sorted({name for folder in _folders() for name in _names_in(folder)})


def find(name: str) -> Path:
    """The directory or file of a listed model.

    Raises:
        FileNotFoundError: There is none of this name.
    """
    for folder in _folders():
        if name in _names_in(folder):
            return folder / name
    raise FileNotFoundError(
        f"There is no model {name!r} in {', '.join(map(str, _folders()))}. Press R in ComfyUI to "
        "list the models again."
    )


def last_change(name: str) -> int:
    """When a listed model was written, in nanoseconds since 1970."""
    path = find(name)
    marker = _marker(path)
    return (path if marker is None else path / marker).stat().st_mtime_ns


def _folders() -> list[Path]:
    return [Path(folder) for folder in folder_paths.get_folder_paths("vae")]


def _names_in(folder: Path) -> Iterator[str]:
    """The models in a folder, relative to it; nothing within a model is one."""
    seen = set()
    for where, directories, files in os.walk(folder, followlinks=True):
        path = Path(where)
        if path.resolve() in seen:  # a link to a directory that contains it
            directories.clear()
            continue
        seen.add(path.resolve())
        if path != folder and _marker(path) is not None:
            directories.clear()
            yield path.relative_to(folder).as_posix()
            continue
        for file in files:
            if file.endswith(_SUFFIX):
                yield (path / file).relative_to(folder).as_posix()


def _marker(directory: Path) -> str | None:
    """The file that says that a directory is a model, if it is one."""
    return next((name for name in _MARKERS if (directory / name).is_file()), None)
