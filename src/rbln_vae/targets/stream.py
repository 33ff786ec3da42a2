"""Runs a part on a video, chunk by chunk: each run goes on where the one before has ended."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import RBLNRuntimeError
from ..graph.ir import Graph, Shape
from .allocation import torch_allocates
from .watch import ShouldStop, Watch

RunStep: TypeAlias = Callable[[bool, Any, list[Tensor], list[Tensor], Watch], None]
"""Runs a chunk of one video: whether it is the first one, the state of the video, its frames, where
the results go, and what ends the run."""


@dataclass(frozen=True)
class Chunks:
    """What the runs of a part take and give.

    Attributes:
        part: The name of the part.
        frame: `(N, C, H, W)` of a frame that it takes.
        result: `(N, C, H, W)` of a frame that it gives.
        taken: Frames that the first run takes, and each later one.
        given: Frames that the first run gives, and each later one.
    """

    part: str
    frame: Shape
    result: Shape
    taken: tuple[int, int]
    given: tuple[int, int]

    @classmethod
    def of(cls, graph: Graph, frame: Shape) -> Chunks:
        """Those of a part with state, for frames of a shape.

        Raises:
            GraphError: The part takes no such frames.
        """
        first = graph.start
        shape = graph.infer_shapes(frame)[graph.outputs[0]]
        taken = (len(first.inputs), len(graph.inputs))
        return cls(graph.name, frame, shape, taken, (len(first.outputs), len(graph.outputs)))

    @property
    def result_bytes(self) -> int:
        """The bytes of the results of a run, in float32."""
        return 4 * self.given[1] * math.prod(self.result)

    def later_runs(self, frames: int) -> int:
        """The runs after the first one for so many frames that they take."""
        return -(-(frames - self.taken[0]) // self.taken[1])


class Stream:
    """The runs of a part on one batch of videos.

    It owns their state and nothing else: any number of streams may run at the same time. A
    stream itself is used by one thread at a time.

    Args:
        chunks: What runs take and give.
        states: The state of each video of the batch, empty.
        step: Runs a chunk of one video.
        timeout: The most seconds of a run; `None` is no limit.
    """

    def __init__(
        self, chunks: Chunks, states: list[Any], step: RunStep, timeout: float | None
    ) -> None:
        self.chunks = chunks
        self._states: list[Any] | None = states
        self._step = step
        self._timeout = timeout
        self._begun = False
        self._used = threading.Lock()

    @property
    def taken(self) -> int:
        """The number of frames that the next run takes."""
        return self.chunks.taken[self._begun]

    @property
    def given(self) -> int:
        """The number of frames that the next run gives."""
        return self.chunks.given[self._begun]

    def run(
        self,
        frames: Sequence[Tensor],
        out: Sequence[Tensor] | None = None,
        should_stop: ShouldStop | None = None,
        *,
        levels: bool = False,
    ) -> list[Tensor]:
        """Run the next chunk. If that fails, the stream is closed.

        Args:
            frames: As many as `taken` says, `(N, C, H, W)` of any strides and floating dtype, or
                uint8 for the levels of pictures.
            out: Where to write the results, as many as `given` says, of the dtype of the frames
                (float32 for levels); they share no memory with them. By default new tensors.
            should_stop: Asked at most every 50 ms, on the calling thread; true stops the run.
            levels: Whether the results are the levels that show them. By default floats.

        Returns:
            `out`, or the new tensors.

        Raises:
            ValueError: The number or the shape of the frames is another.
            RBLNRuntimeError: The stream is closed, or another thread uses it.
            TimeoutError, RBLNCancelledError, MemoryError: As `Runtime.run`.
        """
        if not self._used.acquire(blocking=False):
            raise RBLNRuntimeError(
                "Two threads use one stream of frames at the same time. Give each thread a stream "
                "of its own: any number may run at once."
            )
        try:
            self._check(frames)
            if self._states is None:
                raise RBLNRuntimeError(
                    "This stream of frames has ended: it was closed, or a run of it failed or was "
                    "stopped. Begin another one with the first frame."
                )
            states, self._states = self._states, None
            watch = Watch(self._timeout, should_stop)
            with torch_allocates():
                results = self._results(frames[0], levels) if out is None else list(out)
            for n, state in enumerate(states):
                alone = slice(n, n + 1)
                inputs = [frame.detach()[alone] for frame in frames]
                self._step(not self._begun, state, inputs, [each[alone] for each in results], watch)
            self._states, self._begun = states, True
            return results
        finally:
            self._used.release()

    def close(self) -> None:
        """Give the memory of the state back; the stream runs no more."""
        self._states = None

    def _results(self, frame: Tensor, levels: bool) -> list[Tensor]:
        batch, channels, height, width = self.chunks.result
        device = frame.device
        if levels:
            last = (batch, height, width, channels)
            made = [torch.empty(last, dtype=torch.uint8, device=device) for _ in range(self.given)]
            return [each.permute(0, 3, 1, 2) for each in made]
        dtype = frame.dtype if frame.is_floating_point() else torch.float32
        shape = self.chunks.result
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(self.given)]

    def _check(self, frames: Sequence[Tensor]) -> None:
        if len(frames) != self.taken:
            raise ValueError(
                f"The {self.chunks.part} takes {self.taken} frames now, and got {len(frames)}."
            )
        for frame in frames:
            if tuple(frame.shape) != self.chunks.frame:
                raise ValueError(
                    f"A frame has the shape {tuple(frame.shape)}, and those before it had "
                    f"{self.chunks.frame}: the size can't change within a video. Begin another "
                    "stream for frames of another size."
                )


def frame_shape(shape: Shape) -> Shape:
    """The shape of a frame of videos `(N, C, T, H, W)`."""
    batch, channels, _, height, width = shape
    return (batch, channels, height, width)
