"""Which frames of videos pass through windows of rows, instead of being whole."""

from __future__ import annotations

import functools

import pytest
import tiny_vaes
from graphs import over_frames
from hypothesis import given, settings
from hypothesis import strategies as st

from rbln_vae.graph.ir import Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.models.wan_frames import VideoPart
from rbln_vae.schedule import problem
from rbln_vae.schedule.problem import Problem
from rbln_vae.schedule.schedule import Kind
from rbln_vae.schedule.scheduler import droppable, make_schedule
from rbln_vae.targets.cpu.rules import CpuRules
from rbln_vae.targets.cpu.runtime import CpuRuntime

PARTS = ("decoder", "encoder")


@functools.cache
def part_of(part: str) -> Graph:
    vae = tiny_vaes.make("AutoencoderKLWan", base_dim=8, dim_mult=[1, 2, 2])
    return optimise(VideoPart(vae, part).graph())


@functools.cache
def runtime_of(part: str) -> CpuRuntime:
    return CpuRuntime(part_of(part), dtype="float32", num_threads=2)


def problem_of(graph: Graph, part: str, *size: int) -> Problem:
    shape = (1, graph.input_channels, *size)
    return Problem(graph, shape, CpuRules(graph, shape, runtime_of(part).machine))


def full_size(made: Problem) -> int:
    """The bytes of a stack of frames that have the size of the video."""
    graph = made.graph
    value = graph.inputs[0] if graph.name == "encoder" else graph.outputs[0]
    return 4 * made.bytes_of(value)


@pytest.mark.parametrize("part", PARTS)
def test_frames_of_the_size_of_the_video_pass_in_one_sweep(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (16, 16) if part == "decoder" else (64, 64)
    whole = problem_of(part_of(part), part, *size)
    assert not whole.passing
    monkeypatch.setattr(problem, "PASSING_BYTES", full_size(whole))
    passing = problem_of(part_of(part), part, *size).passing
    heights = {whole.heights[value] for value in passing}
    assert heights == {64} and all(whole.shapes[value][0] == 4 for value in passing)
    # It ends where the frames leave the network, or are halved.
    (target,) = set(passing.values())
    assert target == (
        "decoder.conv_out.sum@0" if part == "decoder" else "encoder.down_blocks.1.resample.1@0"
    )
    # Where the images are halved or doubled, another sweep begins.
    monkeypatch.setattr(problem, "PASSING_BYTES", 0)
    assert len(set(problem_of(part_of(part), part, *size).passing.values())) > 1


def test_frames_that_others_read_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "PASSING_BYTES", 0)
    stacked = over_frames(4, residual=True)
    passing = problem_of(stacked, "decoder", 9, 7).passing
    # What is added while the result is made, but not the result, whose frames are given away.
    assert passing == {"made residual": "made"}
    assert not problem_of(stacked.start, "decoder", 9, 7).passing


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(PARTS), st.integers(4, 40), st.integers(1, 12), st.data())
def test_a_sketch_knows_their_memory_and_their_place_in_the_state(
    part: str, height: int, width: int, data: st.DataObject
) -> None:
    graph = part_of(part)
    if part == "encoder":
        height, width = 4 * height, 4 * width
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "PASSING_BYTES", 0)
        made = problem_of(graph, part, height, width)
        assert made.passing
    kept = droppable(graph).difference(made.passing, made.passing.values())
    choice = data.draw(st.sets(st.sampled_from(sorted(kept)))) if kept else set()
    schedule, sketch = (make_schedule(made, choice, sketch=each) for each in (False, True))
    assert sketch.arena_bytes == schedule.arena_bytes
    assert sketch.flops == pytest.approx(schedule.flops, rel=1e-3)
    # Each row of each frame that is left comes to its place once, in order.
    rows: dict[str, int] = {}
    for task in schedule.tasks:
        if task.kind is Kind.COPY and task.sweep:
            assert task.rows[0] == rows.get(task.value, 0)
            rows[task.value] = task.rows[1]
    assert rows and all(end == made.heights[value] for value, end in rows.items())
