"""Encoding data sets: what is written, and that nothing is lost, whatever happens."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub import serve_hub
from pictures import digests, encoded, make_folder, photograph, picture
from PIL import Image
from safetensors import safe_open
from vaes import compile_vae, default_compiled, default_vae, make_flux2, make_vae

from rbln_vae import RBLNAutoencoder
from rbln_vae.datasets import (
    LatentDataset,
    Options,
    Progress,
    Sample,
    Source,
    Split,
    TooManyRejectedError,
    encode_dataset,
    estimate,
)
from rbln_vae.datasets.formats.safetensors import SafetensorsShard
from rbln_vae.datasets.formats.webdataset import member_name
from rbln_vae.datasets.seeds import seed_of
from rbln_vae.errors import RBLNDatasetError
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.base import get_target

OPTIONS = Options(sizes=((32, 32),), aspect=True, bucket_step=8, shard_size=6, crop="random")
COUNT = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "in", COUNT)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    encode_dataset(images, out, default_compiled(), OPTIONS)
    return out


def pixels_of(item: dict[str, Any], images: Path) -> torch.Tensor:
    """What the encoder was given for an item, by its record alone: `(1, 3, H, W)`."""
    image: Image.Image = Image.open(images / item["key"])
    (height, width), (top, left) = item["target_size"], item["crops_coords_top_left"]
    ratio = max(height / image.height, width / image.width)
    scaled = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def expected_of(item: dict[str, Any], images: Path, flip: bool = False) -> Any:
    """What diffusers gives for it in float32."""
    sample = pixels_of(item, images)
    with torch.no_grad():
        return default_vae().encode(sample.flip(3) if flip else sample).latent_dist


# What is written


def test_latents_are_those_of_diffusers(images: Path, whole: Path) -> None:
    dataset = LatentDataset(whole)
    assert len(dataset) == COUNT
    for number in range(COUNT):
        item = dataset[number]
        expected = expected_of(item, images)
        assert relative_l2(item["mean"][None].float(), expected.mean) < 1e-3
        assert relative_l2(item["logvar"][None].float(), expected.logvar) < 1e-3


@pytest.mark.parametrize("flip", [False, True])
def test_latents_have_the_bits_of_those_of_samples(
    images: Path, tmp_path: Path, flip: bool
) -> None:
    options = dataclasses.replace(OPTIONS, flip=flip, latent_dtype="float32")
    encode_dataset(images, tmp_path / "out", default_compiled(), options)
    dataset = LatentDataset(tmp_path / "out")
    for number in range(0, COUNT, 5):
        item = dataset[number]
        sample = pixels_of(item, images)
        found = default_compiled().encode(sample).latent_dist
        assert torch.equal(item["mean"], found.mean[0])
        if flip:
            mirrored = default_compiled().encode(sample.flip(3)).latent_dist
            assert torch.equal(item["logvar_flipped"], mirrored.logvar[0])


@pytest.mark.parametrize("flip", [False, True])
def test_a_sample_is_drawn_by_seed_and_key(images: Path, tmp_path: Path, flip: bool) -> None:
    options = dataclasses.replace(OPTIONS, sample=True, flip=flip, seed=3, latent_dtype="float32")
    encode_dataset(images, tmp_path / "out", default_compiled(), options)
    dataset = LatentDataset(tmp_path / "out")
    for number in range(0, COUNT, 3):
        item = dataset[number]
        assert "mean" not in item
        for suffix in ("", "_flipped")[: 1 + flip]:
            expected = expected_of(item, images, flip=bool(suffix))
            generator = torch.Generator().manual_seed(seed_of(3, "sample" + suffix, item["key"]))
            noise = torch.randn(expected.mean.shape[1:], generator=generator)
            drawn = expected.mean + expected.std * noise
            assert relative_l2(item["latent" + suffix][None], drawn) < 1e-4


def test_a_mirrored_copy_is_that_of_the_mirrored_image(images: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, flip=True, latent_dtype="float32")
    encode_dataset(images, tmp_path / "out", default_compiled(), options)
    item = LatentDataset(tmp_path / "out")[5]
    expected = expected_of(item, images, flip=True)
    assert relative_l2(item["mean_flipped"][None], expected.mean) < 1e-4
    assert relative_l2(item["mean"][None], expected.mean) > 0.1
    top, left = item["crops_coords_top_left"]
    other_top, other_left = item["crops_coords_top_left_flipped"]
    assert top == other_top and left + other_left + item["target_size"][1] >= 32


@pytest.mark.parametrize("shift", [None, 0.5])
def test_scaling_is_applied_if_asked_for_and_always_recorded(
    images: Path, tmp_path: Path, shift: float | None
) -> None:
    vae = compile_vae(make_vae(scaling_factor=0.25, shift_factor=shift))
    for scale in (False, True):
        options = dataclasses.replace(OPTIONS, scale=scale, latent_dtype="float32")
        encode_dataset(images, tmp_path / str(scale), vae, options)
    plain, scaled = (LatentDataset(tmp_path / str(each)) for each in (False, True))
    for dataset in (plain, scaled):
        model = dataset.manifest["model"]
        assert (model["scaling_factor"], model["shift_factor"]) == (0.25, shift)
    assert [d.manifest["options"]["scale"] for d in (plain, scaled)] == [False, True]
    expected = (plain[0]["mean"] - (shift or 0)) * 0.25
    torch.testing.assert_close(scaled[0]["mean"], expected)
    deviation = torch.exp(plain[0]["logvar"] / 2) * 0.25
    torch.testing.assert_close(torch.exp(scaled[0]["logvar"] / 2), deviation)


def test_scaling_that_isnt_known_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path
) -> None:
    vae = compile_vae(make_vae(scaling_factor=None))
    with pytest.raises(ValueError, match="scaling of the model's latents isn't known"):
        encode_dataset(images, tmp_path / "out", vae, dataclasses.replace(OPTIONS, scale=True))
    assert not (tmp_path / "out").exists()
    encode_dataset(images, tmp_path / "out", vae, OPTIONS)
    assert LatentDataset(tmp_path / "out").manifest["model"]["scaling_factor"] is None


def test_scaled_latents_of_flux_2_are_in_patches(images: Path, tmp_path: Path) -> None:
    vae: Any = RBLNAutoencoder.from_model(make_flux2(), rbln_target="cpu", rbln_dtype="float32")
    for scale in (False, True):
        options = dataclasses.replace(OPTIONS, scale=scale, latent_dtype="float32")
        encode_dataset(images, tmp_path / str(scale), vae, options)
    plain, scaled = (LatentDataset(tmp_path / str(each))[0] for each in (False, True))
    torch.testing.assert_close(scaled["mean"], vae.latent_scaling.scale(plain["mean"]))
    channels, height, width = plain["mean"].shape
    assert scaled["mean"].shape == (4 * channels, height // 2, width // 2)
    recorded = LatentDataset(tmp_path / "True").manifest["model"]
    assert recorded["patch_size"] == 2
    assert recorded["latents_mean"] == vae.bn.running_mean.tolist()


def test_sides_of_scaled_latents_of_flux_2_are_whole_patches(images: Path, tmp_path: Path) -> None:
    vae = RBLNAutoencoder.from_model(make_flux2(), rbln_target="cpu", rbln_dtype="float32")
    options = Options(sizes=((30, 32),))
    encode_dataset(images, tmp_path / "plain", vae, options)
    with pytest.raises(ValueError, match=r"28.*32"):
        encode_dataset(images, tmp_path / "scaled", vae, dataclasses.replace(options, scale=True))


def test_means_and_deviations_of_channels_are_applied_as_pipelines_do(
    images: Path, tmp_path: Path
) -> None:
    means, deviations = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = compile_vae(make_vae(latents_mean=means, latents_std=deviations, scaling_factor=0.5))
    options = dataclasses.replace(OPTIONS, latent_dtype="float32")
    encode_dataset(images, tmp_path / "plain", vae, options)
    encode_dataset(images, tmp_path / "scaled", vae, dataclasses.replace(options, scale=True))
    plain, scaled = (LatentDataset(tmp_path / name)[0]["mean"] for name in ("plain", "scaled"))
    mean, deviation = (torch.tensor(each).view(4, 1, 1) for each in (means, deviations))
    torch.testing.assert_close(scaled, (plain - mean) * 0.5 / deviation)


def test_the_manifest_names_model_version_options_and_checksums(whole: Path) -> None:
    from rbln_vae import __version__

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["library_version"] == __version__
    assert manifest["options"] == OPTIONS.to_dict()
    assert Options.from_dict(manifest["options"]) == OPTIONS
    assert len(manifest["model"]["sha256"]) == 64
    assert manifest["samples"] == COUNT == sum(s["samples"] for s in manifest["shards"])
    assert manifest["sizes"] and sum(manifest["sizes"].values()) == COUNT
    for shard in manifest["shards"]:
        assert digests(whole)[shard["file"]] == shard["sha256"]


def test_a_shard_is_read_by_safetensors_alone(whole: Path) -> None:
    """As docs/datasets.md says."""
    dataset = LatentDataset(whole)
    with safe_open(whole / "000001-0000.safetensors", "pt") as shard:
        height, width, row = shard.get_tensor("places")[2].tolist()
        mean = shard.get_slice(f"mean.{height}x{width}")[row]
        start, end = shard.get_tensor("records.ends")[2:4].tolist()
        record = json.loads(bytes(shard.get_slice("records")[start:end].tolist()))
    assert record["key"] == dataset[8]["key"] and torch.equal(mean, dataset[8]["mean"])


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_other_formats_are_read_by_their_own_libraries(
    images: Path, tmp_path: Path, kind: Any
) -> None:
    options = dataclasses.replace(OPTIONS, flip=True)
    encode_dataset(images, tmp_path / "plain", default_compiled(), options)
    expected = LatentDataset(tmp_path / "plain")
    out = tmp_path / "out"
    encode_dataset(images, out, default_compiled(), dataclasses.replace(options, format=kind))
    read = _read_webdataset if kind == "webdataset" else _read_parquet
    number = -1
    for number, item in enumerate(read(out)):
        for name, value in expected[number].items():
            if isinstance(value, torch.Tensor):
                np.testing.assert_array_equal(item[name], value.numpy())
            else:
                assert item[name] == (list(value) if isinstance(value, tuple) else value)
    assert number == COUNT - 1


def _read_webdataset(out: Path) -> Iterator[dict[str, Any]]:
    import webdataset

    urls = sorted(map(str, out.glob("*.tar")))
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        record = json.loads(sample["json"])
        assert sample["__key__"] == member_name(record["key"])
        assert ("txt" in sample) == (record["caption"] is not None)
        arrays = {
            name.removesuffix(".npy"): np.load(io.BytesIO(content))
            for name, content in sample.items()
            if name.endswith(".npy")
        }
        yield {**record, **arrays}


def _read_parquet(out: Path) -> Iterator[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    files = sorted(map(str, out.glob("*.parquet")))
    found = datasets.Dataset.from_parquet(files, cache_dir=str(out / "cache"))
    for row in found.with_format("numpy"):
        item = dict(row)
        shape = item.pop("latent_shape")
        for name, value in item.items():
            if name.startswith(("mean", "logvar")):
                item[name] = value.astype(np.float16).reshape(shape)
            elif isinstance(value, np.ndarray):
                item[name] = value.tolist()
        item["columns"] = json.loads(str(item["columns"]))
        yield item


def test_the_same_call_again_does_nothing_and_says_the_same(images: Path, whole: Path) -> None:
    before = digests(whole)
    times = {path: path.stat().st_mtime_ns for path in whole.glob("*.safetensors")}
    summary = encode_dataset(images, whole, default_compiled(), OPTIONS)
    assert (summary.samples, summary.encoded) == (COUNT, 0)
    assert digests(whole) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize(
    "change", [{"workers": 1}, {"workers": 5}, {"threads": 1}, {"threads": 3}], ids=str
)
def test_bits_depend_on_no_number_of_workers_or_threads(
    images: Path, whole: Path, model: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    encode_dataset(images, tmp_path / "out", model, OPTIONS, **change)
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.slow
def test_a_model_is_found_in_a_pipeline(images: Path, whole: Path, tmp_path: Path) -> None:
    """By its subfolder or without; of diffusers or compiled."""
    for name, vae in (("original", default_vae()), ("compiled", default_compiled())):
        pipeline = tmp_path / name
        vae.save_pretrained(pipeline / "vae")
        for subfolder in ("vae", None):
            out = tmp_path / f"{name}-{subfolder}"
            model = {"subfolder": subfolder, "rbln_config": {"target": "cpu", "dtype": "float32"}}
            encode_dataset(images, out, pipeline, OPTIONS, **model)
            assert digests(out) == digests(whole)
            assert estimate(images, out, pipeline, OPTIONS, **model).done == COUNT
            index = {
                "_class_name": "StableDiffusionPipeline",
                "vae": ["diffusers", "AutoencoderKL"],
            }
            (pipeline / "model_index.json").write_text(json.dumps(index))


def test_a_model_on_the_hub_is_found_by_its_revision(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vaes = [default_vae(), make_vae(seed=1)]
    with serve_hub(tmp_path / "cache", monkeypatch) as hub:
        for branch, vae in zip(("main", "other"), vaes, strict=True):
            vae.save_pretrained(tmp_path / branch)
            hub.add("a/pipeline", tmp_path / branch, prefix="vae/", branch=branch)
            index = tmp_path / branch / "index" / "model_index.json"
            index.parent.mkdir()
            index.write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
            hub.add("a/pipeline", index.parent, branch=branch)
        for revision, vae in zip((None, "other"), vaes, strict=True):
            out = tmp_path / f"{revision}-out"
            options = Options(sizes=((32, 32),))
            encode_dataset(images, out, "a/pipeline", options, revision=revision)
            expected = vae_hash(vae)
            assert json.loads((out / "manifest.json").read_text())["model"]["sha256"] == expected


def vae_hash(vae: Any) -> str:
    compiled: Any = compile_vae(vae).compiled_models["encoder"]
    return str(compiled.source["sha256"])


@pytest.mark.parametrize("batch", [2, 5])
def test_bits_depend_on_no_batch_size(
    images: Path, whole: Path, tmp_path: Path, batch: int
) -> None:
    options = dataclasses.replace(OPTIONS, batch_size=batch)
    encode_dataset(images, tmp_path / "out", default_compiled(), options)
    assert digests(tmp_path / "out", ["0*.safetensors"]) == digests(whole, ["0*.safetensors"])


# What is rejected


@pytest.fixture
def spoiled(images: Path, tmp_path: Path) -> Path:
    import shutil

    root = shutil.copytree(images, tmp_path / "spoiled")
    (root / "0000.jpg").write_bytes(b"not a picture")
    (root / "zz.png").write_bytes(encoded(photograph(), "PNG")[:5000])
    return root


def test_what_is_rejected_is_listed_and_the_rest_is_there(spoiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TooManyRejectedError, match="more than max_rejected, 1") as raised:
        encode_dataset(spoiled, out, default_compiled(), OPTIONS, max_rejected=1)
    assert raised.value.summary.samples == COUNT - 1
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["0000.jpg", "zz.png"]
    assert "not a picture" in lines[0]["reason"] and "truncated" in lines[1]["reason"]
    # The same command accepts it, with nothing done anew.
    summary = encode_dataset(spoiled, out, default_compiled(), OPTIONS, max_rejected=2)
    assert (summary.encoded, summary.rejected) == (0, 2)
    assert len(LatentDataset(out)) == COUNT - 1


def test_a_latent_that_is_not_finite_is_rejected(images: Path, tmp_path: Path) -> None:
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e9)  # beyond what float16 holds
    out = tmp_path / "out"
    encode_dataset(images, out, compile_vae(vae), OPTIONS, max_rejected=COUNT)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rejected"] == COUNT and manifest["shards"] == []
    assert "finite" in (out / "rejected.jsonl").read_text()
    assert len(LatentDataset(out)) == 0


# What goes wrong


def test_other_options_on_the_same_output_are_refused(images: Path, whole: Path) -> None:
    before = digests(whole)
    for options, name in (
        (dataclasses.replace(OPTIONS, seed=1), "options.seed 0, not 1"),
        (dataclasses.replace(OPTIONS, shard_size=7), "options.shard_size 6, not 7"),
    ):
        with pytest.raises(RBLNDatasetError, match=name):
            encode_dataset(images, whole, default_compiled(), options)
    with pytest.raises(RBLNDatasetError, match=r"model\.sha256"):
        encode_dataset(images, whole, compile_vae(make_vae(seed=1)), OPTIONS)
    assert digests(whole) == before


def test_bits_of_one_version_of_the_arithmetic_are_not_mixed_with_those_of_another(
    images: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = get_target(default_compiled().resolved_config.target)
    ours = target.arithmetic
    assert json.loads((whole / "manifest.json").read_text())["model"]["arithmetic"] == ours
    monkeypatch.setattr(type(target), "arithmetic", ours + 1)
    before = digests(whole)
    wanted = rf"model\.arithmetic {ours}, not {ours + 1}\. .* use the one that started it"
    with pytest.raises(RBLNDatasetError, match=wanted):
        encode_dataset(images, whole, default_compiled(), OPTIONS)
    assert digests(whole) == before


def test_the_dtype_of_a_job_is_that_of_the_encoder(images: Path, tmp_path: Path) -> None:
    options = {"dtype": {"encoder": "float16", "decoder": "float32"}}
    model = compile_vae(default_vae(), **options)
    encode_dataset(images, tmp_path, model, OPTIONS)
    assert json.loads((tmp_path / "manifest.json").read_text())["model"]["dtype"] == "float16"
    before = digests(tmp_path)
    encode_dataset(images, tmp_path, compile_vae(default_vae(), dtype="float16"), OPTIONS)
    assert digests(tmp_path) == before
    with pytest.raises(RBLNDatasetError, match=r"model\.dtype"):
        encode_dataset(images, tmp_path, compile_vae(default_vae(), dtype="float32"), OPTIONS)


def test_a_source_that_has_changed_is_refused(images: Path, tmp_path: Path) -> None:
    import shutil

    root = shutil.copytree(images, tmp_path / "in")
    out = tmp_path / "out"
    encode_dataset(root, out, default_compiled(), OPTIONS)
    (root / "0001a.png").write_bytes(encoded(picture(3)))
    with pytest.raises(RBLNDatasetError, match="the source has changed"):
        encode_dataset(root, out, default_compiled(), OPTIONS)


def test_a_source_without_images_leaves_the_output_free_for_another(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RBLNDatasetError, match="no images"):
        encode_dataset(tmp_path / "empty", tmp_path / "out", default_compiled(), OPTIONS)
    assert encode_dataset(images, tmp_path / "out", default_compiled(), OPTIONS).samples > 0


def test_a_directory_with_other_files_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RBLNDatasetError, match=r"mine\.txt"):
        encode_dataset(images, tmp_path, default_compiled(), OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="lies in the source"):
        encode_dataset(images, images / "out", default_compiled(), OPTIONS)


@pytest.mark.parametrize("out", ["s3://bucket/out", "memory://out", "file:///out", Path("s3://b")])
def test_an_address_is_no_output(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (encode_dataset, estimate):
        with pytest.raises(ValueError, match=r"is an address, .* name a directory"):
            call(images, out, default_compiled(), OPTIONS)
    with pytest.raises(ValueError, match=r"is an address, .* name a directory"):
        LatentDataset(out)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_to_one_output(images: Path, whole: Path, model: Path) -> None:
    code = (
        "import fcntl, os, sys, time\n"
        f"handle = os.open({str(whole)!r}, os.O_RDONLY)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline()
        with pytest.raises(RBLNDatasetError, match="another process"):
            encode_dataset(images, whole, default_compiled(), OPTIONS)
        other.stdin.close()


def test_a_model_that_does_not_fit_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decoder only"):
        encode_dataset(
            images, tmp_path / "out", compile_vae(default_vae(), uses_encoder=False), OPTIONS
        )
    with pytest.raises(ValueError, match="multiples of 2"):
        encode_dataset(images, tmp_path / "out", default_compiled(), Options(sizes=((33, 33),)))
    with pytest.raises(ValueError, match="3 channels"):
        encode_dataset(images, tmp_path / "out", compile_vae(make_vae(in_channels=1)), OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dtype": "bfloat16", "format": "parquet"}, "can't hold bfloat16"),
        ({"latent_dtype": "int8"}, "expected one of float16"),
        ({"crop": "left"}, "expected one of center"),
        ({"shard_size": 0}, "at least 1"),
        ({"max_pixels": 10**12}, "at most"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from rbln_vae.datasets import Options, encode_dataset
from rbln_vae.errors import RBLNDatasetError
source, out, model, limit = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
options = Options(sizes=((32, 32),), aspect=True, bucket_step=8, shard_size=6, crop="random")
try:
    encode_dataset(source, out, model, options)
except RBLNDatasetError as error:
    assert "can't be written" in str(error) and "same command again" in str(error)
    print("stopped")
"""


@pytest.mark.slow
def test_a_disk_without_room_stops_it_cleanly(
    images: Path, whole: Path, model: Path, tmp_path: Path
) -> None:
    """A limit on the size of files fails as a full disk does."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", LIMITED, str(images), str(out), str(model), "20000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "stopped", done.stderr[-2000:]
    assert not list(out.glob("*.safetensors")) and not list(out.rglob(".*"))
    encode_dataset(images, out, default_compiled(), OPTIONS)
    assert digests(out) == digests(whole)


def test_a_disk_that_is_full_later_keeps_what_was_done(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    out = tmp_path / "out"
    write, written = SafetensorsShard.write, []

    def failing(path: Path, samples: Any) -> None:
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsShard, "write", failing)
        with pytest.raises(RBLNDatasetError, match="the disk is full"):
            encode_dataset(images, out, default_compiled(), OPTIONS)
    assert len(list(out.glob("*.safetensors"))) == 2 and not list(out.rglob(".*"))
    assert (out / "rejected.jsonl").read_text() == ""
    summary = encode_dataset(images, out, default_compiled(), OPTIONS)
    assert 0 < summary.encoded == COUNT - 12
    assert digests(out) == digests(whole)


@dataclasses.dataclass(frozen=True)
class Failing(Source):
    """A source that can't be read from some sample on."""

    after: int

    def splits(self, size: int) -> Iterator[Split]:
        return iter([FailingSplit(self.after)])

    def count(self) -> int:
        return 100

    def describe(self) -> dict[str, Any]:
        return {"kind": "failing"}


@dataclasses.dataclass(frozen=True)
class FailingSplit(Split):
    after: int

    def fingerprint(self) -> str:
        return "always"

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for number in range(start, 15):
            if number == self.after:
                raise ConnectionError("the network is gone")
            yield Sample(f"{number}", encoded(picture(number)))


def test_a_source_that_fails_stops_it_and_it_goes_on(tmp_path: Path) -> None:
    run = [tmp_path / "out", default_compiled(), OPTIONS]
    with pytest.raises(ConnectionError):
        encode_dataset(Failing(13), *run)
    assert len(list((tmp_path / "out" / "journal").iterdir())) == 2
    assert encode_dataset(Failing(100), *run).encoded == 3
    encode_dataset(Failing(100), tmp_path / "whole", *run[1:])
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_shard_that_was_removed_is_made_again(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_dataset(images, out, default_compiled(), OPTIONS)
    before = digests(out)
    (out / "000001-0000.safetensors").unlink()
    (out / "000002-0000.safetensors").write_bytes(b"half")
    encode_dataset(images, out, default_compiled(), OPTIONS)
    assert digests(out) == before


ENDLESS = """
import sys, threading
from rbln_vae.cli import main
from rbln_vae.datasets.job import Job
finish, parts = Job.finish, int(sys.argv.pop(1))
def all_but_one(self, *arguments, **options):
    if sum(1 for _ in self.entries()) == parts - 1:
        threading.Event().wait()
    return finish(self, *arguments, **options)
Job.finish = all_but_one
main()
"""
"""A command whose job never writes the last of so many parts, so that it can't end first."""


def kill_at_random(
    command: list[str], out: Path, times: int, parts: int, rng: random.Random
) -> None:
    """Begin a job so many times and kill each while it is at work."""
    for number in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(parts), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = rng.uniform(number, number + 1) * parts / (times + 1)
        journal = out / "journal"
        while process.poll() is None and not (
            journal.exists() and len(list(journal.iterdir())) >= until
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # What is visible is whole.
        for entry in journal.glob("[0-9]*.json") if journal.exists() else ():
            shard = json.loads(entry.read_text())["shard"]
            assert digests(out, [shard["file"]]) == {shard["file"]: shard["sha256"]}


@pytest.mark.parametrize(
    ("count", "times"), [(200, 1), pytest.param(2000, 20, marks=pytest.mark.slow)]
)
def test_a_job_that_is_killed_at_any_moment_gives_the_same(
    model: Path, tmp_path: Path, count: int, times: int
) -> None:
    images = make_folder(tmp_path / "in", count)
    options = ["--model", str(model), "--size", "32", "--shard-size", "10", "--crop", "random"]
    job = Options(sizes=((32, 32),), shard_size=10, crop="random")
    encode_dataset(str(images), tmp_path / "whole", model, job)
    out = tmp_path / "out"
    parts = -(-count // 10)
    command = ["encode-dataset", str(images), str(out), *options]
    kill_at_random(command, out, times, parts, random.Random(0))
    assert not (out / "manifest.json").exists()
    encode_dataset(str(images), out, model, job)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", [".000000.safetensors.abcd1234.tmp", ".tmpAb3dEf"])
def test_what_a_killed_process_leaves_is_removed(images: Path, tmp_path: Path, name: str) -> None:
    """The second is what safetensors writes before it renames it."""
    encode_dataset(images, tmp_path / "out", default_compiled(), OPTIONS)
    expected = digests(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / name).touch()
    encode_dataset(images, tmp_path / "out", default_compiled(), OPTIONS)
    assert digests(tmp_path / "out") == expected


# What is seen


def test_progress_is_told(images: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    def report(progress: Progress) -> None:
        seen.append((progress.done, progress.total))
        assert 0 <= progress.waiting_share <= 1 and progress.rate >= 0

    summary = encode_dataset(images, tmp_path / "o", default_compiled(), OPTIONS, report=report)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (COUNT, COUNT)
    assert summary.encoded == COUNT and summary.rate > 0


def test_an_estimate_writes_nothing_and_counts_what_is_done(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    found = estimate(images, tmp_path / "out", default_compiled(), OPTIONS)
    assert not (tmp_path / "out").exists()
    assert (found.total, found.done) == (COUNT, 0)
    assert sum(found.sizes.values()) == 16 and not found.rejected
    seconds = found.seconds(2)
    assert seconds is not None and 0 < seconds < math.inf
    assert estimate(images, whole, default_compiled(), OPTIONS).seconds(1) == 0
    with pytest.raises(RBLNDatasetError, match=r"options\.seed"):
        estimate(images, whole, default_compiled(), dataclasses.replace(OPTIONS, seed=5))
