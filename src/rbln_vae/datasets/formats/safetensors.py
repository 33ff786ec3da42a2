"""Safetensors, the default format: each sample is a row of a few large tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...sizes import format_size
from ..encoder import Encoded
from ..seeds import seed_of
from .base import FORMAT_NAME, FORMAT_VERSION, Shard, size_of, to_json


class SafetensorsShard(Shard):
    """One tensor per kind and image size; `docs/datasets.md` lists them."""

    suffix = ".safetensors"

    @staticmethod
    def write(path: Path, samples: Sequence[Encoded]) -> None:
        rows: dict[tuple[int, ...], list[Encoded]] = {}
        places = []
        for sample in samples:
            size = size_of(sample.record)
            group = rows.setdefault(size, [])
            places.append((*size, len(group)))
            group.append(sample)
        tensors = {
            f"{name}.{format_size(size)}": torch.stack([sample.tensors[name] for sample in group])
            for size, group in rows.items()
            for name in group[0].tensors
        }
        records = [to_json(sample.record) for sample in samples]
        keys = [seed_of(sample.record["key"]) for sample in samples]
        tensors["places"] = torch.tensor(places, dtype=torch.int32)
        tensors["keys"] = torch.tensor(keys, dtype=torch.int64)
        ends = np.cumsum([0, *map(len, records)], dtype=np.int64)
        tensors["records.ends"] = torch.from_numpy(ends)
        tensors["records"] = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
        # A single key, because the order of several keys is not kept.
        description = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION}
        save_file(tensors, path, {"rbln_vae": json.dumps(description)})

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as stored:
            description = json.loads((stored.metadata() or {}).get("rbln_vae", "{}"))
            found = description.get("format"), description.get("format_version")
            if found != (FORMAT_NAME, FORMAT_VERSION):
                raise ValueError(f"expected {FORMAT_NAME} {FORMAT_VERSION}, found {found}")
            self._tensors: dict[str, Tensor] = {n: stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118
        self._names: dict[str, list[str]] = {}
        for name in self._tensors:
            kept, dot, size = name.partition(".")
            if dot and kept != "records":
                self._names.setdefault(size, []).append(kept)

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        return self._tensors["keys"].numpy()

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        return self._tensors["places"][:, :-1].numpy()

    def record(self, index: int) -> dict[str, Any]:
        start, end = self._tensors["records.ends"][index : index + 2].tolist()
        record: dict[str, Any] = json.loads(self._tensors["records"][start:end].numpy().tobytes())
        return record

    def tensors(self, index: int) -> dict[str, Tensor]:
        *sides, row = self._tensors["places"][index].tolist()
        size = format_size(sides)
        return {name: self._tensors[f"{name}.{size}"][row].clone() for name in self._names[size]}
