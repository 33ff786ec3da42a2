"""Torch data sets of encoded latents: access by number, by key, or one after the other."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..errors import RBLNDatasetError
from .formats import FORMATS, Shard
from .job import local_directory, read_manifest
from .options import Format
from .seeds import seed_of
from .shards import ShardInfo, checksum, open_shard

Item = dict[str, Any]


class LatentDataset(Dataset[Item]):
    """The output of `encode_dataset`, memory-mapped: a sample is read when it is accessed.

    An item is a dict with `key`, `caption` (or `None`), `columns`, the sizes
    `original_size`, `crops_coords_top_left` and `target_size`, each `(height, width)` in
    pixels, and tensors `(C, h, w)`: `mean` and `logvar`, or `latent`. The tensors of the
    mirrored image, if it was encoded, have names that end in `_flipped`. An item of a video also
    has its `frames` and `fps`, and its tensors are `(C, t, h, w)`.

    All formats give the same items. Safetensors and WebDataset read only the bytes of the
    sample. Parquet reads its whole row group, so access in random order costs much more than
    in the order of the source.

    Args:
        directory: The output directory of `encode_dataset`.

    Raises:
        RBLNDatasetError: The data set is incomplete or damaged.

    Example:
        >>> latents = LatentDataset("latents")  # doctest: +SKIP
        >>> latents[0]["mean"].shape, latents.get("a/1.jpg")["caption"]  # doctest: +SKIP
        (torch.Size([4, 64, 64]), 'a cat')
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = local_directory(directory)
        self.manifest = read_manifest(self.directory)
        self._format: Format = self.manifest["options"]["format"]
        if self._format not in FORMATS:
            raise RBLNDatasetError(
                f"{self.directory} is the record of a cache for {self._format}, which its trainer "
                "reads"
            )
        self._shards = [ShardInfo(**shard) for shard in self.manifest["shards"]]
        self._starts = np.cumsum([0, *(shard.samples for shard in self._shards)])
        self._open: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files again, and loads keys when it needs them.
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        LatentDataset.__init__(self, state["directory"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Item:
        """The sample at an index, in the order of the source; negative ones count from the end.

        Raises:
            IndexError: The index is out of range.
        """
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"{index} is no sample of {len(self)}")
        shard, row = self._place(number)
        record = shard.record(row)
        return {
            **{name: tuple(v) if isinstance(v, list) else v for name, v in record.items()},
            **shard.tensors(row),
        }

    def get(self, key: str) -> Item:
        """The sample with a key. The first call reads the keys of all shards.

        Raises:
            KeyError: There is no sample with that key.
        """
        hashes, order = self._keys
        wanted = seed_of(key)
        for place in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[place] != wanted:
                break
            number = int(order[place])
            shard, row = self._place(number)
            if shard.record(row)["key"] == key:
                return self[number]
        raise KeyError(key)

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Height and width of each sample's image in pixels, int32 `(samples, 2)`.

        Of videos `(samples, 3)`: frames, height and width.
        """
        sizes = [self._shard(number).sizes for number in range(len(self._shards))]
        axes = 2 if self.manifest["options"].get("frames") is None else 3
        return torch.from_numpy(np.concatenate([np.empty((0, axes), np.int32), *sizes]))

    def verify(self) -> None:
        """Read every shard and compare it with its checksum.

        Raises:
            RBLNDatasetError: A shard is missing or damaged.
        """
        for shard in self._shards:
            path = self.directory / shard.file
            if not path.exists() or checksum(path) != shard.sha256:
                raise RBLNDatasetError(
                    f"{path} is missing or damaged: its checksum differs from the manifest. "
                    "Remove it, and run the command that wrote it again."
                )

    def _place(self, number: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._shard(shard), number - int(self._starts[shard])

    def _shard(self, number: int) -> Shard:
        found = self._open.get(number)
        if found is None:
            # Maps keep no file descriptors, so any number of shards can be open.
            found = open_shard(self.directory, self._shards[number], self._format)
            self._open[number] = found
        return found

    @functools.cached_property
    def _keys(self) -> tuple[Any, Any]:
        """The sorted hashes of all keys, and the sample number of each."""
        shards = [self._shard(number).keys for number in range(len(self._shards))]
        hashes = np.concatenate([np.empty(0, np.int64), *shards])
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


class IterableLatentDataset(IterableDataset[Item]):
    """An iterable over all samples, each once among all workers and processes.

    The workers of a `DataLoader`, and the processes of `torch.distributed` if it is
    initialised, share the samples. `set_epoch` changes the order.

    Args:
        directory: The output directory of `encode_dataset`.
        shuffle: Whether to shuffle the whole data set, by default not.
        seed: The seed of the order, by default 0.

    Example:
        >>> loader = DataLoader(
        ...     IterableLatentDataset("latents", shuffle=True), batch_size=8, collate_fn=collate
        ... )  # doctest: +SKIP
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, shuffle: bool = False, seed: int = 0
    ) -> None:
        self.dataset = LatentDataset(directory)
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Item]:
        order: Sequence[int] | Any = range(len(self.dataset))
        if self.shuffle:
            order = _drawn(len(self.dataset), self.seed, self.epoch)
        first, step = _share()
        for number in itertools.islice(order, first, None, step):
            yield self.dataset[int(number)]


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of images of the same size, for a data set with buckets.

    Args:
        dataset: The data set.
        batch_size: Samples of a batch; the last batch of a size may be smaller.
        shuffle: Whether to shuffle samples and batches (default), or to keep the order of
            the source.
        seed: The seed of the order, by default 0.
        drop_last: Whether to drop smaller batches, by default not.

    Example:
        >>> batches = BucketBatchSampler(latents, 8)  # doctest: +SKIP
        >>> loader = DataLoader(latents, batch_sampler=batches, collate_fn=collate)
        ... # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        sizes, which = torch.unique(dataset.sizes, dim=0, return_inverse=True)
        self._groups = [torch.nonzero(which == i).view(-1) for i in range(len(sizes))]
        self._batch_size, self._drop_last = batch_size, drop_last
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        lost = 0 if self._drop_last else self._batch_size - 1
        return sum((len(group) + lost) // self._batch_size for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        batches: list[Tensor] = []
        for i, group in enumerate(self._groups):
            ordered = group[_drawn(len(group), self.seed, self.epoch, i)] if self.shuffle else group
            batches += torch.split(ordered, self._batch_size)
        if self._drop_last:
            batches = [batch for batch in batches if len(batch) == self._batch_size]
        order: Sequence[int] = range(len(batches))
        if self.shuffle:
            order = _drawn(len(batches), self.seed, self.epoch, "batches").tolist()
        else:
            batches.sort(key=lambda batch: int(batch[0]))
        for number in order:
            yield batches[number].tolist()


def collate(items: Sequence[Mapping[str, Any]]) -> Item:
    """Make a batch: tensors are stacked, sizes become int64 `(N, 2)`, the rest are lists.

    Args:
        items: Items with images of the same size.

    Example:
        >>> collate([latents[0], latents[1]])["mean"].shape  # doctest: +SKIP
        torch.Size([2, 4, 64, 64])
    """
    batch: Item = {}
    for name, value in items[0].items():
        values = [item[name] for item in items]
        if isinstance(value, Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.tensor(values) if isinstance(value, tuple) else values
    return batch


def _drawn(count: int, *seeds: object) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*seeds)))


def _share() -> tuple[int, int]:
    """The share of this worker of this process: its first sample, and the step to the next."""
    worker = get_worker_info()
    first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        return torch.distributed.get_rank() * step + first, ranks * step
    return first, step
