"""Whole models on an NVIDIA GPU: videos, the service, data sets and pictures."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tiny_vaes
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from pictures import make_folder
from services import make_app, running
from vaes import compile_vae, default_vae, noise

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKLWan
from rbln_vae.datasets import LatentDataset, Options, encode_dataset
from rbln_vae.metrics import relative_l2
from rbln_vae.serving.models import ServedModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")

EXACT = 1e-5
"""The most error in float32."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_are_those_of_diffusers_whole_and_frame_by_frame(dtype: torch.dtype) -> None:
    vae = tiny_vaes.make("AutoencoderKLWan")
    model = RBLNAutoencoder.from_model(vae, rbln_config={"target": "cuda", "dtype": dtype})
    assert isinstance(model, RBLNAutoencoderKLWan)
    latents = [noise(1, model.z_dim, 4, 6, 5, seed=seed) for seed in range(2)]
    video = noise(1, 3, 9, 24, 16).clamp(-1, 1)
    with torch.no_grad():
        expected = [vae.decode(latent).sample for latent in latents]
        moments = vae.encode(video).latent_dist.parameters
        theirs = vae.to(dtype).decode(latents[0].to(dtype)).sample.float()
    error = EXACT
    if dtype != torch.float32:
        error = 1.5 * relative_l2(theirs, expected[0])
    for latent, frames in zip(latents, expected, strict=True):
        assert relative_l2(model.decode(latent.cuda()).sample.cpu(), frames) < error
    # Two streams in turn.
    found: list[list[torch.Tensor]] = [[], []]
    streams = [model.decode_frames(latent.cuda()) for latent in latents]
    for both in zip(*streams, strict=True):
        for frames_found, frame in zip(found, both, strict=True):
            assert frame.is_cuda
            frames_found.append(frame.cpu())
    for frames_found, frames in zip(found, expected, strict=True):
        assert relative_l2(torch.stack(frames_found, 2), frames) < error
    encoded = model.encode(video.cuda()).latent_dist.parameters
    assert relative_l2(encoded.cpu(), moments) < error


def test_memory_does_not_grow_with_the_frames_of_a_video() -> None:
    model = RBLNAutoencoder.from_model(
        tiny_vaes.make("AutoencoderKLWan"), rbln_config={"target": "cuda"}
    )
    assert isinstance(model, RBLNAutoencoderKLWan)
    peaks = []
    for frames in (4, 4, 12):
        latent = noise(1, model.z_dim, frames, 16, 16)
        torch.cuda.reset_peak_memory_stats()
        for _ in model.decode_frames(latent):
            pass
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.02 * peaks[1]


def test_a_service_answers_with_what_the_model_gives() -> None:
    vae = compile_vae(default_vae(), target="cuda", dtype="float32")
    latents = [noise(1, 4, 8, 6, seed=seed) for seed in range(4)]
    found: dict[int, torch.Tensor] = {}
    with running(make_app(ServedModel("tiny", vae), max_batch=2)) as server:

        def ask(number: int) -> None:
            tensor = remote_decode(
                f"{server}/decode",
                latents[number],
                do_scaling=False,
                output_type="pt",
                return_type="pt",
            )
            assert isinstance(tensor, torch.Tensor)
            found[number] = tensor

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(latents))]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        image = noise(1, 3, 16, 24).clamp(-1, 1)
        encoded = remote_encode(f"{server}/encode", image)
    for number, latent in enumerate(latents):
        assert relative_l2(found[number], vae.decode(latent).sample) < EXACT
    expected = vae.encode(image).latent_dist.mode()
    assert relative_l2(encoded, expected) < EXACT


def test_a_data_set_has_the_latents_of_the_cpu(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", 6)
    options = Options(sizes=((32, 32),), batch_size=4)
    moments = {}
    for target in ("cpu", "cuda"):
        vae = compile_vae(default_vae(), target=target, dtype="float32")
        encode_dataset(images, tmp_path / target, vae, options)
        latents = LatentDataset(tmp_path / target)
        moments[target] = {item["key"]: item["mean"] for item in map(latents.__getitem__, range(6))}
    assert moments["cpu"].keys() == moments["cuda"].keys()
    for key, mean in moments["cpu"].items():
        assert relative_l2(moments["cuda"][key], mean) < 1e-3  # they are stored in float16


def test_pictures_are_those_of_the_images() -> None:
    vae = compile_vae(default_vae(), target="cuda", dtype="float32")
    latent = noise(2, 4, 8, 6)
    images = vae.decode(latent).sample
    pictures = vae.decode_images(latent)
    exact = images.add(1).mul(127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert pictures.dtype == torch.uint8
    assert (pictures - exact).abs().max() < 0.51
