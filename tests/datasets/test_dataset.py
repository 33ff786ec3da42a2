"""Reading encoded data sets back: by number, by key, one after the other, in batches of a size."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import make_folder
from torch.utils.data import DataLoader
from vaes import default_compiled

from rbln_vae.datasets import (
    BucketBatchSampler,
    IterableLatentDataset,
    LatentDataset,
    Options,
    collate,
    encode_dataset,
)
from rbln_vae.datasets.formats import parquet
from rbln_vae.errors import RBLNDatasetError

COUNT = 23


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "in", COUNT)


@pytest.fixture(scope="module", params=["safetensors", "webdataset", "parquet"])
def directory(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same samples in each format; every test of this module holds for all."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    options = Options(
        sizes=((32, 32),), aspect=True, bucket_step=8, shard_size=5, format=request.param
    )
    encode_dataset(images, out, default_compiled(), options)
    return out


@pytest.fixture
def dataset(directory: Path) -> LatentDataset:
    return LatentDataset(directory)


def keys_of(items) -> list[str]:
    return [item["key"] for item in items]


def test_samples_stand_in_the_order_of_the_source(dataset: LatentDataset) -> None:
    assert len(dataset) == COUNT
    keys = keys_of(dataset[n] for n in range(COUNT))
    assert keys == sorted(keys, key=lambda key: (key.startswith("more/"), key))
    assert dataset[-1]["key"] == keys[-1]
    for number in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            dataset[number]


def test_an_item_has_all_that_is_known_of_it(dataset: LatentDataset) -> None:
    item = dataset.get("0004.png")
    assert item["caption"] is None and item["columns"] == {"number": 4}
    assert item["original_size"] == (128, 112)
    height, width = item["target_size"]
    assert item["mean"].shape == item["logvar"].shape == (4, height // 2, width // 2)
    assert item["mean"].dtype == torch.float16
    assert dataset.get("more/0003.jpg")["caption"] == "caption 3"


@pytest.mark.parametrize("kept", [{"flip": True}, {"sample": True, "latent_dtype": "float32"}])
def test_all_formats_give_the_same_items(images: Path, tmp_path: Path, kept: Any) -> None:
    options = Options(sizes=((32, 32), (64, 64)), aspect=True, bucket_step=16, **kept)
    expected, *others = (
        _encoded(images, tmp_path / kind, dataclasses.replace(options, format=kind))
        for kind in ("safetensors", "webdataset", "parquet")
    )
    order = torch.randperm(COUNT).tolist()
    for other in others:
        assert torch.equal(other.sizes, expected.sizes)
        for number in order:
            assert_same(other[number], expected[number])


def _encoded(images: Path, out: Path, options: Options) -> LatentDataset:
    encode_dataset(images, out, default_compiled(), options)
    return LatentDataset(out)


def assert_same(item: dict[str, Any], expected: dict[str, Any]) -> None:
    assert item.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert item[name].dtype == value.dtype and torch.equal(item[name], value)
        else:
            assert item[name] == value


def test_a_row_group_of_parquet_is_read_once_for_all_its_samples(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_ROW_GROUP", 4)
    dataset = _encoded(images, tmp_path / "out", Options(sizes=((32, 32),), format="parquet"))
    read, groups = parquet.ParquetShard.group, []

    def recording(shard: parquet.ParquetShard, number: int) -> Any:
        groups.append(number)
        return read(shard, number)

    monkeypatch.setattr(parquet.ParquetShard, "group", recording)
    for number in range(COUNT):
        dataset[number]
    assert groups == list(range(6))


def test_every_key_is_found_and_no_other(dataset: LatentDataset) -> None:
    for number in range(COUNT):
        item = dataset[number]
        found = dataset.get(item["key"])
        assert found["key"] == item["key"] and torch.equal(found["mean"], item["mean"])
    with pytest.raises(KeyError):
        dataset.get("0004")


def test_what_is_done_to_an_item_stays_there(dataset: LatentDataset) -> None:
    before = dataset[0]["mean"].clone()
    dataset[0]["mean"].zero_()
    assert torch.equal(dataset[0]["mean"], before)
    dataset.verify()


def test_shards_hold_no_descriptors(dataset: LatentDataset) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(COUNT):
        dataset[number]
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_the_iterable_gives_each_sample_once(directory: Path) -> None:
    expected = keys_of(LatentDataset(directory)[n] for n in range(COUNT))
    assert keys_of(IterableLatentDataset(directory)) == expected
    drawn = IterableLatentDataset(directory, shuffle=True, seed=1)
    first = keys_of(drawn)
    assert first != expected and sorted(first) == sorted(expected) and keys_of(drawn) == first
    drawn.set_epoch(1)
    assert keys_of(drawn) != first


@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_of_a_loader_share_the_samples(directory: Path, shuffle: bool) -> None:
    source = IterableLatentDataset(directory, shuffle=shuffle)
    loader = DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(keys_of(loader)) == sorted(keys_of(IterableLatentDataset(directory)))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_hold_one_size_and_each_sample_once(
    dataset: LatentDataset, shuffle: bool, drop_last: bool
) -> None:
    sampler = BucketBatchSampler(dataset, 3, shuffle=shuffle, drop_last=drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len({dataset[n]["target_size"] for n in batch}) == 1 for batch in batches)
    drawn = [n for batch in batches for n in batch]
    assert len(set(drawn)) == len(drawn)
    assert all(len(batch) == 3 for batch in batches) if drop_last else len(drawn) == COUNT
    assert list(sampler) == batches
    sampler.set_epoch(1)
    assert (list(sampler) != batches) == shuffle


def test_a_loader_makes_batches_of_them(dataset: LatentDataset) -> None:
    batches = BucketBatchSampler(dataset, 4)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
    total = 0
    for batch in loader:
        count = len(batch["key"])
        height, width = batch["target_size"][0].tolist()
        assert batch["mean"].shape == (count, 4, height // 2, width // 2)
        assert batch["original_size"].shape == (count, 2)
        total += count
    assert total == COUNT


def test_it_can_be_sent_to_another_process(dataset: LatentDataset) -> None:
    dataset.get("0004.png")
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["mean"], dataset[3]["mean"])


def test_a_damaged_shard_is_found(directory: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(directory, tmp_path / "copy")
    path = sorted((tmp_path / "copy").glob("0*.*"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RBLNDatasetError, match=path.name):
        LatentDataset(tmp_path / "copy").verify()
    for damage in (b"", content[: len(content) // 2], bytes(len(content))):
        path.write_bytes(damage)
        with pytest.raises(RBLNDatasetError, match="can't be read"):
            LatentDataset(tmp_path / "copy")[6]
    path.unlink()
    with pytest.raises(RBLNDatasetError, match="can't be read"):
        LatentDataset(tmp_path / "copy")[6]


def test_what_is_no_complete_data_set_is_an_error(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RBLNDatasetError, match=r"no manifest\.json"):
        LatentDataset(tmp_path)
    (tmp_path / "job.json").write_bytes((directory / "job.json").read_bytes())
    with pytest.raises(RBLNDatasetError, match="not complete"):
        LatentDataset(tmp_path)


def test_a_data_set_of_a_newer_version_is_refused(directory: Path, tmp_path: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(RBLNDatasetError, match=r"expected rbln-vae latents 1, found .* 2"):
        LatentDataset(tmp_path)
