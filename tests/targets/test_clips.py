"""Convolutions and norms over the frames of a clip, on every target."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graphs import evaluate, small_graph
from vaes import TOLERANCE, noise

from rbln_vae import _engine
from rbln_vae.graph.ir import Conv2d, Graph, GroupNorm, Modulate, Norm
from rbln_vae.graph.stored import restore, store
from rbln_vae.metrics import relative_l2
from rbln_vae.schedule.search import Search
from rbln_vae.targets.base import RuntimeOptions
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.torch.runtime import TorchRuntime

C = 40
"""Channels of a frame, which don't fill a block."""
NORM = Norm(4, 1e-5, "scale", "shift", over_clip=True)
OWN = dataclasses.replace(NORM, over_clip=False)
ONES = (1, 1, 1, 1)


def block(tall: int = 1, channels: int = C, norm: Norm = NORM) -> Graph:
    """A ResNet block over frames between two over pixels, and what no convolution can take in."""
    over_time: dict[str, Any] = {
        "norm": norm,
        "activation": "silu",
        "over_clip": True,
        "padding": (tall // 2,) * 4,
    }
    return small_graph(
        Conv2d("into", "x", "first", None, padding=ONES),
        Conv2d("conv1", "into", "over_time", "bias", **over_time),
        Conv2d("conv2", "conv1", "over_time", "bias", residual="into", **over_time),
        GroupNorm("normed", "conv2", NORM),
        Modulate("modulated", "normed", "conv2", "into", NORM),
        Conv2d("mixed", "modulated", "after", "bias", padding=ONES, norm=OWN),
        Conv2d("small", "mixed", "down", None, stride=2, over_clip=True),
        channels=3,
        first=(channels, 3, 3, 3),
        over_time=(channels, 3 * channels, tall, tall),
        after=(channels, channels, 3, 3),
        down=(3, 3 * channels, 1, 1),
        scale=(channels,),
        shift=(channels,),
        bias=(channels,),
    ).verify()


def chain() -> Graph:
    """Convolutions between small images, whose values can be computed again in strips."""
    over_time: dict[str, Any] = {"norm": NORM, "activation": "silu", "over_clip": True}
    return small_graph(
        Conv2d("wide", "x", "first", None, padding=ONES, upsample=True),
        Conv2d("conv1", "wide", "over_time", "bias", **over_time),
        Conv2d("conv2", "conv1", "over_time", None, **over_time),
        Conv2d("conv3", "conv2", "last", None, padding=ONES, norm=OWN, activation="silu"),
        Conv2d("small", "conv3", "down", None, over_clip=True),
        channels=3,
        first=(16, 3, 3, 3),
        over_time=(16, 48, 1, 1),
        last=(3, 16, 3, 3),
        down=(3, 9, 1, 1),
        scale=(16,),
        shift=(16,),
        bias=(16,),
    ).verify()


def on_torch(graph: Graph, dtype: str = "float32", **options: Any) -> TorchRuntime:
    return TorchRuntime(graph, getattr(torch, dtype), "cpu", RuntimeOptions(**options))


def on_cpu(graph: Graph, dtype: str = "float32", **options: Any) -> CpuRuntime:
    return CpuRuntime(graph, dtype=dtype, **options)


RUNTIMES: dict[str, Any] = {"cpu": on_cpu, "torch": on_torch}
by_target = pytest.mark.parametrize("target", RUNTIMES)


@by_target
@pytest.mark.parametrize("frames", [1, 2, 3, 7])
@pytest.mark.parametrize("tall", [1, 3])
@pytest.mark.parametrize("norm", [NORM, OWN], ids=["over the clip", "of each frame"])
def test_clips_are_those_of_the_interpreter(
    target: str, frames: int, tall: int, norm: Norm
) -> None:
    graph, clip = block(tall, norm=norm), noise(frames, 3, 21, 18)
    assert relative_l2(RUNTIMES[target](graph).run(clip), evaluate(graph, clip)) < TOLERANCE


@pytest.mark.parametrize(
    "kernels", _engine.all_kernels(), ids=lambda each: f"{each.isa} {each.dtype}"
)
def test_every_instruction_set_runs_clips(
    kernels: _engine.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBLN_VAE_ISA", kernels.isa)
    graph, clip = block(), noise(3, 3, 20, 17)
    limit = {"float32": TOLERANCE, "float16": 0.01, "bfloat16": 0.03}[kernels.dtype]
    found = on_cpu(graph, kernels.dtype).run(clip)
    assert relative_l2(found, evaluate(graph, clip)) < limit


@by_target
def test_no_memory_limit_changes_a_bit_or_divides_a_clip(target: str) -> None:
    graph, shape = chain(), (5, 3, 150, 40)
    free = RUNTIMES[target](graph)
    clip = noise(*shape)
    expected = free.run(clip)
    search: Search[Any] = free.images.search(shape)
    sketches = search.tradeoffs()
    assert len(sketches) > 1 and all(each.input_shape == shape for each in sketches)
    for sketch in sketches[1:]:
        program = free.images.lowered(search.recomputing(sketch.recomputed), search)
        needed = program.bytes + free.images.result_bytes(shape)
        limited = RUNTIMES[target](graph, memory_limit=needed)
        assert limited.memory_needed(shape) <= needed < free.memory_needed(shape)
        assert torch.equal(limited.run(clip), expected)
    with pytest.raises(MemoryError, match="5x3x150x40"):
        RUNTIMES[target](graph, memory_limit=2**16).run(clip)


@by_target
def test_saving_memory_does_not_divide_a_clip(target: str) -> None:
    runtime, clip = RUNTIMES[target](chain()), noise(4, 3, 60, 40)
    expected = runtime.run(clip)
    for slicing, tiling in ((True, False), (False, True)):
        runtime.save_memory(slicing=slicing, tiling=tiling)
        assert torch.equal(runtime.run(clip), expected)


@by_target
def test_a_clip_beyond_float16_is_run_again_as_a_whole(target: str) -> None:
    graph, clip = block(), noise(4, 3, 12, 10)
    clip[2] *= 1e5
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        found = RUNTIMES[target](graph, "float16").run(clip)
    for frame, expected in zip(found, evaluate(graph, clip), strict=True):
        assert relative_l2(frame, expected) < 0.05


def test_only_a_graph_that_mixes_frames_runs_clips() -> None:
    assert block().runs_clips and block().least_shape((5, 3, 8, 8)) == (5, 3, 8, 8)
    alone = small_graph(Conv2d("y", "x", "w", None), w=(4, 4, 1, 1))
    assert not alone.runs_clips and alone.least_shape((5, 4, 8, 8)) == (1, 4, 8, 8)


@pytest.mark.parametrize("frames", [1, 4])
def test_a_clip_is_stored_and_rebuilt(frames: int) -> None:
    graph, clip = block(), noise(frames, 3, 8, 6)
    again = restore([store(graph)], graph.weights)
    assert again == dataclasses.replace(graph, weights=again.weights)
    assert torch.equal(evaluate(again, clip), evaluate(graph, clip))
