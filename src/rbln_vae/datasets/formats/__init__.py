"""The formats of shards: safetensors, WebDataset, Parquet."""

from __future__ import annotations

from ..options import Format
from .base import Shard
from .parquet import ParquetShard
from .safetensors import SafetensorsShard
from .webdataset import WebDatasetShard

__all__ = ["FORMATS", "Shard"]

FORMATS: dict[Format, type[Shard]] = {
    "safetensors": SafetensorsShard,
    "webdataset": WebDatasetShard,
    "parquet": ParquetShard,
}
