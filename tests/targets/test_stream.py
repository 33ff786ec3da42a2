"""State between runs: every way in which a graph can read and leave it, on every target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import over_frames, random_weights
from torch import Tensor
from vaes import TOLERANCE, noise

from rbln_vae.graph.interpreter import run_video
from rbln_vae.graph.ir import (
    Add,
    Conv2d,
    Graph,
    GraphError,
    Identity,
    Operation,
    RMSNorm,
    Slot,
    Stack,
    Unstack,
)
from rbln_vae.graph.passes import optimise
from rbln_vae.graph.stored import restore, store
from rbln_vae.metrics import relative_l2
from rbln_vae.schedule import problem
from rbln_vae.targets.base import RuntimeOptions
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.torch.runtime import TorchRuntime

C = 5
WEIGHTS = random_weights(
    over_time=(C, 3 * C, 3, 3), pairs=(C, 2 * C, 1, 1), weight=(C, C, 3, 3), bias=(C,), gamma=(C,)
)
NORM = RMSNorm(1e-12, "gamma")


def over_time(output: str, *frames: str, left_out: int = 0, **options: Any) -> Conv2d:
    *earlier, last = frames
    options = {"padding": (1, 1, 1, 1), "norm": NORM, "activation": "silu", **options}
    return Conv2d(
        output, last, "over_time", "bias", earlier=tuple(earlier), left_out=left_out, **options
    )


def part(
    first: tuple[Operation, ...],
    later: tuple[Operation, ...],
    state: dict[str, tuple[str, str]],
    *,
    inputs: int = 1,
    outputs: tuple[str, ...] = ("y0",),
    zeros: frozenset[str] = frozenset(),
) -> Graph:
    """A part: what slots get in the first run and in later ones, by their names."""

    def weights(operations: tuple[Operation, ...]) -> dict[str, Tensor]:
        names = {name for operation in operations for name in operation.weights}
        return {name: WEIGHTS[name] for name in names}

    start = Graph(
        "decoder",
        ("x0",),
        C,
        ("y0",),
        first,
        weights(first),
        tuple(Slot(name, None, left[0], name in zeros) for name, left in state.items()),
    )
    return Graph(
        "decoder",
        tuple(f"x{i}" for i in range(inputs)),
        C,
        outputs,
        later,
        weights(later),
        tuple(Slot(name, name, left[1]) for name, left in state.items()),
        start,
    ).verify()


def one_frame() -> Graph:
    return part(
        (over_time("y0", "x0", left_out=2),),
        (over_time("y0", "a", "b", "x0"),),
        {"a": ("x0", "b"), "b": ("x0", "x0")},
        zeros=frozenset("a"),
    )


def four_frames() -> Graph:
    frames = ["a", "b", "x0", "x1", "x2", "x3"]
    return part(
        (over_time("y0", "x0", left_out=2),),
        tuple(over_time(f"y{i}", *frames[i : i + 3]) for i in range(4)),
        {"a": ("x0", "x2"), "b": ("x0", "x3")},
        inputs=4,
        outputs=("y0", "y1", "y2", "y3"),
        zeros=frozenset("a"),
    )


def exchanged() -> Graph:
    """Two slots whose images change places in each run."""
    conv = Conv2d("z", "x0", "weight", None, padding=(1, 1, 1, 1))
    return part(
        (conv, Add("y0", "z", "x0")),
        (conv, Add("s", "a", "z"), Add("y0", "s", "b")),
        {"a": ("z", "b"), "b": ("x0", "a")},
    )


def copied() -> Graph:
    """An image that is left twice, an identity of it, and one that stays what it was."""
    conv = Conv2d("z", "x0", "weight", None, padding=(1, 1, 1, 1))
    return part(
        (conv, Identity("y0", "z")),
        (
            Identity("same", "a"),
            conv,
            Conv2d("w", "z", "pairs", None, earlier=("same",)),
            Add("v", "w", "c"),
            Add("y0", "v", "b"),
        ),
        {"a": ("z", "z"), "b": ("z", "z"), "c": ("x0", "c")},
    )


def halved() -> Graph:
    """Two frames make one, with a residual that nothing else reads."""
    return part(
        (Conv2d("y0", "x0", "pairs", "bias", left_out=1),),
        (
            Conv2d("r", "x0", "weight", None, padding=(1, 1, 1, 1)),
            Conv2d("m", "x1", "pairs", None, earlier=("x0",), residual="r"),
            over_time("y0", "a", "x0", "m"),
        ),
        {"a": ("x0", "x1")},
        inputs=2,
    )


def taken_apart() -> Graph:
    """Frames of a stack that are read after the stack's last use, beside what may overwrite it."""
    return part(
        (over_time("y0", "x0", left_out=2),),
        (
            Stack("s", ("x0", "x1")),
            over_time("t", "a", "b", "s"),
            Unstack("t0", "t", 0, 2),
            Unstack("t1", "t", 1, 2),
            Conv2d("u", "s", "weight", None, padding=(1, 1, 1, 1), residual="t"),
            Unstack("u1", "u", 1, 2),
            Unstack("u0", "u", 0, 2),
            Stack("turned", ("u1", "t0", "t1")),
            Conv2d("v", "turned", "weight", None, padding=(1, 1, 1, 1), residual="turned"),
            Unstack("v2", "v", 2, 3),
            Add("y0", "u0", "t0"),
            Add("y1", "v2", "t1"),
        ),
        {"a": ("x0", "t0"), "b": ("x0", "u1")},
        inputs=2,
        outputs=("y0", "y1"),
    )


GRAPHS: dict[str, Callable[[], Graph]] = {
    each.__name__: each for each in (one_frame, four_frames, exchanged, copied, halved, taken_apart)
} | {
    f"{frames} stacked": functools.partial(over_frames, frames, residual=True)
    for frames in (1, 2, 3, 4, 8)
}
RUNTIMES: dict[str, Callable[[Graph], Any]] = {
    "cpu": lambda graph: CpuRuntime(graph, dtype="float32", num_threads=2),
    "torch": lambda graph: TorchRuntime(graph, torch.float32, "cpu", RuntimeOptions()),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_every_kind_of_state_gives_what_the_interpreter_gives(
    name: str, target: str, optimised: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(problem, "PASSING_BYTES", 0)
    graph = GRAPHS[name]()
    runtime = RUNTIMES[target](optimise(graph) if optimised else graph)
    frames = [noise(2, C, 9, 7, seed=i) for i in range(1 + 5 * len(graph.inputs))]
    expected = list(run_video(graph, frames))
    stream = runtime.stream(tuple(frames[0].shape))
    found: list[Tensor] = []
    given = list(frames)
    while given:
        count = stream.taken
        found += stream.run(given[:count])
        given = given[count:]
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_l2(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("frames", [2, 4, 6])
def test_stacked_frames_are_those_made_one_by_one(frames: int, target: str) -> None:
    given = [noise(1, C, 9, 7, seed=i) for i in range(1 + 2 * frames)]
    expected = list(run_video(over_frames(frames, stacked=False), given))
    stream = RUNTIMES[target](over_frames(frames)).stream(tuple(given[0].shape))
    found = stream.run(given[:1])
    for begin in range(1, len(given), frames):
        found += stream.run(given[begin : begin + frames])
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_l2(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_videos_are_stored_and_rebuilt(name: str) -> None:
    graph = GRAPHS[name]()
    assert graph.first is not None
    stored = [store(graph.first), store(graph)]
    again = restore(stored, graph.all_weights)
    assert [store(again.start), store(again)] == stored


def test_the_memory_of_a_stream_is_its_state_its_arena_and_its_frames() -> None:
    runtime = RUNTIMES["cpu"](four_frames())
    state = 2 * 64 * 64 * 32 * 4  # two frames of one block of 32 channels
    results = 4 * C * 64 * 64 * 4
    needed = runtime.memory_needed((1, C, 100, 64, 64))
    assert needed == runtime.memory_needed((1, C, 2, 64, 64))
    assert needed > state + results
    # Videos of a batch run one after the other.
    assert runtime.memory_needed((2, C, 2, 64, 64)) == needed + state + results


def replaced(graph: Graph, **changes: Any) -> Graph:
    return dataclasses.replace(graph, **changes)


def operating(*operations: Operation) -> Graph:
    """Other operations of the graph of later runs."""
    weights = {name: WEIGHTS[name] for each in operations for name in each.weights}
    return replaced(one_frame(), operations=operations, weights=weights)


BROKEN: dict[str, tuple[Callable[[], Graph], str]] = {
    "a first run that reads state": (
        lambda: replaced(one_frame(), first=None),
        "a first run reads the state",
    ),
    "other slots": (
        lambda: replaced(one_frame(), state=one_frame().state[:1]),
        "the state ['a'] follows ['a', 'b']",
    ),
    "state of another shape": (
        lambda: replaced(
            one_frame(),
            operations=(
                *one_frame().operations,
                Conv2d("small", "x0", "weight", None, stride=2, padding=(1, 1, 1, 1)),
            ),
            weights=WEIGHTS,
            state=(Slot("a", "a", "small"), Slot("b", "b", "x0")),
        ),
        "",
    ),
    "a slot left as zeros by a later run": (
        lambda: replaced(
            one_frame(), state=(Slot("a", "a", "b", zeros=True), Slot("b", "b", "x0"))
        ),
        "left as zeros: ['a']",
    ),
    "a kernel for more frames": (
        lambda: replaced(one_frame(), operations=(over_time("y0", "b", "x0"),)),
        "5 channels of 2 frames meet a kernel for 15",
    ),
    "a stack with zeros before it": (
        lambda: operating(
            Stack("stack", ("x0", "a")),
            Conv2d("y0", "stack", "over_time", None, earlier=("b",), left_out=1),
        ),
        "frames (3, 5, 4096, 5120) and (6, 5, 4096, 5120)",
    ),
    "a stack of one frame": (
        lambda: operating(Stack("y0", ("x0",))),
        "a stack of 1 frames",
    ),
    "a stack of frames of several sizes": (
        lambda: operating(
            Conv2d("small", "x0", "weight", None, stride=2, padding=(1, 1, 1, 1)),
            Stack("y0", ("x0", "small")),
        ),
        "a stack of frames of the shapes",
    ),
    "a frame that a stack doesn't have": (
        lambda: operating(Unstack("y0", "x0", 3, 3)),
        "frame 3 of 3 in a batch of 3 images",
    ),
    "a stack that comes out": (
        lambda: operating(Stack("y0", ("x0", "a"))),
        "'y0' has a batch of 6 images, the input one of 3",
    ),
    "two slots of one name": (
        lambda: replaced(one_frame(), state=(Slot("a", "a", "b"), Slot("a", "b", "x0"))),
        "of the same name",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_state_that_breaks_a_rule_is_refused(name: str) -> None:
    make, message = BROKEN[name]
    with pytest.raises(GraphError) as raised:
        make().verify()
    assert message in str(raised.value)
