"""What runtimes of our own graphs have in common: plans, memory, and streams of videos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic

from torch import Tensor

from ..graph.ir import Graph, Shape
from .base import only_images
from .planner import Planned, Planner
from .stream import Chunks, Stream, Streams, frame_shape
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


def beyond_float16(part: str) -> str:
    """The warning about a part whose images don't fit float16."""
    return (
        f"The {part} has values beyond the range of float16, which ends at 65504. Images with such "
        "values are run again in bfloat16, which takes longer and is less exact. Compile the "
        "model with dtype='bfloat16' or 'float32' to run each once."
    )
