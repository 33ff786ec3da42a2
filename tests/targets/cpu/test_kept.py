"""Transformed kernels that are kept between runs: they save time, and change nothing else."""

from __future__ import annotations

import functools
import os
import re
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_a_process
from vaes import capture_part, make_vae

from rbln_vae import _engine
from rbln_vae.graph.ir import Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import Choices

pytestmark = pytest.mark.skipif(
    not all(k.winograd for k in _engine.all_kernels() if k.dtype == "float32"),
    reason="no kernels are transformed here",
)

SHAPE = (1, 4, 24, 24)
"""Its kernels are larger than its activations."""
LARGE = (1, 4, 112, 112)
"""Its kernels are smaller than its activations."""
PAGE = 2**21
"""What memory is rounded up to."""
DTYPES = ["float32", "float16", "bfloat16"]


@functools.cache
def wide_decoder() -> Graph:
    vae = make_vae(block_out_channels=(96, 96), norm_num_groups=8, layers_per_block=1)
    return optimise(capture_part(vae, "decoder"))


@pytest.fixture(scope="module")
def decoder() -> Graph:
    return wide_decoder()


def image_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def runtime_of(graph: Graph, dtype: str = "float32", limit: int | None = None) -> CpuRuntime:
    return CpuRuntime(graph, dtype=dtype, num_threads=2, memory_limit=limit)


def never_keeping(graph: Graph, dtype: str = "float32") -> CpuRuntime:
    return CpuRuntime(graph, dtype=dtype, num_threads=2, choices=Choices(kept_kernels=False))


def kernels_of(runtime: CpuRuntime, shape: tuple[int, ...]) -> int:
    return sum(runtime.planned(shape).program.kernels.values())


def held(runtime: CpuRuntime) -> int:
    """Bytes that are kept for the next run."""
    return runtime.kept_kernels.bytes + runtime._executor.idle_bytes


def result_bytes(runtime: CpuRuntime, shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(runtime.planned(shape).program.schedule.output_shape).numel()


def ways(runtime: CpuRuntime) -> set[str]:
    """The kinds of steps of the latest run."""
    return {step.kind for step in runtime.profiles[-1].steps}


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_kept_from_the_second_run_on(decoder: Graph, dtype: str) -> None:
    runtime = CpuRuntime(decoder, dtype=dtype, num_threads=2, activate_profiler=True)
    image = image_of(SHAPE)
    expected = never_keeping(decoder, dtype).run(image)
    for kept in (False, True, True):
        assert torch.equal(runtime.run(image), expected)
        assert ("Winograd" not in ways(runtime)) is kept
        assert runtime.kept_kernels.bytes == (kernels_of(runtime, SHAPE) if kept else 0)


def test_what_is_kept_counts_as_memory_that_a_run_needs(decoder: Graph) -> None:
    free, never = runtime_of(decoder), never_keeping(decoder)
    kernels, needed = kernels_of(free, SHAPE), free.memory_needed(SHAPE)
    assert needed == never.memory_needed(SHAPE) + kernels
    for limit, kept in ((needed, kernels), (needed - 1, 0)):
        limited = runtime_of(decoder, limit=limit)
        assert limited.memory_needed(SHAPE) == needed - kernels + kept
        for _ in range(3):
            limited.run(image_of(SHAPE))
        assert limited.kept_kernels.bytes == kept


def test_kernels_take_an_eighth_of_the_memory_of_the_machine_at_most(
    decoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = kernels_of(runtime_of(decoder), SHAPE)
    for memory, kept in ((8 * kernels, kernels), (8 * kernels - 8, 0)):
        monkeypatch.setattr("rbln_vae.targets.cpu.runtime.usable_memory", lambda m=memory: m)
        for limit in (None, 2 * memory):
            runtime = runtime_of(decoder, limit=limit)
            for _ in range(2):
                runtime.run(image_of(SHAPE))
            assert runtime.kept_kernels.bytes == kept


def test_kernels_smaller_than_the_activations_are_not_kept_and_given_back(decoder: Graph) -> None:
    runtime, never = runtime_of(decoder), never_keeping(decoder)
    assert runtime.memory_needed(LARGE) == never.memory_needed(LARGE)
    for _ in range(2):
        runtime.run(image_of(SHAPE))
    assert runtime.kept_kernels.bytes == kernels_of(runtime, SHAPE)
    image = image_of(LARGE)
    for _ in range(2):
        assert torch.equal(runtime.run(image), never.run(image))
        assert runtime.kept_kernels.bytes == 0
    # Nor does the large arena stay beside them.
    assert runtime._executor.idle_bytes > runtime.memory_needed(SHAPE)
    for kept in (False, True):
        runtime.run(image_of(SHAPE))
        assert (runtime.kept_kernels.bytes > 0) is kept
    assert held(runtime) <= runtime.memory_needed(SHAPE) + PAGE


def test_sizes_that_take_turns_never_make_kernels_to_give_them_back(decoder: Graph) -> None:
    runtime = runtime_of(decoder)
    for _ in range(3):
        for shape in (SHAPE, LARGE):
            runtime.run(image_of(shape))
            assert runtime.kept_kernels.bytes == 0


def test_all_shapes_share_one_copy(decoder: Graph) -> None:
    runtime, never = runtime_of(decoder), never_keeping(decoder)
    shapes = [(1, 4, 8, 8), (1, 4, 12, 12), SHAPE, (2, 4, 24, 8), (1, 4, 9, 31)]
    needed: dict[str, int] = {}
    for shape in shapes:
        needed.update(runtime.planned(shape).program.kernels)
    for _ in range(3):
        for shape in shapes:
            image = image_of(shape)
            assert torch.equal(runtime.run(image), never.run(image))
    assert runtime.kept_kernels.bytes == sum(needed.values())


@pytest.mark.slow
@given(st.data())
@settings(max_examples=12, deadline=None)
def test_no_limit_is_passed_and_no_bit_changes(data: st.DataObject) -> None:
    decoder = wide_decoder()
    dtype = data.draw(st.sampled_from(DTYPES))
    never = never_keeping(decoder, dtype)
    thrifty = never_keeping(decoder, dtype)
    thrifty.save_memory(slicing=True, tiling=True)
    sides = st.sampled_from([8, 12, 20, 24, 40, 112])
    shapes = data.draw(st.lists(st.tuples(st.just(1), st.just(4), sides, sides), max_size=6))
    least = max((thrifty.memory_needed(shape) for shape in shapes), default=1)
    limit = data.draw(st.integers(least, 3 * least + 2**25))
    runtime = runtime_of(decoder, dtype, limit)
    for shape in (each for each in shapes for _ in range(2)):
        assert runtime.memory_needed(shape) <= limit
        image = image_of(shape)
        assert torch.equal(runtime.run(image), never.run(image))
        assert held(runtime) + result_bytes(runtime, shape) <= limit + PAGE


def test_the_least_memory_has_none_to_keep_kernels(decoder: Graph) -> None:
    runtime = runtime_of(decoder)
    for tiling in (False, True):
        runtime.save_memory(slicing=False, tiling=tiling)
        for _ in range(2):
            runtime.run(image_of(SHAPE))
        assert (runtime.kept_kernels.bytes > 0) is not tiling


def test_the_limit_of_one_run_holds_for_what_runs_before_have_left(decoder: Graph) -> None:
    runtime, never = runtime_of(decoder), never_keeping(decoder)
    least = runtime.memory_needed(SHAPE) - kernels_of(runtime, SHAPE)
    for _ in range(2):
        runtime.run(image_of(SHAPE))
    assert held(runtime) + result_bytes(runtime, SHAPE) > least + PAGE
    found = runtime.run(image_of(SHAPE), memory_limit=least)
    assert held(runtime) + result_bytes(runtime, SHAPE) <= least + PAGE
    assert torch.equal(found, never.run(image_of(SHAPE)))
    # A larger image leaves a larger arena.
    runtime.run(image_of(LARGE))
    assert held(runtime) + result_bytes(runtime, SHAPE) > least + PAGE
    assert torch.equal(runtime.run(image_of(SHAPE), memory_limit=least), found)
    assert held(runtime) + result_bytes(runtime, SHAPE) <= least + PAGE


def test_memory_is_returned_when_it_is_asked_for(decoder: Graph) -> None:
    runtime = runtime_of(decoder)
    for _ in range(2):
        runtime.run(image_of(SHAPE))
    runtime.release_memory()
    assert held(runtime) == 0
    expected = never_keeping(decoder).run(image_of(SHAPE))
    assert torch.equal(runtime.run(image_of(SHAPE)), expected)
    assert runtime.kept_kernels.bytes == 0


def test_without_a_limit_they_take_a_part_of_the_memory_of_the_machine(
    decoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = kernels_of(runtime_of(decoder), SHAPE)
    for memory, kept in ((8 * kernels, True), (8 * kernels - 8, False)):
        monkeypatch.setattr("rbln_vae.targets.cpu.runtime.usable_memory", lambda m=memory: m)
        runtime = runtime_of(decoder)
        needed = runtime.memory_needed(SHAPE)
        assert (needed > never_keeping(decoder).memory_needed(SHAPE)) is kept


def test_where_memory_can_not_be_had_runs_go_on_without(
    decoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(count: int) -> torch.Tensor:
        raise _engine.OutOfMemoryError("no memory")

    monkeypatch.setattr(_engine, "allocate", refuse)
    runtime = runtime_of(decoder)
    expected = never_keeping(decoder).run(image_of(SHAPE))
    for _ in range(3):
        assert torch.equal(runtime.run(image_of(SHAPE)), expected)
    assert runtime.kept_kernels.bytes == 0


def test_more_memory_than_there_is_can_not_be_allocated() -> None:
    assert _engine.allocate(1000).numel() == 1000
    with pytest.raises(MemoryError):
        _engine.allocate(2**60)


def test_first_runs_at_once_make_one_copy(decoder: Graph) -> None:
    image = image_of(SHAPE)
    expected = never_keeping(decoder).run(image)
    for _ in range(5):
        runtime, wrong = runtime_of(decoder), []
        start = threading.Barrier(4)

        def work(
            runtime: CpuRuntime = runtime,
            start: threading.Barrier = start,
            wrong: list[bool] = wrong,
        ) -> None:
            start.wait()
            wrong.extend(not torch.equal(runtime.run(image), expected) for _ in range(4))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [False] * 16
        assert runtime.kept_kernels.bytes == kernels_of(runtime, SHAPE)


@pytest.mark.slow
def test_runs_that_give_back_and_make_kernels_at_once_disturb_no_other(decoder: Graph) -> None:
    images = [image_of(SHAPE), image_of((1, 4, 12, 12)), image_of(LARGE)]
    expected = [never_keeping(decoder).run(image) for image in images]
    runtime, wrong = runtime_of(decoder), []

    def work(which: int, times: int) -> None:
        wrong.extend(
            not torch.equal(runtime.run(images[which]), expected[which]) for _ in range(times)
        )

    turns = [(0, 30), (0, 30), (1, 60), (2, 3)]
    threads = [threading.Thread(target=work, args=each) for each in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 123


def test_a_run_that_is_stopped_while_it_makes_kernels_keeps_none(
    decoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, image = runtime_of(decoder), image_of(SHAPE)
    expected, run_plan = runtime.run(image), runtime._run_plan

    def stop(*arguments: Any) -> object:
        # The plan that makes kernels takes no image.
        if arguments[1][0].numel() == 0:
            raise KeyboardInterrupt
        return run_plan(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime, "_run_plan", stop)
        runtime.run(image)
    assert runtime.kept_kernels.bytes == 0
    for _ in range(2):
        assert torch.equal(runtime.run(image), expected)
        assert runtime.kept_kernels.bytes == kernels_of(runtime, SHAPE)


FORKING = """
import json, os, threading
from test_kept import SHAPE, image_of, runtime_of, wide_decoder
import torch

runtime, image = runtime_of(wide_decoder()), image_of(SHAPE)
expected, run_plan = runtime.run(image), runtime._run_plan
making, forked = threading.Event(), threading.Event()

def wait(*arguments):
    if arguments[1][0].numel() == 0:
        making.set()
        forked.wait()
    return run_plan(*arguments)

def right():
    return torch.equal(runtime.run(image), expected)

runtime._run_plan = wait
thread = threading.Thread(target=right)
thread.start()
assert making.wait(600)
number = os.fork()
runtime._run_plan = run_plan
if number == 0:
    # The thread that makes kernels is not here.
    os._exit(0 if right() and right() and runtime.kept_kernels.bytes > 0 else 3)
code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
forked.set()
thread.join()
print(json.dumps([code, right(), runtime.kept_kernels.bytes > 0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_kernels_are_made_makes_its_own() -> None:
    assert in_a_process(FORKING) == [0, True, True]


def test_a_description_says_what_is_kept(decoder: Graph) -> None:
    kept = runtime_of(decoder).describe(SHAPE, steps=True)
    assert re.search(r"threads, [\d.]+ MiB for kept kernels, ", kept)
    assert re.search(r" 0\.0% .* nothing\n.* 0\.0% .* transformed kernels", kept)
    assert "Winograd decoder.mid_block.resnets.0.conv1, unless they are kept" in kept
    assert "kernels" not in runtime_of(decoder).describe(LARGE)


def test_kernels_of_another_size_are_refused() -> None:
    kernels = next(k for k in _engine.all_kernels() if k.dtype == "float32" and k.winograd)
    weights, shape = torch.zeros(2, 1, 1, 9, 512), (1, 32, 8, 8)
    image = _engine.Image(channels=32, height=8, width=8, row=8, sample=64)
    step = _engine.WinogradStep(panels=2, blocks=1)
    conv = _engine.ConvStep(
        input=image,
        output=image,
        kernel_height=3,
        kernel_width=3,
        above=1,
        left=1,
        kernels=0,
        tile_height=8,
        tile_width=8,
        cell_height=8,
        cell_width=8,
    )
    plan = _engine.Plan(kernels, 2**20, shape, shape)
    size = 2 * 36 * 512
    plan.add(step, weights, _engine.allocate(size))
    plan.add(conv, torch.zeros(32), kernels=_engine.allocate(size))
    with pytest.raises(ValueError, match="kept kernels of another size"):
        plan.add(step, weights, _engine.allocate(size - 1))
    with pytest.raises(ValueError, match="kept kernels of another size"):
        plan.add(conv, torch.zeros(32), kernels=_engine.allocate(size - 1))
