"""What a model does when memory, sizes or numbers are out of the ordinary, and after many runs.

What is asked of the memory of a whole process runs in a process of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from processes import in_a_process
from vaes import capture_part, compile_vae, make_vae

from rbln_vae import RBLNAutoencoderKL, _engine
from rbln_vae.artifact import Artifact
from rbln_vae.graph.ir import Conv2d, Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.targets.cpu.packing import pack
from rbln_vae.targets.cpu.runtime import CpuRuntime


@pytest.fixture(scope="module")
def decoder() -> Graph:
    vae = make_vae(block_out_channels=(16, 48), norm_num_groups=8)
    return optimise(capture_part(vae, "decoder"))


@pytest.fixture(scope="module")
def file(decoder: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.rbln"
    Artifact(decoder, "cpu", "float32").save(path)
    return path


PRELUDE = """
import json, random, resource, sys, threading, torch
from pathlib import Path
from rbln_vae.artifact import read_artifact
from rbln_vae.targets.cpu.runtime import CpuRuntime

def memory(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(name + ":")[2].split()[0])

graph = read_artifact(Path(sys.argv[1])).graph
"""


# Many runs

SOAK = """
threads, runs = int(sys.argv[2]), int(sys.argv[3])
native = CpuRuntime(graph, num_threads=2)
sizes = [(1 + n % 2, 4, 2 + n % 9, 2 + n % 13) for n in range(234)]
largest = (2, 4, 10, 14)
meeting = threading.Barrier(threads)
taken, failures = [], []

def work(number):
    generator = random.Random(number)
    # Each thread has the largest arena that it will ever have; then all plans are made.
    meeting.wait()
    try:
        for turn in range(runs // threads):
            if turn == runs // threads // 4:
                if meeting.wait() == 0:
                    taken.append(memory("VmRSS"))
                meeting.wait()
            image = torch.randn(largest if turn < 3 else generator.choice(sizes))
            assert native.run(image).isfinite().all()
    except BaseException as error:
        meeting.abort()
        failures.append(repr(error))

workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
taken.append(memory("VmRSS"))
assert not failures, failures
print(json.dumps({"taken": taken, "plans": native.forget_plans()}))
"""


def check_soak(file: Path, runs: int) -> None:
    result = in_a_process(PRELUDE + SOAK, file, 4, runs)
    before, after = result["taken"]
    # More sizes than plans are kept for, or nothing would ever have been thrown away.
    assert result["plans"] == 64
    assert after < 1.02 * before


@pytest.mark.slow
def test_memory_stays_flat_over_runs_of_changing_sizes(file: Path) -> None:
    check_soak(file, 400)


@pytest.mark.slow
def test_memory_stays_flat_over_many_runs_of_changing_sizes(file: Path) -> None:
    check_soak(file, 4000)


# Memory that isn't there


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_that_is_loaded_copies_no_weights(tmp_path: Path, dtype: str) -> None:
    vae = make_vae(block_out_channels=(16, 48), norm_num_groups=8)
    compile_vae(vae, dtype=dtype).save_pretrained(tmp_path)
    model = RBLNAutoencoderKL.from_pretrained(tmp_path)
    for part, compiled in model.compiled_models.items():
        native = model._runtimes[part]
        assert isinstance(native, CpuRuntime) and isinstance(compiled, Artifact)
        assert compiled.packed
        for name, tensor in compiled.packed.items():
            # Single numbers don't fill a cache line.
            assert native._packed[name] is tensor or tensor.numel() == 1


def test_weights_may_lie_anywhere_in_memory(decoder: Graph) -> None:
    def astride(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
        start = next(n for n in range(1, 64) if room[n:].data_ptr() % 64 == 8)
        return room[start : start + tensor.numel()].copy_(tensor.view(-1)).view(tensor.shape)

    image = torch.randn(1, 4, 9, 7)
    for dtype in ("float32", "float16", "bfloat16"):
        packed = pack(decoder, dtype)
        moved = {name: astride(tensor) for name, tensor in packed.items()}
        found = CpuRuntime(decoder, moved, dtype=dtype).run(image)
        assert torch.equal(found, CpuRuntime(decoder, packed, dtype=dtype).run(image))


OVERFLOWS = """
native = CpuRuntime(graph, num_threads=2)
unlimited = CpuRuntime(graph, num_threads=2, memory_limit=2**100)
native.run(torch.randn(1, 4, 8, 8))
# The search for what to advise, which each model makes once, takes some memory.
try: native.memory_needed((1, 4, 2**20, 2**20))
except MemoryError: pass
before, answers = memory("VmPeak"), []
# Products that are beyond 2**63, or come round to a small number.
sides = [1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 + 1, 2**63, 2**65]
for batch in (1, 3, 2**31, 2**63):
    for height in sides:
        for width in sides:
            if batch * height * width < 2**50: continue
            for runtime in (native, unlimited):
                try:
                    runtime.memory_needed((batch, 4, height, width))
                    answers.append("none")
                except (MemoryError, ValueError) as error:
                    answers.append(type(error).__name__ if str(error) else "no message")
grown = memory("VmPeak") - before
assert native.run(torch.randn(1, 4, 8, 8)).isfinite().all()
print(json.dumps({"answers": answers, "grown": grown}))
"""


@pytest.mark.slow
def test_sizes_beyond_any_memory_are_refused_before_it_is_asked_for(file: Path) -> None:
    result = in_a_process(PRELUDE + OVERFLOWS, file)
    assert len(result["answers"]) > 250
    assert set(result["answers"]) <= {"MemoryError", "ValueError"}
    assert result["grown"] < 2**24


ADDRESS_SPACE = """
# What one thread of the allocator reserves for itself is not what is looked for.
native = CpuRuntime(graph, num_threads=1)
shape = (1, 4, 128, 128)
small = torch.randn(1, 4, 8, 8)
expected = native.run(small)
result = torch.Size(native.planned(shape).program.schedule.output_shape)
needed = native.memory_needed(shape) - 4 * result.numel()
answers = []
for dtype in (torch.float32, torch.float64):
    image = torch.randn(shape, dtype=dtype)
    for share in (0.001, 0.01, 0.3, 0.9, 1.1, 8.0):
        native.release_memory()
        limit = memory("VmSize") + int(share * needed)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            native.run(image)
            answers.append([share, None])
        except MemoryError as error:
            answers.append([share, str(error)])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert torch.equal(native.run(small), expected)
print(json.dumps({"needed": needed, "answers": answers}))
"""


@pytest.mark.slow
def test_memory_that_can_not_be_had_is_an_error_and_the_model_stays_usable(file: Path) -> None:
    result = in_a_process(PRELUDE + ADDRESS_SPACE, file)
    for share, message in result["answers"]:
        # A run takes images in and out besides, and alignment.
        if share < 1:
            assert message is not None
        if share > 2:
            assert message is None
        assert message is None or re.search(r"the system has no [\d,.]+ [KMG]iB", message, re.I)
    needed = f"{result['needed'] // 2**20 + 1} MiB for this run"
    assert any(needed in message for _, message in result["answers"] if message)


# Numbers

KERNELS = [(k.isa, k.dtype) for k in _engine.all_kernels() if k.isa != "generic"] or [
    (k.isa, k.dtype) for k in _engine.all_kernels()
]


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
def test_denormals_count_as_zero_in_a_run_and_nowhere_else(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arithmetic on them takes a hundred times as long where they don't."""
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    weight = torch.eye(4)[:, :, None, None]
    graph = Graph("copy", ("x",), 4, ("y",), (Conv2d("y", "x", "w", None),), {"w": weight})
    native = CpuRuntime(graph, dtype=dtype, num_threads=2)
    image = torch.full((2, 4, 64, 64), 1e-40)
    assert native.run(image).count_nonzero() == 0
    # Denormals of float16 are no denormals of float32, in which they are converted.
    larger = 1e-6 if dtype == "float16" else 1e-30
    assert native.run(image / 1e-40 * larger).count_nonzero() == image.numel()
    assert (image * 1.0).count_nonzero() == image.numel()


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stays_visible(
    part: str, isa: str, dtype: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    graph = optimise(capture_part(make_vae(), part))
    native = CpuRuntime(graph, dtype=dtype)
    image = torch.randn(2, graph.input_channels, 16, 12)
    image[0, -1, 3, 5] = value
    found = native.run(image)
    # Norms and attention carry it to every pixel of its sample, and to no other sample.
    assert found[0].isnan().all()
    assert torch.equal(found[1:], native.run(image[1:]))
