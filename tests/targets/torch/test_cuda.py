"""On an NVIDIA GPU: results, memory, and where tensors are."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from graphs import evaluate, graph_of_every_kind
from test_torch_runtime import DTYPES, GRAPHS, beyond_range, graph_of, image_for
from vaes import default_vae, noise

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.graph.ir import Graph
from rbln_vae.levels import levels_of
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.base import RuntimeOptions
from rbln_vae.targets.torch.runtime import TorchRuntime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")

ERRORS = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""The most error against the interpreter in float32, where weights don't enlarge it."""


def runtime(graph: Graph, dtype: torch.dtype = torch.float32, **options: object) -> TorchRuntime:
    return TorchRuntime(graph, dtype, "cuda", RuntimeOptions(**options))


def peak(found: TorchRuntime, image: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The result for an image, and the most bytes that the allocator gave out for it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = found.run(image)
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_gives_what_the_interpreter_gives(dtype: torch.dtype) -> None:
    graph = graph_of_every_kind()
    for height, width in ((16, 24), (40, 8)):
        image = noise(2, graph.input_channels, height, width)
        found = runtime(graph, dtype).run(image)
        assert relative_l2(found, evaluate(graph, image)) < 2 * ERRORS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, part", GRAPHS)
def test_any_memory_gives_what_the_interpreter_gives(
    name: str, part: str, dtype: torch.dtype
) -> None:
    graph = graph_of(name, part)
    image = image_for(graph, part, 2)
    expected = evaluate(graph, image)
    error = ERRORS[dtype]
    if dtype != torch.float32:
        error = 1.5 * relative_l2(evaluate(graph, image, dtype), expected)
    free = runtime(graph, dtype)
    assert relative_l2(free.run(image), expected) < error
    search = free.images.search((1, *image.shape[1:]))
    least = free.images.lowered(search.recomputing(search.tradeoffs()[-1].recomputed), search)
    limit = least.bytes + free.images.result_bytes(tuple(image.shape))
    limited = runtime(graph, dtype, memory_limit=limit)
    assert relative_l2(limited.run(image), expected) < error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_allocator_gives_no_more_than_memory_needed_says(part: str, dtype: torch.dtype) -> None:
    graph = graph_of("plain", part)

    def in_chunks(**options: object) -> TorchRuntime:
        # Small ones, so that the image has several, and schedules differ.
        found = runtime(graph, dtype, **options)
        found.images.machine = dataclasses.replace(found.images.machine, chunk_bytes=2**24)
        return found

    image = noise(1, graph.input_channels, *((1536, 1024) if part == "encoder" else (512, 768)))
    image = image.cuda()
    free = in_chunks()
    result, most = peak(free, image)  # the first run loads libraries
    assert most <= free.memory_needed(tuple(image.shape))
    search = free.images.search(tuple(image.shape))
    tradeoffs = search.tradeoffs()
    assert len(tradeoffs) > 1
    for sketch in tradeoffs[1::3]:
        program = free.images.lowered(search.recomputing(sketch.recomputed), search)
        limit = program.bytes + free.images.result_bytes(tuple(image.shape))
        limited = in_chunks(memory_limit=limit)
        found, most = peak(limited, image)
        assert most <= limited.memory_needed(tuple(image.shape)) <= limit
        assert relative_l2(found, result) < ERRORS[dtype]


def test_tensors_stay_where_the_caller_has_them() -> None:
    graph = graph_of("plain", "decoder")
    found, image = runtime(graph), noise(2, 4, 16, 16)
    expected = found.run(image)
    assert expected.device.type == "cpu"
    there = found.run(image.cuda())
    assert there.is_cuda and torch.equal(there.cpu(), expected)
    for device in ("cpu", "cuda"):
        out = torch.empty(expected.shape, device=device)
        assert found.run(image.cuda(), out) is out and torch.equal(out.cpu(), expected)
    levels = found.run(image.cuda(), levels=True)
    assert levels.is_cuda and torch.equal(levels, levels_of(there))


def test_a_program_that_runs_again_is_recorded() -> None:
    graph = graph_of("plain", "decoder")
    found = runtime(graph)
    images = [noise(1, 4, 32, 32, seed=n).cuda() for n in range(5)]
    expected = [runtime(graph).run(image) for image in images]
    for _ in range(2):
        for image, result in zip(images, expected, strict=True):
            assert torch.equal(found.run(image), result)
    program = found.planned((1, 4, 32, 32))
    assert list(found._recordings._kept) == [program]
    recording = found._recordings.begin(program)
    assert recording is not None  # a run beside this one launches its steps
    assert torch.equal(found.run(images[0]), expected[0])
    recording.end()
    found.save_memory(slicing=False, tiling=True)
    assert not found._recordings._kept
    assert torch.equal(found.run(images[0]), expected[0])


def test_recordings_give_way_to_the_memory_limit() -> None:
    graph = graph_of("plain", "decoder")
    small, large = noise(1, 4, 16, 16).cuda(), noise(1, 4, 128, 128).cuda()
    needed = runtime(graph).memory_needed(tuple(large.shape))
    found = runtime(graph, memory_limit=needed)
    for _ in range(3):
        found.run(small)
    assert len(found._recordings._kept) == 1
    found.run(large)
    assert not found._recordings._kept


def test_a_run_takes_the_stream_of_its_thread() -> None:
    graph = graph_of("plain", "decoder")
    found = runtime(graph)
    images = [noise(1, 4, 32, 32, seed=n).cuda() for n in range(4)]
    expected = [found.run(image) for image in images]
    results: dict[int, torch.Tensor] = {}
    torch.cuda.synchronize()

    def work(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[n] = found.run(images[n])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[n], expected[n]) for n in range(4))


def test_runs_from_the_host_to_the_host_have_streams_of_their_own() -> None:
    found, image = runtime(graph_of("plain", "decoder")), noise(1, 4, 32, 32)
    streams = []

    def on_rows(first: int, rows: torch.Tensor) -> None:
        streams.append(torch.cuda.current_stream())

    expected = found.run(image.cuda(), on_rows=on_rows).cpu()
    assert set(streams) == {torch.cuda.default_stream()}
    streams.clear()
    for _ in range(3):
        assert torch.equal(found.run(image, on_rows=on_rows), expected)
    assert len(set(streams)) == 1
    assert torch.cuda.default_stream() not in streams


def test_what_float16_cannot_hold_is_computed_again_in_bfloat16() -> None:
    graph, image = beyond_range(), noise(2, 4, 16, 16).cuda()
    with pytest.warns(RuntimeWarning, match="beyond the range of float16"):
        result = runtime(graph, torch.float16).run(image)
    assert relative_l2(result, evaluate(graph, image.cpu())) < 0.05


def test_a_profile_has_the_time_of_every_step() -> None:
    found = runtime(graph_of("plain", "decoder"), activate_profiler=True)
    found.run(noise(1, 4, 64, 64))
    (profile,) = found.profiles
    assert all(step.seconds > 0 for step in profile.steps)


def test_a_timeout_ends_a_run_soon() -> None:
    found = runtime(graph_of("plain", "decoder"), timeout=1e-4)
    with pytest.raises(TimeoutError):
        found.run(noise(1, 4, 512, 512).cuda())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_that_of_diffusers(dtype: str) -> None:
    vae = default_vae()
    model = RBLNAutoencoderKL.from_model(vae, rbln_target="cuda", rbln_dtype=dtype)
    latent = noise(1, 4, 16, 24)
    with torch.no_grad():
        expected = vae.decode(latent).sample
    found = model.decode(latent.cuda()).sample
    assert found.is_cuda
    assert relative_l2(found.cpu(), expected) < 2 * ERRORS[getattr(torch, dtype)]


def test_a_model_is_where_its_gpu_is_and_writes_to_either_side() -> None:
    model = RBLNAutoencoderKL.from_model(default_vae(), rbln_target="cuda")
    latent = noise(1, 4, 16, 24)
    assert model.device.type == "cuda"
    expected = model.decode(latent).sample
    for device in ("cpu", "cuda"):
        out = torch.empty(expected.shape, device=device)
        model.decode(latent, out=out)
        assert torch.equal(out.cpu(), expected)
