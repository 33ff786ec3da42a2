"""Files of all sources, local or at an address that fsspec opens, and what stands beside images."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import RBLNDatasetError

_IMAGES = "avif bmp dib gif heic heif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
"""What files of a folder and members of a tar are taken for images."""

CAPTION_SUFFIXES = ("txt", "caption")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "txt", "TEXT")

_REFUSALS = (401, 403, 410, 451)


def file_system(url: str) -> tuple[Any, str]:
    """The file system that an address belongs to, and its path there.

    Raises:
        RBLNDatasetError: Nothing that is installed opens it.
    """
    try:
        fs, path = require("fsspec.core").url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RBLNDatasetError(f"{url} can't be opened: {error}") from error
    return fs, str(path)


def read_file(url: str) -> bytes:
    """The bytes of a local file, or of one at an address.

    Raises:
        FileNotFoundError: There is none.
        PermissionError: It may not be read.
        Exception: It can't be read at present; what is raised depends on the file system.
    """
    if "://" not in url:
        return Path(url).read_bytes()
    fs, path = file_system(url)
    try:
        return bytes(fs.cat_file(path))
    except Exception as error:
        # Of answers over HTTP, fsspec tells 404 alone from those of a server that is ill.
        if (status := getattr(error, "status", None)) in _REFUSALS:
            raise PermissionError(f"{url}: the server answers {status}") from error
        raise


def find_files(name: str, suffixes: Sequence[str]) -> list[str]:
    """The files that a name or a pattern stands for, in order; addresses keep their protocol."""
    found = []
    for each in _expand_braces(name):
        fs, path = file_system(each)
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
    braceexpand = require("braceexpand")
    return list(braceexpand.braceexpand(name))


def require(module: str) -> Any:
    """A module of an optional package.

    Raises:
        RBLNDatasetError: It isn't installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RBLNDatasetError(
            f"this needs {module}, which isn't installed: pip install 'rbln-vae[datasets]'"
        ) from error


def names_of(files: Sequence[str]) -> list[str]:
    """What tells files apart: their paths below the folder that they have in common."""
    if len(files) == 1:
        return [files[0].rsplit("/", 1)[-1]]
    folders = [file.split("/")[:-1] for file in files]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    depth = len(list(shared))
    return ["/".join(file.split("/")[depth:]) for file in files]


def file_fingerprint(file: str) -> str:
    """What changes if another file stands there: its name and size; quick to tell."""
    fs, path = file_system(file)
    info = fs.info(path)
    return digest([file.rsplit("/", 1)[-1], info.get("size")])


def digest(value: object) -> str:
    """A short name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def printable(name: str) -> str:
    """A name that UTF-8 can hold, whatever bytes the file system has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def text_of(content: bytes) -> str:
    """The content as text, or in base64 where it is none."""
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return base64.b64encode(content).decode("ascii")


def read_sidecars(
    sidecars: Iterable[tuple[str, bytes]],
    caption: str | None = None,
    columns: Mapping[str, Any] | None = None,
) -> tuple[str | None, dict[str, Any]]:
    """The caption and the columns that files beside an image hold.

    Args:
        sidecars: Suffix, without its dot, and content of each.
        caption: What is known without them; a caption of its own file counts most.
        columns: Likewise.

    Raises:
        ValueError: A `.json` file holds no JSON object.
    """
    columns = dict(columns or {})
    for suffix, content in sidecars:
        if suffix in CAPTION_SUFFIXES:
            caption = content.decode("utf-8", "replace").strip()
        elif suffix != "json":
            columns[suffix] = text_of(content)
        else:
            try:
                found = json.loads(content)
            except ValueError as error:
                raise ValueError(f"its .json can't be read: {error}") from error
            if not isinstance(found, dict):
                raise ValueError("its .json holds no object")
            columns.update(found)
            caption = caption_of(found, None) if caption is None else caption
    return caption, columns


def caption_of(columns: Mapping[str, Any], name: str | None) -> str | None:
    """The caption among columns: that of the name, or of a usual one."""
    for each in _CAPTION_COLUMNS if name is None else (name,):
        if isinstance(columns.get(each), str):
            return str(columns[each])
    return None
