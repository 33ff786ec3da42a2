"""Sources of images: folders, tar shards, Parquet files, Hugging Face data sets."""

from __future__ import annotations

import os
from typing import Any, Literal, TypeAlias, get_args

from .base import Sample, Source, Split
from .files import Media, file_system, find_files
from .folder import FolderSource
from .tables import Columns, HuggingFaceSource, ParquetSource, load_dataset
from .tar import TarSource

__all__ = ["Kind", "Sample", "Source", "Split", "open_source"]

Kind: TypeAlias = Literal["auto", "folder", "webdataset", "parquet", "huggingface"]


def open_source(
    where: Any,
    *,
    kind: Kind = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    media: Media = "image",
) -> Source:
    """Open a source of images.

    Args:
        where: A folder of images; a `.tar` or `.parquet` file, a folder of such files, or a
            pattern with `*` or `{000..099}`; a directory that `datasets.Dataset.save_to_disk`
            wrote; or, with `kind="huggingface"`, the id of a data set on the hub. All but the
            last two may be addresses that fsspec opens, such as `s3://…` or `hf://…`. A
            `datasets.Dataset` or a `Source` is also accepted.
        kind: The kind of source; `"auto"`, the default, detects it.
        image_column: The column of images in Parquet and Hugging Face data sets; by default
            `image` or another usual name.
        caption_column: The column of captions; by default `caption`, `text` or another usual
            name, if there is one.
        split: The split of a Hugging Face data set, by default `"train"`.
        media: What the samples are: `"image"`, the default, or in folders and tar files `"video"`.

    Raises:
        ValueError: The kind can't be detected, or holds no videos.
        FileNotFoundError: The source does not exist.
        RBLNDatasetError: A package that reads the source is missing.

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
    name = os.fspath(where) if isinstance(where, (str, os.PathLike)) else None
    if kind == "auto":
        kind = "huggingface" if name is None else _kind_of(name)
    if media == "video" and kind not in ("folder", "webdataset"):
        raise ValueError(
            f"videos are read from folders and tar files, and the source is of kind {kind!r}"
        )
    if name is None:
        return HuggingFaceSource(where, columns)
    if kind == "folder":
        return FolderSource(name, media=media)
    if kind == "huggingface":
        return HuggingFaceSource(load_dataset(name, split), columns, f"{name} {split}")
    suffixes = (".parquet",) if kind == "parquet" else (".tar", ".tar.gz", ".tgz")
    files = find_files(name, suffixes)
    if kind == "parquet":
        return ParquetSource(name, files, columns)
    return TarSource(name, files, media)


def _kind_of(name: str) -> Kind:
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet"
    fs, path = file_system(name)
    if not fs.isdir(path):
        if not fs.exists(path):
            raise FileNotFoundError(
                f"there is no {name}; a data set on the hub needs kind huggingface"
            )
        raise ValueError(
            f"{name} is not a known source: expected a folder of images, .tar or .parquet "
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
