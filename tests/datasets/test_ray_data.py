"""The same data set from Ray, on a real local cluster."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_vaes
from clips import wan
from pictures import digests, make_folder
from test_encode_videos import LENGTHS, fill
from test_encode_videos import OPTIONS as OPTIONS_OF_VIDEOS
from vaes import compile_vae, default_compiled

from rbln_vae.datasets import Options, encode_dataset
from rbln_vae.errors import RBLNDatasetError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rbln-vae[ray]'")
pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'rbln-vae[ray]'")

pytestmark = pytest.mark.slow

OPTIONS = Options(sizes=((64, 64),), aspect=True, bucket_step=16, shard_size=8, crop="random")
COUNT = 200
CPUS = 3
"""Of the cluster, whatever this machine has."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "in", COUNT)


@pytest.fixture(scope="module")
def local(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    encode_dataset(images, out, model, OPTIONS)
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def workers() -> list[int]:
    """The processes of Ray's actors."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            title = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker(MapBatches(Worker))"):
            found.append(int(directory.name))
    return found


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_workers_gives_the_same(
    images: Path, local: Path, model: Path, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "out"
    summary = encode_dataset(images, out, model, OPTIONS, ray="auto", workers=count)
    assert digests(out) == digests(local)
    assert summary.samples == summary.encoded == COUNT
    again = encode_dataset(images, out, model, OPTIONS, ray="auto", workers=count)
    assert again.encoded == 0 and digests(out) == digests(local)


@pytest.mark.usefixtures("cluster")
def test_videos_give_the_same(tmp_path: Path) -> None:
    source, model = fill(tmp_path / "videos"), tmp_path / "model"
    wan().save_pretrained(model)
    encode_dataset(source, tmp_path / "local", model, OPTIONS_OF_VIDEOS)
    out = tmp_path / "out"
    summary = encode_dataset(source, out, model, OPTIONS_OF_VIDEOS, ray="auto", workers=2)
    assert summary.samples == summary.encoded == len(LENGTHS)
    assert digests(out) == digests(tmp_path / "local")


@pytest.mark.usefixtures("cluster")
def test_the_default_is_as_many_workers_as_the_cluster_has_room_for(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the size of the pool: a short job may end before the last of its processes begins.
    sizes = set()

    def recorded(*, size: int, **options: Any) -> Any:
        sizes.add(size)
        return ray.data.ActorPoolStrategy(size=size, **options)

    monkeypatch.setattr("rbln_vae.datasets.ray.ActorPoolStrategy", recorded)
    encode_dataset(images, tmp_path / "out", model, OPTIONS, ray="auto")
    assert sizes == {CPUS}


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_costs_nothing(
    images: Path, local: Path, model: Path, tmp_path: Path
) -> None:
    out, killed = tmp_path / "out", []

    def kill() -> None:
        journal = out / "journal"
        while not killed:
            if journal.exists() and len(list(journal.iterdir())) >= 5 and (found := workers()):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.002)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    encode_dataset(images, out, model, OPTIONS, ray="auto", workers=2)
    thread.join(1)
    assert killed
    assert digests(out) == digests(local)


@pytest.mark.parametrize("at", [0.2, 0.7])
def test_a_driver_that_is_killed_goes_on_by_the_same_command(
    images: Path, local: Path, model: Path, tmp_path: Path, at: float
) -> None:
    """With the cluster that it began, and with workers of it still at work for a while."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rbln_vae", "encode-dataset", str(images), str(out)]
    command += ["--model", str(model), "--size", "64", "--aspect", "--bucket-step", "16"]
    command += ["--shard-size", "8", "--crop", "random", "--ray", "local", "--workers", "2"]
    parts = -(-COUNT // 8)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        journal = out / "journal"
        while driver.poll() is None and not (
            journal.exists() and len(list(journal.iterdir())) >= at * parts
        ):
            time.sleep(0.002)
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, timeout=300)
    assert digests(out) == digests(local)
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert "encoded in this run" in again.stdout and digests(out) == digests(local)


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_raises_is_raised_here(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_dataset(images, out, model, OPTIONS)
    blocked = out / "journal"
    for entry in sorted(blocked.iterdir())[2:]:
        entry.unlink()
    for shard in sorted(out.glob("*.safetensors"))[2:]:
        shard.unlink()
        shard.mkdir()  # nothing can take its place
    with pytest.raises(RBLNDatasetError, match="can't be written"):
        encode_dataset(images, out, model, OPTIONS, ray="auto", workers=1)


@pytest.mark.usefixtures("cluster")
def test_the_cache_of_a_trainer_is_the_same(images: Path, tmp_path: Path) -> None:
    vae = tiny_vaes.make("AutoencoderKL", 0, scaling_factor=0.13025)
    compile_vae(vae).save_pretrained(tmp_path / "model")
    options = Options(
        sizes=((64, 64),), format="sd-scripts", architecture="sdxl", flip=True, alpha_mask=True
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    encode_dataset(images, whole, tmp_path / "model", options)
    summary = encode_dataset(images, out, tmp_path / "model", options, ray="auto", workers=2)
    assert summary.samples == summary.encoded == len(list(out.rglob("*_sdxl.npz"))) == COUNT
    assert digests(out) == digests(whole)
    removed = next(iter(out.rglob("*_sdxl.npz")))
    removed.unlink()
    again = encode_dataset(images, out, tmp_path / "model", options, ray="auto", workers=2)
    assert 0 < again.encoded < COUNT and digests(out) == digests(whole)


def test_a_model_in_memory_is_refused(images: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS)
    with pytest.raises(ValueError, match="a directory or an id"):
        encode_dataset(images, tmp_path / "out", default_compiled(), options, ray="local")
