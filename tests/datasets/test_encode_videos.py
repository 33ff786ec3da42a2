"""Encoding videos: what is written and read again, what is rejected, and that nothing is lost."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import wan, write_variable
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pictures import digests
from PIL import Image
from test_encode import kill_at_random
from torch import Tensor
from torch.utils.data import DataLoader
from vaes import default_compiled

from rbln_vae.datasets import (
    BucketBatchSampler,
    LatentDataset,
    Options,
    TooManyRejectedError,
    collate,
    encode_dataset,
    estimate,
)
from rbln_vae.datasets.pictures import Clip
from rbln_vae.datasets.seeds import seed_of
from rbln_vae.models.latents import LatentScaling
from rbln_vae.videos import read_video, write_video

SIZE = (32, 48)
OPTIONS = Options(sizes=(SIZE,), frames=9, latent_dtype="float32", shard_size=2)
LENGTHS = {"a/long.mp4": 12, "b.mkv": 7, "c.mov": 9, "d.webm": 1, "e.mp4": 5}
"""The frames of the videos: 9, 5, 9, 1 and 5 of them are encoded."""
ENCODED = {"a/long.mp4": 9, "b.mkv": 5, "c.mov": 9, "d.webm": 1, "e.mp4": 5}


def clip(frames: int, seed: int = 0) -> list[Tensor]:
    """Pictures of 40 rows and 60 columns that change from frame to frame."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (8, 12, 3), np.uint8)
    image = Image.fromarray(small).resize((60, 40), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return [pixels.roll(2 * number, 1) for number in range(frames)]


def write(path: Path, frames: list[Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webm":
        with path.open("wb") as file, av.open(file, "w", format="webm") as container:
            stream = container.add_stream("libvpx-vp9", rate=16)
            stream.height, stream.width, stream.pix_fmt = 40, 60, "yuv420p"
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        write_video(path, frames, fps=16)


def fill(root: Path) -> Path:
    for seed, (name, frames) in enumerate(LENGTHS.items()):
        write(root / name, clip(frames, seed))
    (root / "a" / "long.txt").write_text("a gradient")
    (root / "b.json").write_text('{"rating": 5}')
    Image.new("RGB", (64, 64)).save(root / "picture.png")
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("videos") / "in")


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    encode_dataset(videos, out, wan(), OPTIONS)
    return out


def moments_of(path: Path, frames: int, *, flip: bool = False) -> Tensor:
    """What the model gives for the first frames of a video, scaled as the records say."""
    pictures = []
    for frame in list(read_video(path))[:frames]:
        image = Image.fromarray(frame.numpy()).resize((48, 32), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image))
        pictures.append(pixels.flip(1) if flip else pixels)
    return wan().encode(torch.stack(pictures)[None]).latent_dist.parameters[0]


def test_each_video_becomes_the_moments_of_its_frames(videos: Path, whole: Path) -> None:
    latents = LatentDataset(whole)
    assert [item["key"] for item in map(latents.__getitem__, range(5))] == [
        *("b.mkv", "c.mov", "d.webm", "e.mp4", "a/long.mp4")
    ]
    for item in map(latents.__getitem__, range(5)):
        count = ENCODED[item["key"]]
        expected = DiagonalGaussianDistribution(moments_of(videos / item["key"], count)[None])
        assert torch.equal(item["mean"], expected.mean[0])
        assert torch.equal(item["logvar"], expected.logvar[0])
        assert item["mean"].shape == (16, 1 + (count - 1) // 4, 4, 6)
        assert (item["frames"], item["fps"]) == (count, 16)
        assert item["original_size"] == (40, 60) and item["target_size"] == SIZE
    assert latents.get("a/long.mp4")["caption"] == "a gradient"
    assert latents.get("b.mkv")["columns"] == {"rating": 5}
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["options"]["frames"] == 9
    assert manifest["sizes"] == {"1x32x48": 1, "5x32x48": 2, "9x32x48": 2}
    assert not (whole / "rejected.jsonl").read_text()
    latents.verify()


def test_videos_of_one_length_make_batches(whole: Path) -> None:
    latents = LatentDataset(whole)
    assert latents.sizes.tolist() == [
        [ENCODED[latents[number]["key"]], *SIZE] for number in range(5)
    ]
    loader = DataLoader(latents, batch_sampler=BucketBatchSampler(latents, 2), collate_fn=collate)
    seen = [(tuple(batch["mean"].shape), batch["frames"]) for batch in loader]
    assert sorted(shape[:3] for shape, _ in seen) == [(1, 16, 1), (2, 16, 2), (2, 16, 3)]
    assert all(len(set(frames)) == 1 for _, frames in seen)


def test_a_video_is_read_no_further_than_it_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read, runs = wan(), [], []
    write(tmp_path / "in" / "long.mp4", clip(33))
    frames, encode_frames = Clip.frames, model.encode_frames

    def counted(video: Clip) -> Iterator[Any]:
        for frame in frames(video):
            read.append(frame.shape)
            yield frame

    def encoded(pictures: Iterator[Tensor]) -> Iterator[Tensor]:
        for moments in encode_frames(pictures):
            runs.append(len(read))
            yield moments

    monkeypatch.setattr(Clip, "frames", counted)
    monkeypatch.setattr(model, "encode_frames", encoded)
    encode_dataset(tmp_path / "in", tmp_path / "out", model, replace(OPTIONS, frames=33))
    assert runs == [1, 5, 9, 13, 17, 21, 25, 29, 33]


def test_shards_of_webdataset_hold_the_same(videos: Path, whole: Path, tmp_path: Path) -> None:
    options = Options(sizes=(SIZE,), frames=9, latent_dtype="float32", format="webdataset")
    encode_dataset(videos, tmp_path / "out", wan(), options)
    found, expected = LatentDataset(tmp_path / "out"), LatentDataset(whole)
    assert torch.equal(found.sizes, expected.sizes)
    for one, other in zip(map(found.__getitem__, range(5)), expected, strict=False):
        assert torch.equal(one.pop("mean"), other.pop("mean"))
        assert torch.equal(one.pop("logvar"), other.pop("logvar"))
        assert one == other


def test_videos_are_read_from_tar_files(videos: Path, whole: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for name in ("b.mkv", "b.json", "e.mp4"):
            tar.add(videos / name, name)
        tar.add(videos / "picture.png", "f.png")
    with pytest.raises(TooManyRejectedError):
        encode_dataset(tmp_path / "clips.tar", tmp_path / "out", wan(), OPTIONS)
    found, expected = LatentDataset(tmp_path / "out"), LatentDataset(whole)
    for key in ("b.mkv", "e.mp4"):
        item = found.get(f"clips/{key.partition('.')[0]}")
        assert torch.equal(item["mean"], expected.get(key)["mean"])
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected) == {
        "key": "clips/f",
        "reason": "there is no video in it, only png",
    }


def test_a_latent_is_drawn_once_for_all_frames_and_mirrored_and_scaled(
    videos: Path, tmp_path: Path
) -> None:
    options = Options(
        sizes=(SIZE,), frames=9, latent_dtype="float32", sample=True, flip=True, scale=True
    )
    encode_dataset(videos, tmp_path / "out", wan(), options)
    item = LatentDataset(tmp_path / "out").get("c.mov")
    scaling = LatentScaling.of(wan().config)
    for suffix, flip in (("", False), ("_flipped", True)):
        moments = moments_of(videos / "c.mov", 9, flip=flip)
        posterior = DiagonalGaussianDistribution(moments[None])
        seed = seed_of(0, "sample" + suffix, "c.mov")
        noise = torch.randn(moments[:16].shape, generator=torch.Generator().manual_seed(seed))
        drawn = posterior.mean[0] + torch.exp(0.5 * posterior.logvar[0]) * noise
        expected = scaling.scale(drawn.transpose(0, 1)).transpose(0, 1)
        assert torch.equal(item[f"latent{suffix}"], expected)


def test_videos_get_buckets_and_crops_as_images_do(tmp_path: Path) -> None:
    write(tmp_path / "in" / "wide.mp4", clip(5))
    write(tmp_path / "in" / "high.mp4", [frame.transpose(0, 1) for frame in clip(5)])
    options = Options(
        sizes=((64, 64),), aspect=True, bucket_step=16, frames=5, crop="random", seed=3
    )
    encode_dataset(tmp_path / "in", tmp_path / "out", wan(), options)
    latents = LatentDataset(tmp_path / "out")
    wide, high = latents.get("wide.mp4"), latents.get("high.mp4")
    assert (wide["target_size"], high["target_size"]) == ((48, 80), (80, 48))
    assert wide["mean"].shape == (16, 2, 6, 10) and high["mean"].dtype == torch.float16


def broken(root: Path) -> dict[str, str]:
    """Videos that can't be encoded, and parts of the reasons."""
    write(root / "good.mp4", clip(5))
    (root / "text.mp4").write_text("no video")
    write(root / "cut.mkv", clip(60))
    with (root / "cut.mkv").open("r+b") as file:
        file.truncate(700)
    write_variable(root / "variable.mkv", clip(5))
    write_video(root / "tiny.mp4", [frame[:16, :16] for frame in clip(5)])
    return {
        "cut.mkv": "",
        "text.mp4": "can't be read as a video",
        "tiny.mp4": "min_side",
        "variable.mkv": "variable frame rate",
    }


@pytest.mark.parametrize(
    ("error", "rejects"),
    [(OSError(5, "Input/output error"), False), (FileNotFoundError(2, "No such file"), True)],
)
def test_a_file_that_is_gone_is_rejected_and_a_disk_that_fails_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, rejects: bool
) -> None:
    def failing(_: Clip) -> Iterator[Any]:
        raise error

    write(tmp_path / "in" / "clip.mp4", clip(5))
    monkeypatch.setattr(Clip, "frames", failing)
    with pytest.raises(TooManyRejectedError if rejects else OSError):
        encode_dataset(tmp_path / "in", tmp_path / "out", wan(), OPTIONS)
    rejected = tmp_path / "out" / "rejected.jsonl"
    assert rejected.exists() == rejects  # a job of which nothing is done leaves no record
    assert not rejects or "it can't be read: No such file" in rejected.read_text()


def test_what_cant_be_encoded_is_rejected_with_its_reason(tmp_path: Path) -> None:
    reasons = broken(tmp_path / "in")
    with pytest.raises(TooManyRejectedError) as error:
        encode_dataset(tmp_path / "in", tmp_path / "out", wan(), OPTIONS)
    assert (error.value.summary.samples, error.value.summary.rejected) == (1, 4)
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    found = {each["key"]: each["reason"] for each in map(json.loads, lines)}
    assert found.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert found[key] and reason in found[key]
    assert LatentDataset(tmp_path / "out")[0]["key"] == "good.mp4"


@pytest.mark.slow
def test_a_job_that_is_killed_gives_the_same(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path / "wan")
    for number in range(24):
        write(tmp_path / "in" / f"{number:02d}.mp4", clip(5, number))
    options = ["--model", str(tmp_path / "wan"), "--size", "32x48", "--frames", "5"]
    job = Options(sizes=(SIZE,), frames=5, shard_size=2)
    source = str(tmp_path / "in")
    encode_dataset(source, tmp_path / "whole", tmp_path / "wan", job)
    out = tmp_path / "out"
    command = ["encode-dataset", source, str(out), *options, "--shard-size", "2"]
    kill_at_random(command, out, 1, 12, random.Random(0))
    assert not (out / "manifest.json").exists()
    encode_dataset(source, out, tmp_path / "wan", job)
    assert digests(out) == digests(tmp_path / "whole")


def test_an_estimate_of_videos_writes_nothing(videos: Path, whole: Path, tmp_path: Path) -> None:
    found = estimate(videos, tmp_path / "out", wan(), OPTIONS)
    assert not (tmp_path / "out").exists()
    assert (found.total, found.done, found.sizes) == (5, 0, {"32x48": 5})
    seconds = found.seconds(1)
    assert seconds is not None and seconds > 0
    assert estimate(videos, whole, wan(), OPTIONS).seconds(1) == 0


def test_without_frames_only_images_are_encoded(videos: Path, tmp_path: Path) -> None:
    encode_dataset(videos, tmp_path / "out", default_compiled(), Options(sizes=((32, 32),)))
    assert [item["key"] for item in LatentDataset(tmp_path / "out")] == ["picture.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 8}, r"frames is 8, expected 1 \+ 4 n, such as 5 or 9"),
        ({"frames": 0}, "frames is 0, expected at least 1"),
        ({"frames": 9, "format": "parquet"}, "parquet files hold latents of images"),
        (
            {"frames": 9, "format": "musubi", "architecture": "z-image"},
            "frames has no place in format 'musubi'",
        ),
    ],
)
def test_options_that_dont_fit_videos_are_refused(
    videos: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_dataset(videos, tmp_path / "out", wan(), Options(sizes=(SIZE,), **options))


@pytest.mark.parametrize("name", ["images", "one frame"])
def test_models_of_images_are_refused(videos: Path, tmp_path: Path, name: str) -> None:
    model = default_compiled() if name == "images" else wan(num_frames=1)
    with pytest.raises(ValueError, match="compiled for images"):
        encode_dataset(videos, tmp_path / "out", model, OPTIONS)


def test_sources_of_tables_hold_no_videos(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="videos are read from folders and tar files"):
        encode_dataset(tmp_path / "x.parquet", tmp_path / "out", wan(), OPTIONS)
