"""Programs are recorded at their second run, and replayed; a stand-in takes a GPU's place."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_torch_runtime import graph_of, runtime
from vaes import noise

from rbln_vae.targets.torch.program import Call, Frame, Program, Step
from rbln_vae.targets.torch.recording import Recordings, can_be_recorded
from rbln_vae.targets.torch.runtime import TorchRuntime

SHAPE = (1, 4, 16, 16)


class Graph:
    """Keeps what ran while it was captured, as a CUDA graph does, and runs it again."""

    calls: list[Callable[[], None]] | None = None
    mine: list[Callable[[], None]]
    made = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        Graph.calls = self.mine = []
        Graph.made += 1

    def capture_end(self) -> None:
        Graph.calls = None

    def replay(self) -> None:
        for call in self.mine:
            call()


class Stream:
    def __init__(self, device: torch.device | None = None) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...


class Event:
    def record(self) -> None: ...
    def wait(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> TorchRuntime:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Graph, "made", 0)
    result = runtime(graph_of("plain", "decoder"))
    result._recordings = Recordings(torch.device("cpu"), torch.float32, 2**24)
    lowered = result.images.lowered

    def capturable(*arguments: Any) -> Program:
        """A program whose steps are kept by a graph that is captured, instead of run."""
        program = lowered(*arguments)

        def kept(run: Call) -> Call:
            def call(frame: Frame) -> None:
                if Graph.calls is None:
                    run(frame)
                else:
                    Graph.calls.append(lambda: run(frame))

            return call

        steps = (
            Step(s.name, s.kind, s.flops, s.bytes, s.workspace, kept(s.run)) for s in program.steps
        )
        return Program(program.schedule, tuple(steps))

    monkeypatch.setattr(result.images, "lowered", capturable)
    return result


@pytest.fixture
def images() -> Iterator[list[torch.Tensor]]:
    yield [noise(*SHAPE, seed=n) for n in range(4)]


def test_the_second_run_records_and_all_give_the_same(
    found: TorchRuntime, images: list[torch.Tensor]
) -> None:
    plain = runtime(graph_of("plain", "decoder"))
    for n, image in enumerate([*images, *images]):
        assert torch.equal(found.run(image), plain.run(image))
        assert Graph.made == (n > 0)


def test_a_run_beside_another_launches_its_steps(
    found: TorchRuntime, images: list[torch.Tensor]
) -> None:
    expected = [found.run(image) for image in images]
    recording = found._recordings.begin(found.planned(SHAPE))
    assert recording is not None
    assert found._recordings.begin(found.planned(SHAPE)) is None
    assert torch.equal(found.run(images[0]), expected[0])
    recording.end()
    again = found._recordings.begin(found.planned(SHAPE))
    assert again is recording


def test_recordings_hold_no_more_memory_than_they_may(
    found: TorchRuntime, images: list[torch.Tensor]
) -> None:
    bytes_of_one = found.planned(SHAPE).bytes
    found._recordings = Recordings(torch.device("cpu"), torch.float32, 2 * bytes_of_one)
    for height in (16, 15, 14):
        for _ in range(2):
            found.run(images[0][:, :, :height])
    kept = found._recordings._kept
    assert [program.schedule.input_shape[2] for program in kept] == [15, 14]
    found._recordings.keep(0)
    assert not kept
    found._recordings = Recordings(torch.device("cpu"), torch.float32, bytes_of_one - 1)
    for _ in range(3):
        found.run(images[0])
    assert not found._recordings._kept


def test_a_memory_limit_counts_recordings(found: TorchRuntime, images: list[torch.Tensor]) -> None:
    needed = found.memory_needed(SHAPE)
    found._options = dataclasses.replace(found._options, memory_limit=needed + 2**10)
    for image in images:
        found.run(image)
    assert Graph.made == 1  # it stays: the next run takes its memory
    found.run(images[0][:, :, :12])
    assert not found._recordings._kept


def test_a_recording_that_is_forgotten_is_freed(
    found: TorchRuntime, images: list[torch.Tensor]
) -> None:
    for image in images:
        found.run(image)
    (kept,) = found._recordings._kept.values()
    forgotten = weakref.ref(kept.arena)
    del kept
    found.save_memory(slicing=False, tiling=True)
    assert forgotten() is None  # at once, without the garbage collector


def test_a_program_that_copies_in_between_is_not_recorded(found: TorchRuntime) -> None:
    program = found.planned(SHAPE)
    assert can_be_recorded(program)
    *others, last = program.schedule.tasks
    tasks = (*others[:-1], last, others[-1])
    assert not can_be_recorded(
        Program(dataclasses.replace(program.schedule, tasks=tasks), program.steps)
    )
