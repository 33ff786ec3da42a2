"""Says what a run by PyTorch's kernels takes, for a reader: memory and work."""

from __future__ import annotations

from ...graph.ir import Shape
from ...sizes import format_size
from ...units import format_bytes
from ..graph_runtime import Streams
from ..stream import frame_shape
from .planner import TorchPlanner
from .program import Program


def describe_images(planner: TorchPlanner, program: Program, shape: Shape, *, steps: bool) -> str:
    """What a run of images takes, and what others would take.

    Args:
        planner: Of the graph.
        program: What runs.
        shape: `(N, C, H, W)` of the input.
        steps: Whether to list its steps, too.
    """
    schedule, result = program.schedule, planner.result_bytes(shape)
    parts = schedule.parts_of(shape[0])
    lines = [
        _title(planner, format_size(shape)),
        f"memory      {format_bytes(program.bytes + result)}: "
        f"{format_bytes(schedule.arena_bytes)} for activations, "
        f"{format_bytes(program.bytes - schedule.arena_bytes)} for kernels, "
        f"{format_bytes(result)} for the result",
        f"work        {parts * schedule.flops / 1e12:.3f} TFLOP, "
        f"{schedule.extra_work:.1%} of it extra"
        + (f", in {parts} parts of the batch" if parts > 1 else ""),
        "",
        f"{'memory':>14} {'extra work':>11}  computed again, in strips",
    ]
    for other in planner.tradeoffs(shape):
        again = ", ".join(other.schedule.recomputed) or "nothing"
        memory = format_bytes(other.bytes + result)
        lines.append(f"{memory:>14} {other.schedule.extra_work:>11.1%}  {again}")
    if steps:
        lines += ["", f"{'step':<16}{'bytes':>14}{'workspace':>14}  value"]
        lines += [
            f"{step.kind:<16}{format_bytes(step.bytes):>14}"
            f"{format_bytes(step.workspace):>14}  {step.name}"
            for step in program.steps
        ]
    return "\n".join(lines)


def describe_videos(streams: Streams[Program], planner: TorchPlanner, shape: Shape) -> str:
    """What a stream of videos takes.

    Args:
        streams: Runs videos.
        planner: Of either graph.
        shape: `(N, C, T, H, W)` of the input.
    """
    frame = frame_shape(shape)
    return (
        f"{_title(planner, f'{shape[2]} frames of {format_size(frame)}')}\n"
        f"memory      {format_bytes(streams.memory_needed(frame))} for any number of frames, "
        f"of it {format_bytes(streams.state_bytes(frame))} for state"
    )


def _title(planner: TorchPlanner, size: str) -> str:
    machine = planner.machine
    dtype = str(machine.dtype).removeprefix("torch.")
    return f"{planner.graph.name} on {size}, {dtype}, {machine.device}"
