"""Reads files of sources, local or at an address that fsspec opens, and sidecars of images."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ...errors import RBLNDatasetError

_IMAGES = "avif bmp dib gif heic heif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
"""The suffixes of image files in folders and tar files."""

VIDEO_SUFFIXES = frozenset(("mkv", "mov", "mp4", "webm"))
"""The same of video files."""

Media: TypeAlias = Literal["image", "video"]
SUFFIXES: Mapping[Media, frozenset[str]] = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
"""The suffixes of the files that are samples, by what is wanted of a source."""

CAPTION_SUFFIXES = ("txt", "caption")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "txt", "TEXT")

_REFUSALS = (401, 403, 410, 451)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        RBLNDatasetError: No installed package opens the address.
    """
    try:
        fs, path = require("fsspec.core").url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RBLNDatasetError(f"{url} can't be opened: {error}") from error
    return fs, str(path)


def read_file(url: str) -> bytes:
    """The bytes of a local file or of a file at an address.

    Raises:
        FileNotFoundError: The file does not exist.
        PermissionError: Access is denied.
        Exception: The file can't be read at the moment; the type depends on the file system.
    """
    if "://" not in url:
        return Path(url).read_bytes()
    fs, path = file_system(url)
    try:
        return bytes(fs.cat_file(path))
    except Exception as error:
        # Over HTTP, fsspec distinguishes only 404 from temporary failures.
        if (status := getattr(error, "status", None)) in _REFUSALS:
            raise PermissionError(f"{url}: the server answers {status}") from error
        raise


def find_files(name: str, suffixes: Sequence[str]) -> list[str]:
    """The files that match a name or a pattern, in order; addresses keep their protocol."""
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
    """Import a module of an optional package.

    Raises:
        RBLNDatasetError: The package is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RBLNDatasetError(
            f"this needs {module}, which isn't installed: pip install 'rbln-vae[datasets]'"
        ) from error


def names_of(files: Sequence[str]) -> list[str]:
    """Short unique names of files: their paths below the deepest common folder."""
    if len(files) == 1:
        return [files[0].rsplit("/", 1)[-1]]
    folders = [file.split("/")[:-1] for file in files]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    depth = len(list(shared))
    return ["/".join(file.split("/")[depth:]) for file in files]


def file_fingerprint(file: str) -> str:
    """A text that changes with the name or size of a file; it is quick to compute."""
    fs, path = file_system(file)
    info = fs.info(path)
    return digest([file.rsplit("/", 1)[-1], info.get("size")])


def digest(value: object) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def printable(name: str) -> str:
    """A file name in which bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def text_of(content: bytes) -> str:
    """The content as text, or in base64 if it is not UTF-8."""
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return base64.b64encode(content).decode("ascii")


def read_sidecars(
    sidecars: Iterable[tuple[str, bytes]],
    caption: str | None = None,
    columns: Mapping[str, Any] | None = None,
) -> tuple[str | None, dict[str, Any]]:
    """The caption and the columns of an image, from its sidecars.

    Args:
        sidecars: The suffix, without the dot, and the content of each file.
        caption: The caption from elsewhere, if any. A caption file takes precedence over it,
            and a `.json` file does not.
        columns: The columns from elsewhere, if any; those of a `.json` file take precedence.

    Raises:
        ValueError: A `.json` file does not contain a JSON object.
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
    """The caption in the named column or, if `name` is `None`, in one with a usual name."""
    for each in _CAPTION_COLUMNS if name is None else (name,):
        if isinstance(columns.get(each), str):
            return str(columns[each])
    return None
