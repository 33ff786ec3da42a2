"""The engine reads and writes levels of pictures, from any strides and in any strips."""

from __future__ import annotations

import functools
import itertools

import pytest
import tiny_vaes
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vaes import capture_part, make_vae

from rbln_vae import RBLNAutoencoderTiny, _engine
from rbln_vae.graph.capture import capture
from rbln_vae.graph.ir import Graph, Identity
from rbln_vae.graph.passes import optimise
from rbln_vae.levels import levels_of, sample_of
from rbln_vae.targets.cpu.runtime import CpuRuntime

BOUNDARIES = [x for level in range(256) for x in ((level - 0.5) / 127.5 - 1, level / 127.5 - 1)]
"""Where the level changes, and where it is meant exactly."""


@functools.cache
def copying(dtype: str = "float32", channels: int = 1) -> CpuRuntime:
    """A runtime that gives its input, rounded to a dtype."""
    graph = Graph("decoder", ("x",), channels, ("y",), [Identity("y", "x")], {})
    return CpuRuntime(graph, dtype=dtype, num_threads=2)


@functools.cache
def decoder() -> Graph:
    return optimise(capture_part(make_vae(block_out_channels=(8, 16)), "decoder"))


@functools.cache
def decoder_in_strips() -> Graph:
    """One whose last rows are computed in strips if memory is to be saved."""
    vae = tiny_vaes.make("AutoencoderTiny")
    return optimise(capture(RBLNAutoencoderTiny.family.module(vae, "decoder"), "decoder", 4))


def levels(runtime: CpuRuntime, image: Tensor, **options: object) -> Tensor:
    return runtime.run(image, levels=True, **options)  # type: ignore[arg-type]


def from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32).view(1, 1, 1, -1)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_any_number_is_shown_as_by_the_definition(bits: list[int]) -> None:
    image = from_bits(torch.tensor(bits))
    assert torch.equal(levels(copying(), image), levels_of(image))


@given(st.sampled_from(BOUNDARIES), st.integers(-(2**12), 2**12))
def test_numbers_near_the_next_level_are_rounded_as_by_the_definition(
    number: float, distance: int
) -> None:
    first = torch.tensor([number]).view(torch.int32).long() + distance
    image = from_bits(first + torch.arange(64))
    assert torch.equal(levels(copying(), image), levels_of(image))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_shown_as_the_result_of_its_dtype(
    dtype: torch.dtype, stored: str
) -> None:
    image = torch.arange(-(2**15), 2**15).short().view(dtype).view(1, 1, 256, 256)
    runtime = copying(stored)
    assert torch.equal(levels(runtime, image), levels_of(runtime.run(image)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_level_is_read_as_by_the_definition(dtype: str) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = copying(dtype).run(image)
    assert found.dtype == torch.float32
    assert torch.equal(found, copying(dtype).run(sample_of(image)))


@pytest.mark.parametrize("channels", [1, 3, 4, 33])
def test_levels_have_any_strides(channels: int) -> None:
    runtime, size = copying(channels=channels), (2, channels, 5, 7)
    image = torch.rand(size) * 3 - 1.5
    expected = levels_of(image)
    found = levels(runtime, image)
    assert torch.equal(found, expected)
    assert found.permute(0, 2, 3, 1).is_contiguous()
    wide = torch.zeros(2, 6, channels + 2, 9, dtype=torch.uint8)
    out = wide[:, :5, 1:-1, 2:].transpose(1, 2)
    assert levels(runtime, image, out=out) is out
    assert torch.equal(out, expected)
    assert wide.sum() == expected.sum()
    assert torch.equal(runtime.run(out), sample_of(out.contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_with_values_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    runtime, image = copying(channels=3), torch.zeros(4, 3, 6, 5, dtype=dtype)
    image[1, 2, 5, 4] = value
    image[3, 0, 0, 0] = value
    finite = torch.zeros(4, dtype=torch.bool)
    found = levels(runtime, image, finite=finite)
    assert finite.tolist() == [True, False, True, False]
    assert torch.equal(found, levels_of(image))


def test_a_value_beyond_the_dtype_of_the_result_is_not_finite() -> None:
    image = torch.full((1, 1, 2, 2), 3e38).bfloat16()
    finite = torch.zeros(1, dtype=torch.bool)
    levels(copying(), image, finite=finite)
    assert finite.item()
    levels(copying(), image * 10, finite=finite)
    assert not finite.item()


def test_levels_and_floats_are_what_was_asked_for() -> None:
    image = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"expected torch\.uint8"):
        levels(copying(), image, out=torch.empty(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        copying().run(image, torch.empty(1, 1, 2, 2, dtype=torch.uint8))


def test_the_engine_refuses_flags_for_other_images() -> None:
    image = _engine.Image(channels=1, height=1, width=1, row=1, sample=1)
    plan = _engine.Plan(_engine.all_kernels()[-1], 128, (1, 1, 1, 1), (1, 1, 1, 1))
    plan.add(_engine.ExportStep(image=image))
    tensor, flags = torch.zeros(1, 1, 1, 1), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="each image"):
        _engine.Executor(1).run(plan, [tensor], [tensor.byte()], 60.0, None, False, None, flags)


# Memory, and rows as they are finished


def test_levels_take_a_quarter_of_the_limit_that_floats_take() -> None:
    image = torch.rand(1, 4, 48, 32)
    whole = CpuRuntime(decoder(), dtype="float32", num_threads=2)
    whole.save_memory(slicing=False, tiling=True)
    least = whole.memory_needed(tuple(image.shape))
    saved = 3 * 3 * 96 * 64
    runtime = CpuRuntime(decoder(), dtype="float32", num_threads=2, memory_limit=least - saved)
    with pytest.raises(MemoryError):
        runtime.run(image)
    found = levels(runtime, image)
    assert torch.equal(found, levels_of(whole.run(image)))
    with pytest.raises(MemoryError):
        levels(
            CpuRuntime(decoder(), dtype="float32", num_threads=2, memory_limit=least - saved - 1),
            image,
        )


@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_come_once_and_from_the_top_when_they_are_finished(batch: int, tiling: bool) -> None:
    runtime = CpuRuntime(decoder_in_strips(), dtype="float32", num_threads=2)
    runtime.save_memory(slicing=False, tiling=tiling)
    image = torch.rand(batch, 4, 64, 32)
    expected, seen = levels_of(runtime.run(image)), list[tuple[int, int]]()

    def on_rows(first: int, rows: Tensor) -> None:
        seen.append((first, rows.shape[2]))
        assert torch.equal(rows, expected[:, :, first : first + rows.shape[2]])

    out = torch.full_like(expected, 7)
    levels(runtime, image, out=out, on_rows=on_rows)
    assert torch.equal(out, expected)
    ends = list(itertools.accumulate(rows for _, rows in seen))
    assert [first for first, _ in seen] == [0, *ends[:-1]]
    assert ends[-1] == 512
    assert (len(seen) > 1) == tiling


def test_floats_come_by_rows_too() -> None:
    runtime, image, seen = copying(), torch.rand(1, 1, 4, 4), list[Tensor]()
    found = runtime.run(image, on_rows=lambda first, rows: seen.append(rows))
    assert torch.equal(torch.cat(seen, dim=2), found)


def test_what_a_callback_raises_ends_the_run() -> None:
    class OwnError(Exception):
        pass

    def on_rows(first: int, rows: Tensor) -> None:
        calls.append(first)
        raise OwnError

    runtime, calls = CpuRuntime(decoder_in_strips(), dtype="float32", num_threads=2), list[int]()
    runtime.save_memory(slicing=False, tiling=True)
    image = torch.rand(1, 4, 64, 32)
    with pytest.raises(OwnError):
        levels(runtime, image, on_rows=on_rows)
    assert calls == [0]
    runtime.save_memory(slicing=False, tiling=False)
    assert torch.equal(levels(runtime, image), levels_of(runtime.run(image)))


def test_a_callback_may_run_the_model() -> None:
    runtime, image = CpuRuntime(decoder(), dtype="float32", num_threads=2), torch.rand(1, 4, 8, 8)
    expected, found = runtime.run(image), list[Tensor]()
    levels(runtime, image, on_rows=lambda first, rows: found.append(runtime.run(image)))
    assert torch.equal(found[0], expected)
