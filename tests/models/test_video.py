"""Videos: the arithmetic against diffusers, and streams frame by frame."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vaes
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor
from vaes import TOLERANCE, noise

from rbln_vae import (
    RBLNAutoencoder,
    RBLNAutoencoderKLWan,
    RBLNCancelledError,
    RBLNCompileError,
    RBLNRuntimeError,
)
from rbln_vae.graph.ir import Conv2d, Stack
from rbln_vae.levels import levels_of
from rbln_vae.metrics import relative_l2
from rbln_vae.models.wan_frames import VideoPart
from rbln_vae.schedule import problem

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan 2.1": ("AutoencoderKLWan", {}),
    "Wan 2.2": ("AutoencoderKLWan", tiny_vaes.WAN_2_2),
    "Qwen-Image": ("AutoencoderKLQwenImage", {"num_res_blocks": 2}),
    "layered": ("AutoencoderKLQwenImage", {"input_channels": 4}),
    "time halved at the largest level": (
        "AutoencoderKLWan",
        {"temperal_downsample": [True, False, False], "decoder_base_dim": 8},
    ),
    "no time resampled": ("AutoencoderKLWan", {"temperal_downsample": [False, False, False]}),
    "blocks of channels": ("AutoencoderKLWan", {"base_dim": 32, "dim_mult": [1, 1, 2, 2]}),
}
by_model = pytest.mark.parametrize("name", MODELS)
by_target = pytest.mark.parametrize("target", ["cpu", "reference"])


@functools.cache
def original(name: str) -> Any:
    class_name, options = MODELS[name]
    vae = tiny_vaes.make(class_name, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in vae.parameters():
        if parameter.dim() == 1:  # biases, which diffusers begins near zero
            parameter.data.normal_(std=0.2, generator=generator)
    return vae


@functools.cache
def compiled(name: str, target: str = "cpu", **options: Any) -> RBLNAutoencoderKLWan:
    options = {"target": target, "dtype": "float32", "num_threads": 2, **options}
    vae = RBLNAutoencoder.from_model(original(name), rbln_config=options)
    assert isinstance(vae, RBLNAutoencoderKLWan)
    return vae


def channels(name: str) -> int:
    return compiled(name).resolved_config.in_channels


def video(name: str, frames: int, *, batch: int = 1, size: tuple[int, int] = (3, 2)) -> Tensor:
    ratio = compiled(name).resolved_config.vae_scale_factor
    height, width = (side * ratio for side in size)
    return noise(batch, channels(name), frames, height, width).clamp(-1, 1)


def latent(name: str, frames: int, *, batch: int = 1, size: tuple[int, int] = (3, 2)) -> Tensor:
    return noise(batch, compiled(name).z_dim, frames, *size, seed=3)


def same_frames(frames: Iterator[Tensor], expected: Tensor) -> None:
    for index, frame in enumerate(expected.unbind(2)):
        assert torch.equal(next(frames), frame), index
    assert next(frames, None) is None


# Against diffusers


@by_target
@by_model
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_latents_are_decoded_as_by_diffusers(name: str, target: str, frames: int) -> None:
    z = latent(name, frames, batch=2)
    with torch.no_grad():
        expected = original(name).decode(z).sample
    found = compiled(name, target).decode(z).sample
    assert found.shape == expected.shape
    for mine, theirs in zip(found.unbind(2), expected.unbind(2), strict=True):
        assert relative_l2(mine, theirs) < TOLERANCE


@by_target
@by_model
@pytest.mark.parametrize("frames", [5, 9, 13])
def test_videos_are_encoded_as_by_diffusers(name: str, target: str, frames: int) -> None:
    x = video(name, frames, batch=2)
    with torch.no_grad():
        expected = original(name).encode(x).latent_dist.parameters
    found = compiled(name, target).encode(x).latent_dist.parameters
    assert found.shape == expected.shape
    for mine, theirs in zip(found.unbind(2), expected.unbind(2), strict=True):
        assert relative_l2(mine, theirs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("size", [(5, 7), (16, 12)])
def test_errors_do_not_grow_over_a_long_video_in_bfloat16(size: tuple[int, int]) -> None:
    z = latent("Wan 2.1", 21, size=size)
    with torch.no_grad():
        expected = original("Wan 2.1").decode(z).sample.unbind(2)
    found = compiled("Wan 2.1", dtype="bfloat16").decode(z).sample.unbind(2)
    errors = [relative_l2(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
    assert max(errors) < 0.1 and sum(errors[-20:]) < 1.5 * sum(errors[1:21])


def test_the_frames_of_a_run_are_stacked() -> None:
    """On `cpu`, a convolution makes all frames that it is given at once."""
    found: dict[str, dict[int, set[int]]] = {}
    for part, size in (("decoder", (1, 1)), ("encoder", (8, 8))):
        graph = VideoPart(original("Wan 2.1"), part).graph()
        shapes = graph.infer_shapes((1, graph.input_channels, *size))
        found[part] = {}
        for conv in graph.operations:
            if isinstance(conv, Conv2d) and len(conv.earlier) == 2 and conv.padding == (1, 1, 1, 1):
                frames, _, height, _ = shapes[conv.input]
                found[part].setdefault(height, set()).add(frames)
    assert found["decoder"] == {1: {1}, 2: {2}, 4: {4}, 8: {4}}
    assert found["encoder"] == {8: {4}, 4: {4}, 2: {2}, 1: {1}}


def test_frames_that_are_one_value_are_not_stacked_again() -> None:
    """Wan 2.2 adds one copy of each frame where only the image is doubled."""
    graph = VideoPart(original("Wan 2.2"), "decoder").graph()
    stacked = [o.output for o in graph.operations if isinstance(o, Stack)]
    assert stacked and not any("up_blocks.2.avg_shortcut" in value for value in stacked)


def test_odd_sizes_are_encoded_as_by_diffusers() -> None:
    x = noise(1, 3, 5, 37, 43)
    with torch.no_grad():
        expected = original("Wan 2.1").encode(x).latent_dist.mode()
    assert relative_l2(compiled("Wan 2.1").encode(x).latent_dist.mode(), expected) < TOLERANCE


def test_frames_that_make_no_chunk_are_left_out_with_a_warning() -> None:
    x = video("Wan 2.1", 7)
    vae = compiled("Wan 2.1")
    with pytest.warns(RuntimeWarning, match="last 2 frames"):
        moments = vae.encode(x).latent_dist.parameters
    assert torch.equal(moments, vae.encode(x[:, :, :5]).latent_dist.parameters)
    with pytest.warns(RuntimeWarning, match="last 2 frames"):
        same_frames(vae.encode_frames(x), moments)


def test_a_model_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vaes.make("AutoencoderKLWan")
    before = WanResidualBlock.forward
    monkeypatch.setattr(
        WanResidualBlock, "forward", lambda *args, **options: before(*args, **options) * 1.01
    )
    with pytest.raises(RBLNCompileError, match=r"computes something else .*num_frames=1"):
        RBLNAutoencoder.from_model(vae, rbln_target="cpu")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_another_activation_is_refused_by_name(activation: str) -> None:
    vae = tiny_vaes.make("AutoencoderKLWan")
    block = vae.encoder.mid_block.resnets[0]
    block.nonlinearity = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU()}[activation]
    with pytest.raises(RBLNCompileError, match=r"encoder\.mid_block\.resnets\.0.*SiLU"):
        RBLNAutoencoder.from_model(vae, rbln_target="cpu")


def test_a_model_whose_encoder_can_not_run_is_compiled_without_it() -> None:
    """As Bria's Fibo: its encoder takes three channels where patches have twelve."""
    vae = tiny_vaes.make("AutoencoderKLWan", **tiny_vaes.WAN_2_2)
    vae.register_to_config(in_channels=3)
    conv = vae.encoder.conv_in
    conv.weight = torch.nn.Parameter(conv.weight[:, :3])
    with pytest.raises(RBLNCompileError, match=r"conv_in takes 3 channels.*uses_encoder=False"):
        RBLNAutoencoder.from_model(vae, rbln_target="cpu")
    settings = {"target": "cpu", "dtype": "float32", "uses_encoder": False}
    model = RBLNAutoencoder.from_model(vae, rbln_config=settings)
    assert isinstance(model, RBLNAutoencoderKLWan)
    z = noise(1, model.z_dim, 2, 3, 2)
    with torch.no_grad():
        expected = vae.decode(z).sample
    assert relative_l2(model.decode(z).sample, expected) < TOLERANCE


# Streams


@pytest.mark.slow
@by_target
@by_model
def test_a_stream_gives_the_bits_of_a_whole_call(name: str, target: str) -> None:
    vae, z, x = compiled(name, target), latent(name, 4, batch=2), video(name, 9, batch=2)
    decoded = vae.decode(z).sample
    same_frames(vae.decode_frames(z), decoded)
    same_frames(vae.decode_frames(iter(z.split([1, 2, 1], 2))), decoded)
    moments = vae.encode(x).latent_dist.parameters
    same_frames(vae.encode_frames(x), moments)
    same_frames(vae.encode_frames(frame for frame in x.unbind(2)), moments)


@by_target
@by_model
def test_each_video_of_a_batch_has_the_bits_of_a_run_of_its_own(name: str, target: str) -> None:
    vae, z = compiled(name, target), latent(name, 3, batch=2)
    assert torch.equal(vae.decode(z).sample[1:], vae.decode(z[1:]).sample)


@by_target
@by_model
def test_the_first_frame_is_that_of_an_image(name: str, target: str) -> None:
    vae, z, x = compiled(name, target), latent(name, 2), video(name, 5)
    assert torch.equal(vae.decode(z).sample[:, :, :1], vae.decode(z[:, :, :1]).sample)
    moments = vae.encode(x).latent_dist.parameters
    assert torch.equal(moments[:, :, :1], vae.encode(x[:, :, :1]).latent_dist.parameters)


@pytest.mark.slow
@by_target
@pytest.mark.parametrize(
    ("name", "whole"),
    [("Wan 2.1", True), ("Wan 2.2", True), ("no time resampled", True), ("Wan 2.1", False)],
)
def test_memory_limits_and_threads_change_no_bit(
    name: str, target: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, z = compiled(name, target), latent(name, 3, size=(8, 7))
    x = video(name, 9, size=(6, 5))
    expected, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    if not whole:
        monkeypatch.setattr(problem, "PASSING_BYTES", 0)
        vae = vae.with_runtimes()
    for part, shape in (("encoder", tuple(x.shape)), ("decoder", tuple(z.shape))):
        with pytest.raises(MemoryError) as refused:
            vae.with_runtimes(memory_limit=1).memory_needed(part, shape)
        least = int(str(refused.value).split("'")[1].removesuffix("MiB")) * 2**20
        assert least <= 2**20 + vae.memory_needed(part, shape)
    with pytest.raises(MemoryError, match="needs at least"):
        vae.with_runtimes(memory_limit=least - 2**20).decode_frames(z).__next__()
    needed = vae.memory_needed("decoder", tuple(z.shape))
    for options in ({"memory_limit": least}, {"memory_limit": needed}, {"num_threads": 1}):
        same_frames(vae.with_runtimes(**options).decode_frames(z), expected)
    assert torch.equal(vae.with_runtimes(num_threads=1).encode(x).latent_dist.parameters, moments)
    saving = vae.with_runtimes()
    saving.enable_tiling(tile_sample_min_height=16)
    saving.enable_slicing()
    assert torch.equal(saving.decode(z).sample, expected)


@pytest.mark.slow
@by_target
@by_model
def test_frames_that_pass_through_windows_have_the_same_bits(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many small steps: PyTorch's threads would mostly wait for each other.
    vae = compiled(name, target, num_threads=2 if target == "cpu" else 1)
    z, x = latent(name, 3, size=(13, 3)), video(name, 9, size=(9, 2))
    frames, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    whole = vae.memory_needed("decoder", tuple(z.shape))
    monkeypatch.setattr(problem, "PASSING_BYTES", 0)
    passing = vae.with_runtimes()
    same_frames(passing.decode_frames(z), frames)
    assert torch.equal(passing.encode(x).latent_dist.parameters, moments)
    needed = passing.memory_needed("decoder", tuple(z.shape))
    assert needed != whole  # of another schedule
    same_frames(vae.with_runtimes(memory_limit=needed).decode_frames(z), frames)


@by_target
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_large_frames_pass_through_windows_to_save_memory(
    part: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 3, 5, 480, 832) if part == "encoder" else (1, 16, 2, 60, 104)
    frame = 480 * 832 * 32 * 4
    vae = compiled("blocks of channels", target)
    whole = vae.memory_needed(part, shape)
    monkeypatch.setattr(problem, "PASSING_BYTES", 4 * frame)
    assert vae.with_runtimes().memory_needed(part, shape) < whole - frame


def test_streams_that_run_in_turn_or_at_once_do_not_touch_each_other() -> None:
    vae = compiled("Wan 2.1")
    latents = [latent("Wan 2.1", 3), latent("Wan 2.1", 3).neg(), latent("Wan 2.1", 3, size=(4, 4))]
    expected = [list(vae.decode_frames(z)) for z in latents]
    streams = [vae.decode_frames(z) for z in latents]
    left = vae.decode_frames(latents[0])
    next(left)
    found: list[list[Tensor]] = [[] for _ in latents]
    for _ in range(len(expected[0])):
        for frames, stream in zip(found, streams, strict=True):
            frames.append(next(stream))
    del left
    gc.collect()

    def run(index: int) -> None:
        found[index] += vae.decode_frames(latents[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for frames, wanted in zip(found, expected, strict=True):
        assert len(frames) == 2 * len(wanted)
        assert all(map(torch.equal, frames, wanted + wanted))


def test_a_frame_is_the_callers_for_good() -> None:
    vae, z = compiled("Wan 2.1"), latent("Wan 2.1", 2)
    expected = vae.decode(z).sample
    frames = []
    for frame in vae.decode_frames(z):
        frames.append(frame.clone())
        frame.fill_(9)
    assert torch.equal(torch.stack(frames, 2), expected)


@by_target
def test_frames_may_come_in_one_tensor(target: str) -> None:
    vae, x, z = compiled("Wan 2.1", target), video("Wan 2.1", 9), latent("Wan 2.1", 3)

    def in_turn(frames: Tensor) -> Iterator[Tensor]:
        buffer = torch.empty_like(frames[:, :, :1])
        for frame in frames.split(1, 2):
            yield buffer.copy_(frame)

    same_frames(
        vae.encode_frames(frame.squeeze(2) for frame in in_turn(x)),
        vae.encode(x).latent_dist.parameters,
    )
    same_frames(vae.decode_frames(in_turn(z)), vae.decode(z).sample)


def test_nothing_is_read_ahead() -> None:
    vae, z = compiled("Wan 2.1"), latent("Wan 2.1", 3)
    read = []

    def latents() -> Iterator[Tensor]:
        for index in range(3):
            read.append(index)
            yield z[:, :, index : index + 1]

    frames = vae.decode_frames(latents())
    assert read == []
    next(frames)
    assert read == [0]
    next(frames)
    assert read == [0, 1]
    frames.close()


def test_results_keep_the_dtype_of_what_is_given() -> None:
    vae, z = compiled("Wan 2.1"), latent("Wan 2.1", 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        whole = vae.decode(z.to(dtype)).sample
        assert whole.dtype == dtype
        assert all(frame.dtype == dtype for frame in vae.decode_frames(z.to(dtype)))
        assert relative_l2(whole.float(), vae.decode(z).sample) < 0.02


# Results


@by_target
def test_results_are_written_to_a_memory_map(tmp_path: Path, target: str) -> None:
    vae, z = compiled("Wan 2.1", target), latent("Wan 2.1", 3, batch=2)
    expected = vae.decode(z).sample
    out = np.lib.format.open_memmap(tmp_path / "video.npy", "w+", np.float32, tuple(expected.shape))
    assert torch.equal(vae.decode(z, out=out).sample, expected)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "video.npy")), expected)
    with pytest.raises(ValueError, match="out must have the shape"):
        vae.decode(z, out=torch.empty(2, 3, 8, 24, 16))


def test_flags_that_save_memory_change_no_bit() -> None:
    vae, z = compiled("Wan 2.1"), latent("Wan 2.1", 3, batch=2)
    expected = vae.decode(z).sample
    vae.enable_tiling()
    vae.enable_slicing()
    try:
        assert torch.equal(vae.decode(z).sample, expected)
        assert torch.equal(torch.stack(list(vae.decode_frames(z)), 2), expected)
    finally:
        vae.disable_tiling()
        vae.disable_slicing()


def test_progress_counts_frames() -> None:
    seen: list[tuple[int, int]] = []
    compiled("Wan 2.1").decode(
        latent("Wan 2.1", 2, batch=2), progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(n * 1000, 10_000) for n in (1, 5, 6, 10)]
    with pytest.raises(TypeError, match="progress must be a function"):
        compiled("Wan 2.1").decode(latent("Wan 2.1", 2), progress=1)  # type: ignore[arg-type]


@by_target
def test_pictures_of_videos_are_those_of_the_samples(target: str) -> None:
    vae, z = compiled("Wan 2.1", target), latent("Wan 2.1", 2, batch=2)
    expected = levels_of(vae.decode(z).sample).permute(0, 2, 3, 4, 1)
    assert torch.equal(vae.decode_images(z), expected)
    pictures = levels_of(video("Wan 2.1", 5)).permute(0, 2, 3, 4, 1)
    sample = pictures.permute(0, 4, 1, 2, 3) / 127.5 - 1
    moments = vae.encode(pictures).latent_dist.parameters
    assert relative_l2(moments, vae.encode(sample).latent_dist.parameters) < 1e-5
    same_frames(vae.encode_frames(pictures.unbind(1)), moments)


def test_a_saved_model_runs_videos(tmp_path: Path) -> None:
    for name in ("Wan 2.1", "Wan 2.2"):
        vae, z = compiled(name), latent(name, 2)
        vae.save_pretrained(tmp_path / name)
        again = RBLNAutoencoderKLWan.from_pretrained(tmp_path / name)
        assert torch.equal(again.decode(z).sample, vae.decode(z).sample)


# Bad input


def test_sizes_that_change_within_a_stream_are_refused() -> None:
    vae = compiled("Wan 2.1")
    frames = vae.decode_frames([latent("Wan 2.1", 1), latent("Wan 2.1", 1, size=(4, 4))])
    next(frames)
    with pytest.raises(ValueError, match="the size can't change within a video"):
        next(frames)
    assert next(frames, None) is None


def test_arguments_are_checked_by_the_call() -> None:
    vae = compiled("Wan 2.1")
    for wrong, error in (
        (latent("Wan 2.1", 2)[:, :3], ValueError),
        (latent("Wan 2.1", 2)[0], ValueError),
        (latent("Wan 2.1", 2).int(), TypeError),
        (7, TypeError),
    ):
        with pytest.raises(error):
            vae.decode_frames(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must have the shape"):
        vae.encode_frames(video("Wan 2.1", 5)[:, :2])
    with pytest.raises(TypeError):
        next(vae.decode_frames([1]))  # type: ignore[list-item]
    with pytest.raises(RBLNRuntimeError, match="decoder only"):
        compiled("Wan 2.1", uses_encoder=False).encode_frames(video("Wan 2.1", 5))
    assert list(vae.decode_frames([])) == []


def test_float16_runs_images_and_says_why_no_videos() -> None:
    vae = compiled("Wan 2.1", dtype="float16")
    vae.decode(latent("Wan 2.1", 1))
    with pytest.raises(ValueError, match="compiled for images"):
        vae.decode(latent("Wan 2.1", 2))


def test_a_stream_that_is_stopped_has_ended_and_the_model_goes_on() -> None:
    vae, z = compiled("Wan 2.1"), latent("Wan 2.1", 3)
    stops = [False]
    frames = vae.decode_frames(z, should_stop=lambda: stops[0])
    next(frames)
    stops[0] = True
    with pytest.raises(RBLNCancelledError):
        next(frames)
    assert next(frames, None) is None
    stream = vae._runtimes["decoder"].stream((1, 16, 3, 2))
    with pytest.raises(RBLNCancelledError):
        stream.run([z[:, :, 0]], should_stop=lambda: True)
    with pytest.raises(RBLNRuntimeError, match="has ended"):
        stream.run([z[:, :, 0]])
    vae.decode(z)


def test_a_stream_is_for_one_thread_at_a_time() -> None:
    vae, z = compiled("Wan 2.1"), latent("Wan 2.1", 2)
    stream = vae._runtimes["decoder"].stream((1, 16, 3, 2))
    raised: list[Exception] = []

    def meanwhile() -> bool:
        def use() -> None:
            try:
                stream.run([z[:, :, 0]])
            except RBLNRuntimeError as error:
                raised.append(error)

        if not raised:
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
        return False

    (frame,) = stream.run([z[:, :, 0]], should_stop=meanwhile)
    assert "Two threads" in str(raised[0])
    assert torch.equal(frame, vae._runtimes["decoder"].run(z[:, :, 0]))


def test_whole_videos_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled("Wan 2.1").encode(video("Wan 2.1", 9))
