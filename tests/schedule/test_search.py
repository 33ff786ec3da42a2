"""Less memory for more work: the same bits from every plan, and limits that are kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import tiny_vaes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vaes import capture_part, make_vae, make_vq

from rbln_vae import RBLNAutoencoderKLWan, RBLNVQModel
from rbln_vae.graph.capture import capture
from rbln_vae.graph.ir import Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.schedule import scheduler
from rbln_vae.schedule.problem import Problem
from rbln_vae.schedule.schedule import Schedule
from rbln_vae.schedule.scheduler import droppable, make_schedule
from rbln_vae.targets.cpu import planner as cpu_planner
from rbln_vae.targets.cpu.lower import lower
from rbln_vae.targets.cpu.planner import TILING_TIME
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.units import format_bytes

ARCHITECTURES = {
    "narrow": {"block_out_channels": (8, 16)},
    "wide": {"block_out_channels": (64, 32), "norm_num_groups": 32},
    "deep": {"block_out_channels": (24, 40, 96), "norm_num_groups": 8, "layers_per_block": 2},
    "without attention": {"block_out_channels": (16, 48), "mid_block_add_attention": False},
}
SPATIAL = {
    "block_out_channels": (32, 64),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
"""A VQModel, whose decoder multiplies by images as small as the latent."""
FRAMES = {
    "pixel norms": {"base_dim": 16, "dim_mult": [1, 2, 2], "temperal_downsample": [True, False]},
    "cells": {
        **tiny_vaes.WAN_2_2,
        "base_dim": 16,
        "decoder_base_dim": 16,
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, False],
    },
}
"""Wan's decoders: norms without statistics of the image, and in the second shuffled pixels."""
PARTS = ("encoder", "decoder")
GRAPHS = [
    *itertools.product(ARCHITECTURES, PARTS),
    *itertools.product(["spatial norm", "pixel norms"], PARTS),
    ("cells", "decoder"),
]
DTYPES = ("float32", "float16", "bfloat16")


@functools.cache
def graph_of(architecture: str, part: str) -> Graph:
    if architecture == "spatial norm":
        module = RBLNVQModel.family.module(make_vq(**SPATIAL), part)
        return optimise(capture(module, part, 3 if part == "encoder" else 4))
    if architecture in FRAMES:
        vae = tiny_vaes.make("AutoencoderKLWan", **FRAMES[architecture])
        module = RBLNAutoencoderKLWan.family.module(vae, part)
        return optimise(capture(module, part, 3 if part == "encoder" else 16))
    return optimise(capture_part(make_vae(**ARCHITECTURES[architecture]), part))


@functools.cache
def runtime_of(architecture: str, part: str, dtype: str) -> CpuRuntime:
    return CpuRuntime(graph_of(architecture, part), dtype=dtype, num_threads=2)


def image_of(graph: Graph, height: int, width: int, batch: int = 1) -> torch.Tensor:
    factor = 4 if graph.name == "encoder" else 1  # as the deepest needs
    generator = torch.Generator().manual_seed(height * 1000 + width)
    shape = (batch, graph.input_channels, height * factor, width * factor)
    return torch.randn(shape, generator=generator)


def scheduled(
    runtime: CpuRuntime, shape: Sequence[int], choice: Iterable[str] = (), *, sketch: bool = False
) -> Schedule:
    """A schedule for the engine."""
    rules = runtime.images.rules(tuple(shape))
    return make_schedule(Problem(runtime.graph, shape, rules), choice, sketch=sketch)


def run_schedule(runtime: CpuRuntime, schedule: Schedule, image: torch.Tensor) -> torch.Tensor:
    return runtime.execute(lower(schedule, runtime.images.rules(schedule.input_shape)), image)


def written_over(schedule: Schedule) -> set[str]:
    """The values whose memory a sweep takes for its results."""
    return {
        value
        for buffer in schedule.buffers
        if buffer.over is not None
        for value in buffer.over.buffer.holds
    }


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(GRAPHS),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(1, 24),
    st.data(),
)
def test_whatever_is_computed_again_the_bits_are_the_same(
    which: tuple[str, str], dtype: str, height: int, width: int, data: st.DataObject
) -> None:
    graph, runtime = graph_of(*which), runtime_of(*which, dtype)
    image = image_of(graph, height, width)
    choice = data.draw(st.sets(st.sampled_from(sorted(droppable(graph)))))
    expected = runtime.run(image)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), "written over"):
            patch.setattr(scheduler, "REPLACED_BYTES", 0)
        schedule = scheduled(runtime, image.shape, choice)
        sketch = scheduled(runtime, image.shape, choice, sketch=True)
    assert torch.equal(run_schedule(runtime, schedule, image), expected)
    # A sketch knows the memory to the byte, and the work but for what rounding leaves.
    assert sketch.arena_bytes == schedule.arena_bytes
    assert sketch.flops == pytest.approx(schedule.flops, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_doubles_the_image_or_halves_the_channels_is_written_over_its_input(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of("deep", "decoder")
    runtime = runtime_of("deep", "decoder", dtype)
    image = image_of(graph, 120, 100)
    beside = scheduled(runtime, image.shape)
    assert not written_over(beside)
    monkeypatch.setattr(scheduler, "REPLACED_BYTES", 0)
    over = scheduled(runtime, image.shape)
    upsampled = "decoder.up_blocks.1.upsamplers.0.conv"
    assert {"decoder.up_blocks.1.resnets.2.add", upsampled} <= written_over(over)
    assert over.flops == pytest.approx(beside.flops, rel=1e-3)
    # Of a large image more: the rows that lie between are a smaller part of it.
    assert over.arena_bytes < 0.9 * beside.arena_bytes
    assert torch.equal(run_schedule(runtime, over, image), run_schedule(runtime, beside, image))
    # A batch has its images apart, and is left as it is.
    two = (2, *image.shape[1:])
    assert not written_over(scheduled(runtime, two))


def test_what_is_written_over_is_read_by_nothing_that_is_computed_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The latents, which all convolutions of the spatial norms could take the memory of."""
    graph = graph_of("spatial norm", "decoder")
    runtime = runtime_of("spatial norm", "decoder", "float32")
    image = image_of(graph, 20, 12)
    expected = runtime.run(image)
    monkeypatch.setattr(scheduler, "REPLACED_BYTES", 0)
    schedule = scheduled(runtime, image.shape, ["post_quant_conv", "decoder.conv_in"])
    assert torch.equal(run_schedule(runtime, schedule, image), expected)


def test_results_that_are_not_needed_at_once_are_not_made_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the convolutions of all spatial norms would fill the memory."""
    graph = graph_of("spatial norm", "decoder")
    runtime = runtime_of("spatial norm", "decoder", "float32")
    shape = image_of(graph, 20, 12).shape
    needed = scheduled(runtime, shape).arena_bytes
    monkeypatch.setattr(scheduler, "REPLACED_BYTES", 0)
    assert scheduled(runtime, shape).arena_bytes <= 1.1 * needed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "part"), [each for each in GRAPHS if each != ("spatial norm", "encoder")]
)
def test_each_tradeoff_takes_less_memory_and_gives_the_same_bits(
    architecture: str, part: str
) -> None:
    graph = graph_of(architecture, part)
    runtime = runtime_of(architecture, part, "bfloat16")
    image = image_of(graph, 56, 48)
    expected = runtime.run(image)
    sketches = runtime.images.search(tuple(image.shape)).tradeoffs()
    sizes = [sketch.arena_bytes for sketch in sketches]
    assert sizes == sorted(sizes, reverse=True)
    # Images of a few channels are stored as 32, and there is little to save.
    large = tuple(image_of(graph, 352, 288).shape)
    assert len(runtime.images.search(large).tradeoffs()) > 1 or architecture == "narrow"
    assert sketches[0].extra_work == 0
    for sketch in sketches[1:]:
        schedule = scheduled(runtime, image.shape, sketch.recomputed)
        assert schedule.flops == pytest.approx(sketch.flops, rel=1e-3)
        assert torch.equal(run_schedule(runtime, schedule, image), expected)


def test_what_a_spatial_norm_gives_need_not_be_kept() -> None:
    """It is made in strips for the convolution that reads it, which takes no more work."""
    runtime = runtime_of("spatial norm", "decoder", "float32")
    free, strips, *_ = runtime.images.search((1, 4, 88, 72)).tradeoffs()
    assert strips.arena_bytes < 0.9 * free.arena_bytes
    assert strips.flops == free.flops
    assert all(value.endswith("norm1.add") for value in strips.recomputed)


@pytest.mark.parametrize("architecture", FRAMES)
def test_without_statistics_of_the_image_whole_levels_are_made_in_strips(architecture: str) -> None:
    """Each value is as large as its readers, so no memory is saved before several are dropped."""
    runtime = runtime_of(architecture, "decoder", "float32")
    free, *_, least = runtime.images.search((1, 16, 176, 144)).tradeoffs()
    assert least.arena_bytes < 0.7 * free.arena_bytes
    assert least.flops == free.flops
    made = {operation.output for operation in runtime.graph.operations}
    level = {value for value in made if value.startswith("decoder.up_blocks.2.resnets")}
    assert level <= set(least.recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", PARTS)
def test_a_limit_is_kept_down_to_the_least_that_the_error_names(part: str, dtype: str) -> None:
    graph = graph_of("wide", part)
    image = image_of(graph, 56, 48)
    shape = tuple(image.shape)
    free = runtime_of("wide", part, dtype)
    expected, most = free.run(image), free.memory_needed(shape)
    search = free.images.search(shape)
    schedules = [search.recomputing(sketch.recomputed) for sketch in search.tradeoffs()]
    programs = [free.images.bind(lower(schedule, search.rules(1))) for schedule in schedules]
    least = 4 * expected.numel() + min(program.bytes for program in programs)
    assert least < most
    with pytest.raises(MemoryError, match="at least") as caught:
        CpuRuntime(graph, dtype=dtype, num_threads=2, memory_limit=1).run(image)
    advised = f"at least {format_bytes(least)} .* is 1 bytes. Raise it to '(.*)MiB'"
    found = re.search(advised, str(caught.value))
    assert found is not None
    assert least <= int(found[1]) * 2**20 < least + 2**20
    for limit in (least, (least + most) // 2, most - 1, most):
        limited = CpuRuntime(graph, dtype=dtype, num_threads=2, memory_limit=limit)
        assert limited.memory_needed(shape) <= limit
        assert torch.equal(limited.run(image), expected)
    with pytest.raises(MemoryError, match=f"at least {format_bytes(least)}"):
        CpuRuntime(graph, dtype=dtype, num_threads=2, memory_limit=least - 1).run(image)


def test_a_limit_below_what_must_be_kept_costs_no_search_but_that_for_the_least() -> None:
    graph = graph_of("spatial norm", "decoder")
    planner = runtime_of("spatial norm", "decoder", "float32").images
    shape = (1, graph.input_channels, 24, 24)
    search = planner.search(shape)
    *_, least = search.walk()
    hopeless = planner.search(shape)
    bound = hopeless._choices.bound(frozenset())
    assert 0.1 * least.arena_bytes < bound < least.arena_bytes
    assert hopeless.fit(bound - 1) is None
    assert len(hopeless._choices.sketches) == len(search._choices.sketches)


def test_the_last_level_is_made_in_strips_with_a_pass_for_each_norm() -> None:
    runtime = runtime_of("without attention", "decoder", "bfloat16")
    shape = tuple(image_of(runtime.graph, 704, 576).shape)
    free, *_, least = runtime.images.search(shape).tradeoffs()
    first = "decoder.up_blocks.0.upsamplers.0.conv"
    level = {first} | {
        operation.output
        for operation in runtime.graph.operations
        if operation.output.startswith("decoder.up_blocks.1")
    }
    assert level <= set(least.recomputed)
    computed = [task for task in least.tasks if task.output is not None]
    passes = {task.value: task.sweep for task in computed if "sums" in task.buffers}
    norms = level & passes.keys()
    assert len({passes[value] for value in norms}) == len(norms) == 5
    # Each pass computes all that came before it once more, and so does that of the result.
    assert sum(task.value == first for task in computed) == len(norms) + 1
    assert least.arena_bytes < 0.6 * free.arena_bytes


def test_tiling_takes_the_least_memory_within_a_multiple_of_the_time() -> None:
    graph = graph_of("without attention", "decoder")
    free = runtime_of("without attention", "decoder", "bfloat16")
    image = image_of(graph, 352, 288)
    shape = tuple(image.shape)
    thrifty = CpuRuntime(graph, dtype="bfloat16", num_threads=2)
    thrifty.save_memory(slicing=False, tiling=True)
    program = thrifty.planned(shape).program
    most = TILING_TIME * free.planned(shape).program.work
    assert program.schedule.arena_bytes < free.planned(shape).program.schedule.arena_bytes
    # What a sketch leaves out of the estimate is a small part.
    assert program.work < 1.02 * most
    search = free.images.search(shape)
    less = [s for s in search.tradeoffs() if s.arena_bytes < program.schedule.arena_bytes]
    assert less
    assert all(lower(sketch, search.rules(1)).work > most for sketch in less)
    # The limit comes first.
    limit = (
        thrifty.memory_needed(shape) - program.schedule.arena_bytes + less[-1].arena_bytes + 2**20
    )
    limited = CpuRuntime(graph, dtype="bfloat16", num_threads=2, memory_limit=limit)
    limited.save_memory(slicing=False, tiling=True)
    assert limited.memory_needed(shape) <= limit
    assert torch.equal(limited.run(image), free.run(image))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("architecture", ["wide", "deep"])
def test_no_limit_is_passed_by_the_memory_of_threads(
    architecture: str, part: str, dtype: str
) -> None:
    graph = graph_of(architecture, part)
    shape = tuple(image_of(graph, 40, 200).shape)
    free = runtime_of(architecture, part, dtype)
    least, *others = reversed(free.images.search(shape).tradeoffs())
    beside = free.memory_needed(shape) - free.planned(shape).program.schedule.arena_bytes
    for other in (least, *others):
        # Where strips need more for threads than the whole image, another plan must do.
        limit = other.arena_bytes + beside
        limited = CpuRuntime(graph, dtype=dtype, num_threads=2, memory_limit=limit)
        try:
            assert limited.memory_needed(shape) <= limit
        except MemoryError:
            assert other is least


def test_the_arena_is_as_large_as_what_the_steps_use() -> None:
    graph = graph_of("deep", "decoder")
    runtime = runtime_of("deep", "decoder", "float32")
    image = image_of(graph, 40, 32)
    for schedule in runtime.images.search(tuple(image.shape)).tradeoffs():
        program = lower(schedule, runtime.images.rules(schedule.input_shape))
        runtime.execute(program, image)
        cut = dataclasses.replace(schedule, arena_bytes=schedule.arena_bytes - 4096)
        with pytest.raises(ValueError, match="don't lie in an arena"):
            runtime.execute(dataclasses.replace(program, schedule=cut), image)


def test_a_batch_goes_through_in_parts_before_anything_is_computed_again() -> None:
    graph = graph_of("wide", "decoder")
    free = runtime_of("wide", "decoder", "float32")
    image = image_of(graph, 64, 56, batch=5)
    expected = free.run(image)
    shape = tuple(image.shape)
    result = 4 * expected.numel()
    two = free.memory_needed((2, *shape[1:])) - result // 5 * 2 + result
    limited = CpuRuntime(graph, dtype="float32", num_threads=2, memory_limit=two)
    schedule = limited.planned(shape).program.schedule
    assert schedule.input_shape[0] == 2
    assert not schedule.recomputed
    assert torch.equal(limited.run(image), expected)
    least = CpuRuntime(graph, dtype="float32", num_threads=2)
    least.save_memory(slicing=True, tiling=True)
    assert least.planned(shape).program.schedule.input_shape[0] == 1
    assert least.planned(shape).program.schedule.recomputed
    assert torch.equal(least.run(image), expected)
    assert least.memory_needed(shape) < limited.memory_needed(shape) < free.memory_needed(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_result_is_written_to_where_the_caller_says(dtype: torch.dtype) -> None:
    graph = graph_of("narrow", "decoder")
    runtime = runtime_of("narrow", "decoder", "float32")
    image = image_of(graph, 6, 10, batch=3).to(dtype)
    expected = runtime.run(image)
    wide = torch.zeros(3, 6, 24, 20, dtype=dtype)
    out = wide[:, ::2, ::2]
    assert runtime.run(image, out) is out
    assert torch.equal(out, expected)
    assert wide[:, 1::2].count_nonzero() == wide[:, :, 1::2].count_nonzero() == 0
    with pytest.raises(ValueError, match="out is"):
        runtime.run(image, torch.zeros(3, 3, 12, 21))
    # What the caller gives isn't counted.
    fitting = CpuRuntime(
        graph,
        dtype="float32",
        num_threads=2,
        memory_limit=runtime.memory_needed(tuple(image.shape)) - 4 * expected.numel(),
    )
    assert torch.equal(fitting.run(image, torch.empty_like(expected)), expected)


def test_a_description_says_what_less_memory_costs() -> None:
    text = runtime_of("wide", "decoder", "float32").describe((2, 4, 48, 40), steps=True)
    head, rest = text.split("\n\n", 1)
    assert head.startswith("decoder on 2x4x48x40, float32")
    assert "0.0% of it extra" in head
    assert "nothing" in rest
    assert re.search(r"\d MiB +[1-9]\d*\.\d% +about \d", rest)
    assert re.search(r"^time +about \d+", head, re.MULTILINE)
    assert "Conv2d decoder.conv_in" in rest


def test_where_no_peak_is_known_no_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_planner, "measured_limit", lambda *_: 0.0)
    runtime = CpuRuntime(graph_of("narrow", "decoder"), dtype="float32")
    assert "time        not known" in runtime.describe((1, 4, 8, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", PARTS)
def test_a_sketch_is_estimated_like_all_of_its_strips(part: str, dtype: str) -> None:
    graph = graph_of("deep", part)
    runtime = runtime_of("deep", part, dtype)
    search = runtime.images.search(tuple(image_of(graph, 88, 72).shape))
    work = []
    for sketch in search.tradeoffs():
        whole = lower(search.recomputing(sketch.recomputed), search.rules(1)).work
        # Tiles of the last strip are smaller, and cost more for each pixel.
        assert lower(sketch, search.rules(1)).work == pytest.approx(whole, rel=0.1)
        work.append(whole)
    # Twice the pixels are about twice the work.
    twice = runtime.images.search(tuple(image_of(graph, 176, 72).shape))
    assert 1.9 < lower(twice.keeping_all(1), twice.rules(1)).work / work[0] < 4.1
    # What is computed again comes on top, but for what smaller tiles cost.
    assert all(more >= 0.99 * less for less, more in itertools.pairwise(work))


RESIDENT = """
import sys, torch
from rbln_vae import RBLNAutoencoderKL

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

directory, limit, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vae = RBLNAutoencoderKL.from_pretrained(directory, rbln_memory_limit=limit)
vae.decode(torch.randn(1, 4, 4, 4))  # what a first run loads
before = status("VmRSS")
vae.decode(torch.randn(1, 4, side, side))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_within_the_limit(tmp_path: Path) -> None:
    from rbln_vae import RBLNAutoencoderKL

    # Of activations of 400 MB, so that the limit is what counts.
    vae = make_vae(block_out_channels=(64, 64), norm_num_groups=32, mid_block_add_attention=False)
    compiled = RBLNAutoencoderKL.from_model(vae)
    compiled.save_pretrained(tmp_path)
    side = 640
    free = compiled.memory_needed("decoder", (1, 4, side, side))
    limit = int(0.7 * free)
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path), str(limit), str(side)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) <= limit + (64 << 20)
