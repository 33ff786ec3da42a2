"""Programs as CUDA graphs, which a GPU launches at once.

The steps of a small image take a GPU less time than a CPU takes to launch them. A program that
runs for the second time is recorded, and from then on replayed: the graph holds an arena of its
own, and what its kernels need besides.
"""

from __future__ import annotations

import threading
import weakref

import torch

from .program import COPIES, Frame, Program, Step

RECORDED = 1 / 16
"""The part of a GPU's memory that the recordings of a model hold at most. Larger images keep a GPU
busy without."""

WORK = 2e13
"""The most floating-point operations of a program that is recorded. No graph can be stopped, and
this is done in some 30 ms by a GPU that has the memory for it."""


class Recording:
    """The steps of a program, with all between the first and the last as one.

    Only what copies the caller's tensors is launched anew in each run.

    Args:
        program: A program that has run before, so that everything is compiled and loaded.
        device: The GPU.
        dtype: Of its images.

    Attributes:
        bytes: The device memory that it holds.
        arena: The arena of its runs.
        steps: What a run does.
    """

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype) -> None:
        self.bytes = program.bytes
        self.arena = torch.empty(program.schedule.arena_bytes, dtype=torch.uint8, device=device)
        begin, end = _inner(program)
        inner = program.steps[begin:end]
        graph = torch.cuda.CUDAGraph()
        self._idle = threading.Lock()
        self._ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        none = self.arena[:0].view(dtype)
        frame = Frame.on(
            self.arena, dtype, [self.arena], [self.arena], dtype, none
        )  # no step copies
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for step in inner:
                    step.run(frame)
            finally:
                graph.capture_end()
        replay = Step(
            f"{len(inner)} steps",
            "Graph",
            sum(step.flops for step in inner),
            sum(step.bytes for step in inner),
            max(step.workspace for step in inner),
            lambda frame: graph.replay(),
        )
        self.steps = (*program.steps[:begin], replay, *program.steps[end:])

    def begin(self) -> bool:
        """Take the arena for a run on the current stream; `False` if another run has it."""
        if not self._idle.acquire(blocking=False):
            return False
        self._ended.wait()
        return True

    def end(self) -> None:
        """Give the arena back once the current stream has done what was launched."""
        self._ended.record()
        self._idle.release()

    def finish(self) -> None:
        """Wait until no run uses the arena."""
        with self._idle:
            self._ended.synchronize()


def can_be_recorded(program: Program) -> bool:
    """Whether a program copies nothing in between, and is soon done."""
    begin, end = _inner(program)
    return program.schedule.flops <= WORK and not any(
        task.kind in COPIES for task in program.schedule.tasks[begin:end]
    )


def _inner(program: Program) -> tuple[int, int]:
    """The first step that is no copy of what the caller has, and the step after the last."""
    copies = [task.kind in COPIES for task in program.schedule.tasks]
    return copies.index(False), len(copies) - copies[::-1].index(False)


class Recordings:
    """The recordings of a model.

    Args:
        device: The GPU.
        dtype: Of images.
        most: The most bytes of device memory that they hold together.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        self._device, self._dtype, self._most = device, dtype, most
        self._lock = threading.Lock()
        self._seen: weakref.WeakSet[Program] = weakref.WeakSet()
        self._kept: dict[Program, Recording] = {}

    def begin(self, program: Program) -> Recording | None:
        """The recording of a program, taken for a run; `None` if the run needs another way.

        Args:
            program: What is about to run; its second run records it.
        """
        with self._lock:
            recording = self._kept.get(program)
            if recording is None:
                if program not in self._seen:
                    self._seen.add(program)
                elif program.bytes <= self._most and can_be_recorded(program):
                    self._keep(self._most - program.bytes, program)
                    recording = Recording(program, self._device, self._dtype)
                    self._kept[program] = recording
        return recording if recording is not None and recording.begin() else None

    def keep(self, most: int, besides: Program | None = None) -> None:
        """Forget recordings, the oldest first, until the others hold at most so many bytes.

        Args:
            most: The bytes.
            besides: A program whose recording stays, and isn't counted.
        """
        with self._lock:
            self._keep(most, besides)

    def _keep(self, most: int, besides: Program | None) -> None:
        others = [program for program in self._kept if program is not besides]
        held = sum(self._kept[program].bytes for program in others)
        for program in others:
            if held <= most:
                break
            recording = self._kept.pop(program)
            recording.finish()
            held -= recording.bytes
