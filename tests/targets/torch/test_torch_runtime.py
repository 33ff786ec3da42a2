"""PyTorch's kernels run every schedule: the same bits, within the memory that they say."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading

import pytest
import tiny_vaes
import torch
from graphs import PARTS, captured, evaluate, graph_of_every_kind
from vaes import capture_part, default_vae, make_vae, make_vq, noise

from rbln_vae import RBLNAutoencoderKL, RBLNAutoencoderKLWan, RBLNVQModel
from rbln_vae.errors import RBLNCancelledError, RBLNRuntimeError
from rbln_vae.graph.capture import capture
from rbln_vae.graph.ir import Conv2d, Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.levels import levels_of
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.base import RuntimeOptions
from rbln_vae.targets.cuda import CudaTarget
from rbln_vae.targets.torch.device import FullPrecision
from rbln_vae.targets.torch.rules import Machine
from rbln_vae.targets.torch.runtime import TorchRuntime

ERROR = 5e-6
"""The most error against the interpreter in float32."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def graph_of(name: str, part: str) -> Graph:
    channels = 3 if part == "encoder" else 4
    if name == "plain":
        vae = make_vae(block_out_channels=(16, 32))
        return optimise(capture_part(vae, part))
    if name == "spatial norm":
        vq = make_vq(up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"))
        return optimise(capture(RBLNVQModel.family.module(vq, part), part, channels))
    options = {"base_dim": 16, "dim_mult": [1, 2, 2], "temperal_downsample": [True, False]}
    if name == "cells":
        options |= {**tiny_vaes.WAN_2_2, **options, "decoder_base_dim": 16}
    wan = tiny_vaes.make("AutoencoderKLWan", **options)
    module = RBLNAutoencoderKLWan.family.module(wan, part)
    return optimise(capture(module, part, 3 if part == "encoder" else 16))


GRAPHS = [
    *((name, part) for name in ("plain", "spatial norm", "pixel norms") for part in PARTS),
    ("cells", "decoder"),
]


def runtime(graph: Graph, dtype: torch.dtype = torch.float32, **options: object) -> TorchRuntime:
    found = TorchRuntime(graph, dtype, "cpu", RuntimeOptions(**options))
    # Small chunks, so that small images have several, and little besides.
    found.images.machine = dataclasses.replace(
        found.images.machine, chunk_rows=4, library_bytes=2**18, scored_bytes=2**19
    )
    return found


def image_for(graph: Graph, part: str, batch: int = 1) -> torch.Tensor:
    height, width = (96, 48) if part == "encoder" else (48, 24)
    return noise(batch, graph.input_channels, height, width)


def allocated(run: object) -> tuple[torch.Tensor, int]:
    """What a function returns, and the most bytes that PyTorch's allocator gave it at a time."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return result, most


# Results


def test_every_operation_gives_what_the_interpreter_gives() -> None:
    graph = graph_of_every_kind()
    for height, width in ((16, 24), (40, 8)):
        image = noise(2, graph.input_channels, height, width)
        assert relative_l2(runtime(graph).run(image), evaluate(graph, image)) < ERROR


@pytest.mark.parametrize("name, part", GRAPHS)
def test_a_model_gives_what_the_interpreter_gives(name: str, part: str) -> None:
    graph = graph_of(name, part)
    image = image_for(graph, part, 2)
    assert relative_l2(runtime(graph).run(image), evaluate(graph, image)) < ERROR


@pytest.mark.parametrize("part", PARTS)
def test_a_graph_that_no_pass_has_rewritten_runs_too(part: str) -> None:
    graph = captured(part)
    image = noise(1, graph.input_channels, 16, 24)
    assert relative_l2(runtime(graph).run(image), evaluate(graph, image)) < ERROR


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("part", PARTS)
def test_a_lower_precision_is_no_worse_than_the_interpreter_in_it(
    part: str, dtype: torch.dtype
) -> None:
    graph = graph_of("plain", part)
    image = image_for(graph, part)
    exact = evaluate(graph, image)
    found = relative_l2(runtime(graph, dtype).run(image), exact)
    assert 0 < found < 1.2 * relative_l2(evaluate(graph, image, dtype), exact)


def test_float16_has_the_precision_of_float16() -> None:
    graph = graph_of("plain", "decoder")
    image = image_for(graph, "decoder")
    exact = evaluate(graph, image)
    narrow, wide = (
        relative_l2(runtime(graph, dtype).run(image), exact)
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert narrow < wide / 4


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name, part", GRAPHS)
def test_less_memory_gives_the_same_bits(name: str, part: str, dtype: torch.dtype) -> None:
    graph = graph_of(name, part)
    image = image_for(graph, part)
    free = runtime(graph, dtype)
    expected = free.run(image)
    search = free.images.search(image.shape)
    tradeoffs = search.tradeoffs()
    assert len(tradeoffs) > 1
    for sketch in tradeoffs[1:]:
        program = free.images.lowered(search.recomputing(sketch.recomputed), search)
        limit = program.bytes + free.images.result_bytes(image.shape)
        limited = runtime(graph, dtype, memory_limit=limit)
        assert limited.memory_needed(image.shape) <= limit
        assert torch.equal(limited.run(image), expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_allocator_gives_what_memory_needed_says(part: str) -> None:
    graph = graph_of("plain", part)
    image = noise(1, graph.input_channels, *((256, 192) if part == "encoder" else (96, 64)))
    for dtype in DTYPES[:2]:
        free = runtime(graph, dtype)
        needed = {free.memory_needed(image.shape)}
        for sketch in free.images.search(image.shape).tradeoffs()[1:]:
            needed.add(sketch.arena_bytes + 2**22)
        for limit in needed:
            limited = runtime(graph, dtype, memory_limit=limit)
            said = limited.memory_needed(image.shape)
            _, most = allocated(functools.partial(limited.run, image))
            assert 0.75 * said < most <= said


def test_half_of_the_memory_is_enough_for_a_whole_image() -> None:
    graph = graph_of("plain", "decoder")
    image = noise(1, 4, 96, 96)
    _, whole = allocated(lambda: evaluate(graph, image))
    _, most = allocated(lambda: runtime(graph, memory_limit=whole // 2).run(image))
    assert most <= whole // 2


def test_a_limit_that_is_too_low_is_an_error_that_says_how_much_is_needed() -> None:
    graph = graph_of("plain", "decoder")
    shape = (1, 4, 64, 64)
    with pytest.raises(MemoryError, match=r"decoder .* is 1\.0 MiB.*Raise it to '(\d+)MiB'") as e:
        runtime(graph, memory_limit=2**20).memory_needed(shape)
    advised = int(str(e.value).split("'")[1].removesuffix("MiB"))
    assert runtime(graph, memory_limit=advised * 2**20).run(noise(*shape)).shape[2] == 128


def test_an_image_far_beyond_the_limit_is_refused_soon() -> None:
    small = runtime(graph_of("plain", "decoder"), memory_limit=2**22)
    with pytest.raises(MemoryError, match="Raise it to"):
        small.memory_needed((1, 4, 16384, 16384))


def test_memory_that_is_not_there_is_an_error_that_leaves_the_model_usable() -> None:
    graph = graph_of("plain", "decoder")
    found = runtime(graph)
    with pytest.raises(MemoryError, match="system has no"):
        found.run(torch.zeros(1, 4, 1, 1).expand(1, 4, 8, 2**27))
    assert found.run(noise(1, 4, 8, 8)).isfinite().all()


def test_free_memory_limits_each_run() -> None:
    free = [2**30]
    graph = graph_of("plain", "decoder")
    found = TorchRuntime(graph, torch.float32, "cpu", RuntimeOptions(), lambda: free[0])
    shape = (1, 4, 64, 64)
    first = found.memory_needed(shape)
    free[0] = 2**26 - 1
    with pytest.raises(MemoryError, match="memory_limit is 0"):
        found.memory_needed(shape)
    free[0] = 2**30
    assert found.memory_needed(shape) == first


def test_one_run_may_have_a_limit_of_its_own() -> None:
    graph = graph_of("plain", "decoder")
    image = noise(1, 4, 96, 96)
    found = runtime(graph)
    expected, whole = found.run(image), found.memory_needed(image.shape)
    limited, most = allocated(lambda: found.run(image, memory_limit=3 * whole // 4))
    assert most <= 3 * whole // 4
    assert torch.equal(limited, expected)
    assert found.memory_needed(image.shape) == whole
    with pytest.raises(MemoryError, match=r"memory_limit is 1\.0 MiB"):
        found.run(image, memory_limit=2**20)
    with pytest.raises(MemoryError, match=r"memory_limit is 1\.0 MiB"):
        runtime(graph, memory_limit=2**20).run(image, memory_limit=2**30)


def test_saving_memory_changes_no_bit() -> None:
    graph = graph_of("plain", "decoder")
    image = noise(1, 4, 64, 64)
    found = runtime(graph)
    expected, before = found.run(image), found.memory_needed(image.shape)
    found.save_memory(slicing=True, tiling=True)
    assert found.memory_needed(image.shape) < before
    assert torch.equal(found.run(image), expected)
    found.save_memory(slicing=False, tiling=False)
    assert found.memory_needed(image.shape) == before


def test_a_description_says_what_memory_needed_says() -> None:
    found = runtime(graph_of("plain", "decoder"))
    shape = (1, 4, 64, 64)
    text = found.describe(shape)
    assert f"{found.memory_needed(shape) / 2**20:.1f} MiB" in text
    assert "computed again, in strips" in text
    assert "Conv2d" not in text and "Conv2d" in found.describe(shape, steps=True)


# Batches, and what the caller gives


def test_the_images_of_a_batch_have_the_bits_of_runs_of_their_own() -> None:
    graph = graph_of("plain", "decoder")
    found, batch = runtime(graph), noise(3, 4, 24, 24)
    result = found.run(batch)
    for n in range(3):
        assert torch.equal(found.run(batch[n : n + 1]), result[n : n + 1])


def test_a_machine_may_run_a_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("plain", "decoder")
    batch = noise(3, 4, 24, 24)
    expected = runtime(graph).run(batch)
    monkeypatch.setattr(Machine, "batches", True)
    found = runtime(graph)
    assert found.planned(batch.shape).schedule.input_shape[0] == 3
    assert relative_l2(found.run(batch), expected) < ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    graph = graph_of("plain", "decoder")
    image = noise(1, 4, 16, 16).to(dtype)
    found = runtime(graph).run(image)
    assert found.dtype == dtype
    assert torch.equal(found, runtime(graph).run(image.float()).to(dtype))


def test_a_result_is_written_where_the_caller_wants_it() -> None:
    graph = graph_of("plain", "decoder")
    found, image = runtime(graph), noise(2, 4, 16, 16)
    out = torch.zeros(3, 2, 32, 32).transpose(0, 1)
    assert found.run(image, out) is out
    assert torch.equal(out, found.run(image))
    with pytest.raises(ValueError, match=r"out has the shape .*expected \(2, 3, 32, 32\)"):
        found.run(image, torch.zeros(2, 3, 32, 31))
    with pytest.raises(TypeError, match="floating-point tensor"):
        found.run(torch.zeros(1, 4, 16, 16, dtype=torch.int64))


def test_levels_are_those_of_the_floats() -> None:
    graph = graph_of("plain", "decoder")
    image = noise(2, 4, 16, 16)
    finite = torch.zeros(2, dtype=torch.bool)
    found = runtime(graph).run(image, levels=True, finite=finite)
    assert torch.equal(found, levels_of(runtime(graph).run(image)))
    assert found.permute(0, 2, 3, 1).is_contiguous()
    assert finite.tolist() == [True, True]
    image[1, 0, 0, 0] = math.nan
    runtime(graph).run(image, levels=True, finite=finite)
    assert finite.tolist() == [True, False]


def test_rows_are_told_once_each_from_the_top() -> None:
    graph = graph_of("plain", "decoder")
    told: list[tuple[int, torch.Tensor]] = []
    image = noise(2, 4, 16, 16)
    result = runtime(graph).run(image, on_rows=lambda first, rows: told.append((first, rows)))
    assert len(told) > 1
    ends = [0, *(first + rows.shape[2] for first, rows in told)]
    assert [first for first, _ in told] == ends[:-1] and ends[-1] == 32
    assert torch.equal(torch.cat([rows for _, rows in told], 2), result)


# The range of float16


def beyond_range() -> Graph:
    """A decoder whose images grow beyond 65504, and shrink again where a norm reads them."""
    graph = graph_of("plain", "decoder")
    first = next(o for o in graph.operations if isinstance(o, Conv2d))
    weights = {**graph.weights, first.weight: graph.weights[first.weight] * 2e5}
    return dataclasses.replace(graph, weights=weights)


def test_what_float16_cannot_hold_is_computed_again_in_bfloat16() -> None:
    graph, image = beyond_range(), noise(2, 4, 16, 16)
    image[1] *= 1e-7  # within the range
    found = runtime(graph, torch.float16)
    told: list[int] = []
    with pytest.warns(RuntimeWarning, match="beyond the range of float16"):
        result = found.run(image, on_rows=lambda first, rows: told.append(first))
    wide = runtime(graph, torch.bfloat16)
    wide.images.machine = found._wide.machine
    assert torch.equal(result[:1], wide.run(image[:1]))
    assert torch.equal(result[1:], found.run(image[1:]))
    assert told == [0]
    assert relative_l2(result, evaluate(graph, image)) < 0.05


def test_pictures_in_float16_are_never_black() -> None:
    graph, image = beyond_range(), noise(1, 4, 16, 16)
    finite = torch.zeros(1, dtype=torch.bool)
    with pytest.warns(RuntimeWarning, match="beyond the range of float16"):
        levels = runtime(graph, torch.float16).run(image, levels=True, finite=finite)
    assert finite.all() and levels.float().std() > 1


def test_an_image_that_is_not_finite_is_not_computed_again(
    recwarn: pytest.WarningsRecorder,
) -> None:
    image = noise(1, 4, 16, 16)
    image[0, 0, 0, 0] = math.inf
    result = runtime(graph_of("plain", "decoder"), torch.float16).run(image)
    assert not result.isfinite().all() and not recwarn.list


# Stopping, threads, profiles


def test_a_caller_or_a_timeout_ends_a_run() -> None:
    graph = graph_of("plain", "decoder")
    with pytest.raises(RBLNCancelledError):
        runtime(graph).run(noise(1, 4, 16, 16), should_stop=lambda: True)
    with pytest.raises(TimeoutError):
        runtime(graph, timeout=1e-6).run(noise(1, 4, 16, 16))


def test_threads_may_share_a_model() -> None:
    graph = graph_of("plain", "decoder")
    found = runtime(graph)
    images = [noise(1, 4, 16, 16, seed=n) for n in range(4)]
    expected = [found.run(image) for image in images]
    results: list[torch.Tensor | None] = [None] * 4

    def work(n: int) -> None:
        results[n] = found.run(images[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True) if a is not None)
    assert all(result is not None for result in results)


def test_a_profile_has_every_step() -> None:
    found = runtime(graph_of("plain", "decoder"), activate_profiler=True)
    shape = (1, 4, 16, 16)
    found.run(noise(*shape))
    (profile,) = found.profiles
    steps = found.planned(shape).steps
    assert [step.name for step in profile.steps] == [step.name for step in steps]
    assert all(step.seconds > 0 for step in profile.steps)
    assert sum(step.flops for step in profile.steps) == found.graph.flops(shape)


def test_the_model_is_that_of_diffusers() -> None:
    vae = default_vae()
    model = RBLNAutoencoderKL.from_model(vae, rbln_target="reference", rbln_dtype="float32")
    latent = noise(1, 4, 16, 24)
    with torch.no_grad():
        assert relative_l2(model.decode(latent).sample, vae.decode(latent).sample) < 5e-5


# What only a GPU has


def test_tf32_is_off_while_any_run_is_in_it() -> None:
    before = torch.backends.cudnn.allow_tf32
    switch = FullPrecision()
    with switch:
        with switch:
            assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_model_on_a_gpu_says_in_a_forked_child_what_to_do() -> None:
    found = runtime(graph_of("plain", "decoder"))
    found._process = -1
    found.run(noise(1, 4, 8, 8))  # on a CPU it works
    found.images.machine = dataclasses.replace(found.images.machine, device=torch.device("cuda"))
    with pytest.raises(RBLNRuntimeError, match=r"forked.*'spawn'"):
        found.run(noise(1, 4, 8, 8))


def test_memory_that_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert CudaTarget().free_memory("cuda")() == 1300
