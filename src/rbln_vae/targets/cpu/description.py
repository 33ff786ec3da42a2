"""Says what a run by the engine takes, for a reader: memory, work and time."""

from __future__ import annotations

from collections.abc import Iterable

from ...graph.ir import Shape
from ...sizes import format_size
from ...units import format_bytes, format_seconds
from ..graph_runtime import Streams
from ..stream import frame_shape
from .kept import Bound
from .planner import CpuPlanner
from .program import Step


def describe_images(planner: CpuPlanner, bound: Bound, shape: Shape, *, steps: bool) -> str:
    """What a run of images takes, and what others would take.

    Args:
        planner: Of the graph.
        bound: What runs.
        shape: `(N, C, H, W)` of the input.
        steps: Whether to list its steps, too.
    """
    result = planner.result_bytes(shape)
    schedule, kept = bound.program.schedule, bound.kept_bytes
    parts = schedule.parts_of(shape[0])
    lines = [
        _title(planner, format_size(shape)),
        f"memory      {format_bytes(bound.bytes + kept + result)}: "
        f"{format_bytes(schedule.arena_bytes)} for activations, "
        f"{format_bytes(bound.bytes - schedule.arena_bytes)} for threads, "
        + (f"{format_bytes(kept)} for kept kernels, " if kept else "")
        + f"{format_bytes(result)} for the result",
        f"work        {parts * schedule.flops / 1e12:.3f} TFLOP, "
        f"{schedule.extra_work:.1%} of it extra"
        + (f", in {parts} parts of the batch" if parts > 1 else ""),
        f"time        {_time(planner, bound.beside_kept if kept else bound.steps, parts)}",
        "",
        f"{'memory':>14} {'extra work':>11} {'time':>14}  computed again, in strips",
    ]
    for other in planner.tradeoffs(shape):
        schedule = other.program.schedule
        parts = schedule.parts_of(shape[0])
        again = ", ".join(schedule.recomputed) or "nothing"
        rows = [(other.bytes, other.steps, again)]
        if other.kept_bytes and not schedule.recomputed:
            most = other.bytes + other.kept_bytes
            rows = [(most, other.beside_kept, again), (*rows[0][:2], "transformed kernels")]
        for needed, taken, again in rows:
            memory, time = format_bytes(needed + result), _time(planner, taken, parts)
            lines.append(f"{memory:>14} {schedule.extra_work:>11.1%} {time:>14}  {again}")
    return "\n".join([*lines, "", bound.program.describe()] if steps else lines)


def describe_videos(
    streams: Streams[Bound],
    planner: CpuPlanner,
    shape: Shape,
    seconds: float | None,
    *,
    steps: bool,
) -> str:
    """What a stream of videos takes.

    Args:
        streams: Runs videos.
        planner: Of either graph.
        shape: `(N, C, T, H, W)` of the input.
        seconds: The time that all runs take, if known.
        steps: Whether to list the steps of the runs, too.
    """
    frame = frame_shape(shape)
    bounds, chunks = streams.fitted(frame), streams.chunks(frame)
    state, least = streams.state_bytes(frame), streams.memory_needed(frame)
    count = chunks.given[0] + chunks.later_runs(shape[2]) * chunks.given[1]
    lines = [
        _title(planner, f"{shape[2]} frames of {format_size(frame)}"),
        f"memory      {format_bytes(least)} for any number of frames: {format_bytes(state)} "
        f"for state, {format_bytes(least - state - chunks.result_bytes)} for activations and "
        f"threads, {format_bytes(chunks.result_bytes)} for {chunks.given[1]} frames of the "
        "result",
    ]
    for name, bound, given in zip(("first", "later"), bounds, chunks.given, strict=True):
        lines.append(
            f"{name:<12}{given} of {count} frames in "
            f"{bound.program.schedule.flops / 1e12:.3f} TFLOP, {_time(planner, bound.steps)}"
        )
    lines.append(f"time        {'not known' if seconds is None else format_seconds(seconds)}")
    if steps:
        lines += [f"\n{bound.program.describe()}" for bound in bounds]
    return "\n".join(lines)


def _title(planner: CpuPlanner, size: str) -> str:
    machine = planner.machine
    return (
        f"{planner.graph.name} on {size}, {machine.dtype}, {machine.isa}, {machine.threads} threads"
    )


def _time(planner: CpuPlanner, steps: Iterable[Step], runs: int = 1) -> str:
    seconds = planner.seconds(steps, runs)
    return "not known" if seconds is None else f"about {format_seconds(seconds)}"
