"""Triton's kernels do what PyTorch's do, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import evaluate, graph_of_every_kind
from hypothesis import given, settings
from hypothesis import strategies as st
from test_torch_runtime import GRAPHS, graph_of, image_for
from vaes import noise

from rbln_vae.graph.ir import ACTIVATIONS, Graph
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.base import RuntimeOptions
from rbln_vae.targets.torch import kernels
from rbln_vae.targets.torch.kernels import Reading
from rbln_vae.targets.torch.planner import TorchPlanner
from rbln_vae.targets.torch.runtime import TorchRuntime
from rbln_vae.targets.torch.weights import Weights

fused = pytest.importorskip(
    "rbln_vae.targets.torch.fused", reason="there is no Triton for this machine"
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="Triton compiles for the GPU; without it (CUDA_VISIBLE_DEVICES=) it interprets",
)

ERROR = 1e-6
CPU = torch.device("cpu")


def picture(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return noise(*shape).to(dtype, memory_format=torch.channels_last)


def strip(image: torch.Tensor) -> torch.Tensor:
    """The rows of an image in a larger one, with others between its images."""
    batch, channels, height, width = image.shape
    around = torch.full(
        (batch, channels, height + 5, width), torch.nan, dtype=image.dtype
    ).contiguous(memory_format=torch.channels_last)
    rows = around[:, :, 2 : 2 + height]
    return rows.copy_(image)


@settings(max_examples=25)
@given(
    st.integers(1, 2),
    st.sampled_from((3, 8, 20, 130)),
    st.integers(1, 5),
    st.integers(1, 40),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.sampled_from((None, *ACTIVATIONS)),
    st.sampled_from(("", "group norm", "pixel norm")),
    st.sampled_from((torch.float32, torch.float16)),
)
def test_images_are_read_alike(
    batch: int,
    channels: int,
    height: int,
    width: int,
    padding: tuple[int, int, int, int],
    activation: str | None,
    norm: str,
    dtype: torch.dtype,
) -> None:
    image = strip(picture(batch, channels, height, width, dtype=dtype))
    reading = Reading(activation=activation)
    if norm == "group norm":
        both = noise(batch, 2, channels, 1, 1)
        reading = dataclasses.replace(reading, scale=both[:, 0], shift=both[:, 1])
    elif norm:
        weight = noise(1, channels, 1, 1)
        reading = dataclasses.replace(reading, pixel_weight=weight, eps=1e-6)
    expected = kernels.read(image, reading, padding)
    found = fused.read(image, reading, padding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(found, expected) < (ERROR if dtype == torch.float32 else 1e-3)


@settings(max_examples=25)
@given(
    st.integers(1, 2),
    st.sampled_from((3, 16, 130)),
    st.integers(1, 4),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from((None, "silu")),
)
def test_images_are_written_alike(
    batch: int,
    channels: int,
    height: int,
    width: int,
    biased: bool,
    added: bool,
    activation: str | None,
) -> None:
    result = picture(batch, channels, height, width)
    bias = noise(channels) if biased else None
    residual = strip(picture(batch, channels, height, width)) if added else None
    expected, found = torch.empty_like(result), strip(torch.empty_like(result))
    expected_sums = torch.empty(batch, height, 2, channels)
    for row in range(height):
        rows = slice(row, row + 1)
        kernels.write(
            result[:, :, rows].clone(),
            expected[:, :, rows],
            bias,
            None if residual is None else residual[:, :, rows],
            activation,
            expected_sums[:, rows],
        )
    sums = torch.empty(batch, height + 3, 2, channels)[:, 1 : 1 + height]
    fused.write(result, found, bias, residual, activation, sums)
    assert relative_l2(found, expected) < ERROR
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=1e-4)
    again = torch.empty(batch, height, 2, channels)
    fused.sum_up(found, again)
    torch.testing.assert_close(again, expected_sums, rtol=1e-4, atol=1e-4)


def test_a_sum_may_be_written_over_its_residual() -> None:
    result, image = picture(1, 8, 3, 5), picture(1, 8, 3, 5)
    expected = result + image
    fused.write(result, image, None, image)
    assert torch.equal(image, expected)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    image = picture(1, 8, 2, 300) + 1e4
    sums = torch.empty(1, 2, 2, 8)
    fused.sum_up(image, sums)
    exact = image.double()
    squares = (exact - exact.mean(3, keepdim=True)).square().sum(3)
    assert relative_l2(sums[:, :, 1], squares.transpose(1, 2)) < 1e-5


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.integers(1, 2),
    st.sampled_from(((1, 5), (4, 12), (32, 64), (2, 130))),
    st.integers(1, 600),
)
def test_norms_have_the_same_coefficients(batch: int, members: tuple[int, int], parts: int) -> None:
    groups, channels = members
    sums = noise(batch, parts, 2, channels)
    sums[:, :, 1].square_()
    counts = torch.arange(1, parts + 1, dtype=torch.float64)
    weight, bias = noise(channels), noise(channels)
    expected, found = torch.empty(2, batch, 2, channels)
    kernels.coefficients(sums, counts, groups, 1e-6, weight, bias, expected)
    fused.coefficients(sums, counts, groups, 1e-6, weight, bias, found)
    assert relative_l2(found, expected) < 1e-5


@pytest.mark.parametrize("columns", [1, 7, 2048, 5000])
def test_the_softmax_is_that_of_pytorch(columns: int) -> None:
    scores = 300 * noise(3, 4, columns)
    found = torch.empty_like(scores)
    fused.softmax(scores, 0.1, found)
    assert relative_l2(found, (0.1 * scores).softmax(-1)) < 1e-5


def test_attention_is_that_of_pytorch() -> None:
    queries, keys, values = noise(2, 3, 5, 8), noise(2, 3, 70, 8), noise(2, 3, 70, 8)
    expected = kernels.attend(queries, keys, values, 0.3)
    assert relative_l2(fused.attend(queries, keys, values, 0.3), expected) < 1e-5


def runtime(graph: Graph, **options: object) -> TorchRuntime:
    found = TorchRuntime(graph, torch.float32, "cpu", RuntimeOptions(**options))
    machine = dataclasses.replace(found.machine, chunk_rows=4, fused=True)
    found.images = TorchPlanner(graph, machine, Weights(graph, machine))
    return found


def test_every_operation_gives_what_the_interpreter_gives() -> None:
    graph = graph_of_every_kind()
    image = noise(2, graph.input_channels, 16, 24)
    assert relative_l2(runtime(graph).run(image), evaluate(graph, image)) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("name, part", GRAPHS)
def test_a_model_gives_what_the_interpreter_gives_whatever_the_memory(name: str, part: str) -> None:
    graph = graph_of(name, part)
    image = image_for(graph, part)[..., :16, :16]
    free = runtime(graph)
    expected = free.run(image)
    assert relative_l2(expected, evaluate(graph, image)) < 5e-6
    search = free.images.search(image.shape)
    least = free.images.lowered(search.recomputing(search.tradeoffs()[-1].recomputed), search)
    limited = runtime(graph, memory_limit=least.bytes + free.images.result_bytes(image.shape))
    assert torch.equal(limited.run(image), expected)


@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    printed = printed_by("compile_fused.py", tmp_path)
    assert printed.count("_kernel 90 bf16") == printed.count("_kernel 75 fp16") == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in GRAPHS))
def test_a_rehearsal_compiles_all_that_a_run_calls(name: str, tmp_path: Path) -> None:
    rehearsed, after_a_run = map(int, printed_by("rehearse_fused.py", tmp_path, name).split())
    assert 0 < rehearsed == after_a_run


def printed_by(script: str, cache: Path, *arguments: str) -> str:
    """What a script prints that compiles with Triton."""
    variables = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_that_do_not_run_are_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fused.works(CPU)

    def fails(*_: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused, "apply", fails)
    fused.works.cache_clear()
    assert not fused.works(CPU)
    assert "no C compiler" in caplog.text
    fused.works.cache_clear()
