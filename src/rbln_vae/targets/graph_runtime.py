"""What runtimes of our own graphs have in common: plans, memory, and streams of videos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic

from torch import Tensor

from ..graph.ir import Graph, Shape
from .allocation import torch_allocates
from .base import only_images
from .planner import Planned, Planner
from .stream import Chunks, Stream, frame_shape
from .watch import Watch


class GraphRuntime(ABC, Generic[Planned]):
    """A runtime of our own graphs, which a target completes: it runs what is planned.

    Args:
        graph: The optimised graph; of a part that runs videos, that of later runs, and images are
            run by that of the first run.
        planner: Makes what plans the runs of a graph.
        timeout: The most seconds of a run; `None` is no limit.

    Attributes:
        graph: What runs images.
        images: Plans its runs.
    """

    def __init__(
        self,
        graph: Graph,
        planner: Callable[[Graph], Planner[Planned, Any]],
        timeout: float | None,
    ) -> None:
        self.timeout = timeout
        self.graph = graph.start.stateless()
        self.images = planner(self.graph)
        self._streams: Streams[Planned] | None = None
        if graph.first is not None:
            self._streams = Streams(planner(graph.first), planner(graph), self)

    @property
    @abstractmethod
    def memory_limit(self) -> int:
        """The most bytes of a run besides the weights."""

    @abstractmethod
    def new_state(self, size: int) -> Tensor:
        """Memory for the state of one video, in bytes."""

    @abstractmethod
    def run_chunk(
        self,
        planned: Planned,
        state: Tensor,
        inputs: list[Tensor],
        outputs: list[Tensor],
        watch: Watch,
    ) -> None:
        """Run a chunk of one video, whose state follows."""

    def planned(self, shape: Shape) -> Planned:
        """What is run for an input, or for a smaller batch, with a new tensor of floats."""
        shape = tuple(shape)
        return self.images.fitted(shape, self.memory_limit, self.images.result_bytes(shape))

    def memory_needed(self, shape: Shape) -> int:
        """The bytes of a run; see `Runtime.memory_needed`."""
        shape = tuple(shape)
        if len(shape) == 5:
            frame = frame_shape(shape)
            return self.streams(frame).memory_needed(frame)
        return self.images.bytes_of(self.planned(shape)) + self.images.result_bytes(shape)

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Take less memory than the limit allows; see `Runtime.save_memory`."""
        for planner in self._planners:
            planner.slicing, planner.tiling = slicing, tiling

    def forget_plans(self) -> int:
        """Plan anew from the next run on.

        Returns:
            How many plans were kept.
        """
        return sum(planner.forget() for planner in self._planners)

    def chunks(self, shape: Shape) -> Chunks:
        """What the runs of a stream take and give; see `Runtime.chunks`."""
        return self.streams(shape).chunks(shape)

    def stream(
        self, shape: Shape, result_bytes: int | None = None, memory_limit: int | None = None
    ) -> Stream:
        """Begin to run the part on a batch of videos; see `Runtime.stream`."""
        shape = tuple(shape)
        return self.streams(shape).begin(shape, result_bytes, memory_limit)

    def streams(self, shape: Shape) -> Streams[Planned]:
        """What runs videos.

        Args:
            shape: `(N, C, H, W)` of a frame.

        Raises:
            ValueError: The part takes no such frames, or runs images alone.
        """
        self.images.check(shape)
        if self._streams is None:
            raise only_images(self.graph.name)
        return self._streams

    @property
    def _planners(self) -> list[Planner[Planned, Any]]:
        streams = self._streams
        return [self.images] if streams is None else [self.images, streams.first, streams.later]


class Streams(Generic[Planned]):
    """How a part runs videos: by a graph of the first run, and one of those that follow.

    Args:
        first: Plans the first run.
        later: Plans those that follow.
        runner: Runs what is planned.
    """

    def __init__(
        self,
        first: Planner[Planned, Any],
        later: Planner[Planned, Any],
        runner: GraphRuntime[Planned],
    ) -> None:
        self.first = first
        self.later = later
        self._runner = runner

    def chunks(self, shape: Shape) -> Chunks:
        """What runs take and give, for frames `(N, C, H, W)`."""
        return Chunks.of(self.later.graph, shape)

    def state_bytes(self, shape: Shape) -> int:
        """The bytes of the state of all videos of a batch, for frames of a shape."""
        return self.first.state_bytes(shape)

    def fitted(
        self, shape: Shape, result_bytes: int | None = None, memory_limit: int | None = None
    ) -> tuple[Planned, Planned]:
        """What is run for the first chunk of one video, and for later ones.

        Args:
            shape: `(N, C, H, W)` of a frame.
            result_bytes: As of `Runtime.stream`, and so is `memory_limit`.
            memory_limit: By default that of the runtime.

        Raises:
            MemoryError: It would need more than the limit.
        """
        limit = self._runner.memory_limit
        if memory_limit is not None:
            limit = min(limit, memory_limit)
        taken = self.chunks(shape).result_bytes if result_bytes is None else result_bytes
        taken += self.state_bytes(shape)
        one = (1, *shape[1:])
        # Later chunks need more: an error is to name the least for all.
        later = self.later.fitted(one, limit, taken)
        return self.first.fitted(one, limit, taken), later

    def memory_needed(self, shape: Shape) -> int:
        """The bytes of a stream of frames `(N, C, H, W)`, with the results of a run.

        Raises:
            MemoryError: They are more than the limit.
        """
        first, later = self.fitted(shape)
        most = max(self.first.bytes_of(first), self.later.bytes_of(later))
        return most + self.state_bytes(shape) + self.chunks(shape).result_bytes

    def begin(
        self, shape: Shape, result_bytes: int | None = None, memory_limit: int | None = None
    ) -> Stream:
        """Begin to run a batch of videos; see `Runtime.stream`."""
        first, later = self.fitted(shape, result_bytes, memory_limit)
        size = self.state_bytes(shape) // shape[0]
        with torch_allocates():
            states = [self._runner.new_state(size) for _ in range(shape[0])]

        def step(
            begins: bool, state: Tensor, inputs: list[Tensor], outputs: list[Tensor], watch: Watch
        ) -> None:
            self._runner.run_chunk(first if begins else later, state, inputs, outputs, watch)

        return Stream(self.chunks(shape), states, step, self._runner.timeout)


def beyond_float16(part: str) -> str:
    """The warning about a part whose images don't fit float16."""
    return (
        f"The {part} has values beyond the range of float16, which ends at 65504. Images with such "
        "values are run again in bfloat16, which takes longer and is less exact. Compile the "
        "model with dtype='bfloat16' or 'float32' to run each once."
    )
