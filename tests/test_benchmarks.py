"""The benchmarks import each other in one direction, and measure what they say."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import diffusers
import pytest
import tiny_vaes
import torch
from benchmarks import gpu, speed, video
from benchmarks.contenders import DiffusersFloat32, OursFloat32
from benchmarks.kernels import Timing, fit, measure, time_case
from benchmarks.models import MODELS, Model, make_model
from benchmarks.shapes import CONVOLUTIONS
from benchmarks.speed import Measurement

from rbln_vae.metrics import relative_l2
from rbln_vae.targets.cpu.kernels import usable_kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def imports(file: Path) -> set[str]:
    """The modules beside a file that it imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").removeprefix("benchmarks").strip(".")
        if node.level == 1 or (node.module or "").split(".")[0] == "benchmarks":
            found |= {module} if module else {alias.name for alias in node.names}
    return found


def test_no_module_imports_itself_by_way_of_others():
    modules = {file.stem: imports(file) for file in BENCHMARKS.glob("*.py")}
    assert modules["speed"] >= {"report", "worker"}
    TopologicalSorter(modules).prepare()  # raises CycleError


def timing(counts: tuple[float, ...], costs: tuple[float, ...]) -> Timing:
    seconds = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    return Timing(CONVOLUTIONS[0], "definition", seconds, 0, counts)


def test_constants_that_explain_all_times_are_found():
    costs = (1e-9, 24e-9, 6e-9)
    counts = [(1e6, 100.0, 0.0), (1e6, 5000.0, 70.0), (3e3, 20.0, 900.0), (8e9, 1e4, 3e6)]
    assert fit([timing(each, costs) for each in counts]) == pytest.approx(costs)


def test_a_constant_that_no_shape_tells_is_left_out():
    counts = [(1e6, 0.0, 10.0), (1e3, 0.0, 900.0)]
    found = fit([timing(each, (2e-9, 1.0, 8e-9)) for each in counts])
    assert found == [pytest.approx(2e-9), None, pytest.approx(8e-9)]


def test_kernels_are_not_timed_on_instruction_sets_that_are_not_there():
    with pytest.raises(ValueError, match="abacus"):
        measure(["abacus"], ["cases"], 1)


@pytest.mark.parametrize("kernels", usable_kernels(), ids=lambda k: f"{k.isa} {k.dtype}")
def test_kernels_are_timed_by_either_algorithm_where_they_have_both(kernels, monkeypatch):
    monkeypatch.setenv("RBLN_VAE_ISA", kernels.isa)  # so that it is put back, too
    case = next(case for case in CONVOLUTIONS if case.suits_winograd)
    definition = {each.kind for each in time_case(case, kernels, False, 1)}
    assert "definition" in definition
    assert not definition & {"Winograd", "its kernels"}
    if kernels.winograd:
        assert {each.kind for each in time_case(case, kernels, True, 1)} >= {
            "Winograd",
            "its kernels",
        }


def test_noise_takes_no_constant_below_zero_nor_leaves_out_the_others():
    counts = [(1e9, 10.0), (2e9, 1000.0), (4e9, 50.0)]
    timings = [timing(each, (1e-9, 0.0)) for each in counts]
    timings[1] = Timing(CONVOLUTIONS[0], "definition", 1.9, 0, counts[1])
    product, other = fit(timings)
    assert product == pytest.approx(1e-9, rel=0.05)
    assert other is None


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_measured_is_one_of_diffusers(name):
    model = MODELS[name]
    with torch.device("meta"):
        made = getattr(diffusers, model.class_name)(**model.architecture)
    assert set(model.architecture) <= set(made.config)
    assert not any(buffer for buffer, _ in made.named_buffers() if not buffer.startswith("bn."))


@pytest.mark.slow
@pytest.mark.parametrize("class_name", tiny_vaes.DEFAULTS)
def test_contenders_run_the_same_model(class_name, tmp_path):
    make_model(tmp_path, Model(class_name, tiny_vaes.DEFAULTS[class_name]))
    for part in ("decode", "encode"):
        results = []
        for kind in (OursFloat32, DiffusersFloat32):
            contender = kind(tmp_path, part, 32, torch.get_num_threads())
            contender.convert()
            contender.prepare()
            results.append(contender.run())
        found, expected = results
        assert expected.std() > 0.05
        assert relative_l2(found, expected) < 1e-4


def test_a_model_that_is_not_in_the_table_is_not_measured():
    with pytest.raises(ValueError, match="abacus"):
        speed.measure(["abacus"], ["decode"], [64], [], 1)


@pytest.mark.slow
def test_speed_and_error_of_contenders_are_measured_in_processes_of_their_own(monkeypatch):
    tiny = Model("AutoencoderTiny", tiny_vaes.DEFAULTS["AutoencoderTiny"])
    monkeypatch.setitem(MODELS, "tiny", tiny)
    names = ["rbln-vae f32", "diffusers f32"]
    ours, theirs = speed.measure(["tiny"], ["decode"], [64], names, 2)
    assert (ours.contender, theirs.contender) == tuple(names)
    assert len(ours.seconds) == len(theirs.seconds) == 2
    assert ours.memory > 0
    assert theirs.error == 0
    assert ours.error is not None
    assert ours.error < 1e-4


def test_the_table_of_speed_compares_contenders_of_one_precision():
    group = [
        Measurement("wan", "rbln-vae f32", "decode", 512, [1.0, 2.0, 3.0], 10**9, 2e-6),
        Measurement("wan", "diffusers f32", "decode", 512, [8.0], 2 * 10**9, 0.0),
        Measurement("wan", "diffusers bf16", "decode", 512, [5.0], 10**9, 1e-2),
    ]
    *_, ours, theirs, other = speed.table(group).splitlines()
    assert ours == (
        "| wan decode 512² | rbln-vae f32 | 2.000 | 1.000 to 3.000 | 1.00 GB | 2.0e-06 | 1.00 |"
    )
    assert theirs.endswith("| 2.00 GB |  | 4.00 |")
    assert other.endswith("| 1.0e-02 |  |")


@pytest.mark.slow
def test_videos_are_measured_whole_and_frame_by_frame(monkeypatch):
    tiny = Model("AutoencoderKLWan", tiny_vaes.DEFAULTS["AutoencoderKLWan"])
    monkeypatch.setitem(MODELS, "tiny", tiny)
    names = ["rbln-vae f32", "rbln-vae frame by frame bf16", "diffusers f32"]
    whole, streamed, theirs = video.measure("tiny", ["decode"], [(16, 32)], [5], names, 2)
    assert len(whole.seconds) == len(streamed.seconds) == len(theirs.seconds) == 2
    assert whole.error is not None
    assert whole.error < 1e-4
    assert streamed.first is not None
    assert 0 < streamed.first < streamed.seconds[-1]
    assert "decode 16x32, 5 frames | diffusers f32" in video.table([whole, streamed, theirs])


def test_videos_of_a_model_that_is_not_in_the_table_are_not_measured():
    with pytest.raises(ValueError, match="abacus"):
        video.measure("abacus", ["decode"], [(16, 16)], [5], [], 1)


# The benchmark of GPUs, tried out on the CPU


@pytest.mark.slow
def test_every_contender_of_a_gpu_decodes_to_nearly_the_same():
    small = Model("AutoencoderKL", {**MODELS["sd"].architecture, "block_out_channels": (32,) * 4})
    found = gpu.measure([64], "cpu", small, rounds=1, memory_limit="64MiB")
    names = ["rbln-vae", "rbln-vae within 64MiB", "diffusers", "diffusers tiled"]
    assert [each.contender for each in found] == names
    assert all(each.seconds > 0 and 0 < each.error < 0.1 for each in found)
    assert found[0].error == found[1].error
    text = gpu.table(found)
    assert text.count("\n") == 5 and "not counted" in text


def test_a_contender_without_enough_memory_is_a_line_of_the_table():
    def fails():
        raise MemoryError("too little")

    latent, exact = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64)
    found = gpu._time("diffusers", "bfloat16", fails, latent, exact, "cpu", 1)
    assert "| diffusers | bfloat16 | no memory: too little |" in gpu.row(found)


def test_torch_compile_and_float16_are_measured_where_they_tell_something():
    def names(size):
        return [(n, d) for n, d, _ in gpu._contenders(Path(), "cuda", size, None)]

    assert ("torch.compile", "bfloat16") in names(512)
    assert ("torch.compile", "bfloat16") not in names(2048)
    assert ("rbln-vae", "float16") in names(1024)
    assert ("rbln-vae", "float16") not in names(4096)
