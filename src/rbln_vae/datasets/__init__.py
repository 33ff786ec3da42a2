"""Encoding whole data sets, from images to latents, and reading them back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import BucketBatchSampler, IterableLatentDataset, LatentDataset, collate
    from .encode import Summary, TooManyRejectedError, encode_dataset, estimate
    from .options import Options
    from .pipeline import Progress
    from .sources import Sample, Source, Split, open_source

__all__ = [
    "BucketBatchSampler",
    "IterableLatentDataset",
    "LatentDataset",
    "Options",
    "Progress",
    "Sample",
    "Source",
    "Split",
    "Summary",
    "TooManyRejectedError",
    "collate",
    "encode_dataset",
    "estimate",
    "open_source",
]

# Loaded when first used: reading latents needs no model.
_MODULES = {
    ".dataset": ("BucketBatchSampler", "IterableLatentDataset", "LatentDataset", "collate"),
    ".encode": ("Summary", "TooManyRejectedError", "encode_dataset", "estimate"),
    ".options": ("Options",),
    ".pipeline": ("Progress",),
    ".sources": ("Sample", "Source", "Split", "open_source"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
