"""Encodes whole data sets of images as latents, and reads them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

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

# Reading latents needs no model, so names are imported at their first use.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".dataset": ("BucketBatchSampler", "IterableLatentDataset", "LatentDataset", "collate"),
        ".encode": ("Summary", "TooManyRejectedError", "encode_dataset", "estimate"),
        ".options": ("Options",),
        ".pipeline": ("Progress",),
        ".sources": ("Sample", "Source", "Split", "open_source"),
    },
)
