"""The rules of PyTorch's kernels for schedules: images with channels last, computed in chunks.

A *chunk* is a number of rows that a kernel computes at once. Kernels return new tensors, so its
size bounds what a run needs besides its arena. Every schedule has the same chunks, so the same
calls compute the same rows, and a memory limit changes no bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...graph.ir import Attention, Conv2d, Graph, Operation, Shape
from ...schedule.sweep import Sweep
from . import kernels
from .kernels import Kernels


@dataclass(frozen=True)
class Machine:
    """A device, and what is computed at once on it.

    Attributes:
        device: The device.
        dtype: The dtype of images and weights.
        chunk_rows: The most rows of a chunk, a power of two.
        chunk_bytes: About the most bytes that a chunk reads and writes.
        score_bytes: The most bytes of the scores of queries that attention takes at once.
        scored_bytes: The most bytes of scores that its kernel holds.
        library_bytes: What PyTorch's kernels may take besides their results.
        fused: Whether Triton's kernels read and write images (`fused`), else PyTorch's.
    """

    device: torch.device
    dtype: torch.dtype
    chunk_rows: int
    chunk_bytes: int
    score_bytes: int
    scored_bytes: int
    library_bytes: int
    fused: bool = False

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, threads: int | None = None) -> Machine:
        """The machine that a device is, with so many threads; by default as many as torch has.

        On a CPU, chunks are as small as costs no time. Those of a GPU keep it busy for longer
        than a launch takes: its convolutions lose a tenth of their speed at a quarter of that.
        """
        if device.type == "cpu":
            # Each thread of attention holds blocks of 256 queries, 512 keys and their values.
            held = (threads or torch.get_num_threads()) * 2**21
            return cls(device, dtype, 8, 2**25, 2**24, min(held, 2**24), 2**21)
        # cuBLAS keeps 32 MiB for each stream, and up to 262 MiB more than the tensors of a run
        # were seen on an H200.
        library = 2**28 + 2**26
        return cls(device, dtype, 2**12, 2**28, 2**28, 2**28, library, runs_fused(device))

    @property
    def kernels(self) -> Kernels:
        """What reads and writes images."""
        if not self.fused:
            return kernels
        from . import fused

        return fused

    def multiplies(self, channels: int) -> bool:
        """Whether attention with heads of so many channels is two products and a softmax.

        That takes half the time of PyTorch's own kernels where a head is larger than the 256
        channels of the fast ones, in bfloat16 on an H200. In float32 it hasn't been compared.
        """
        known = self.dtype == torch.float32 or hasattr(torch.ops.aten.bmm, "dtype")
        return self.fused and channels > 256 and known

    @property
    def batches(self) -> bool:
        """Whether the images of a batch run together, which changes bits but keeps a GPU busy."""
        return self.device.type != "cpu"


def runs_fused(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    from . import fused

    return fused.works(device)


class TorchRules:
    """The `Rules` of PyTorch's kernels for a graph and one input shape.

    Args:
        graph: The graph.
        input_shape: `(N, C, H, W)`.
        machine: The device.
    """

    def __init__(self, graph: Graph, input_shape: Sequence[int], machine: Machine) -> None:
        self.graph = graph
        self.machine = machine
        self.shapes = graph.infer_shapes(tuple(input_shape))
        self._chunks: dict[str, int] = {}

    def require(self, operation: Operation) -> None:
        """Every operation runs."""

    def row_bytes(self, channels: int, width: int) -> int:
        return channels * width * self.machine.dtype.itemsize

    def prepared(self, operation: Operation) -> Mapping[str, int]:
        return {}

    def sums_bytes(self, operation: Conv2d) -> int:
        batch, channels, height, _ = self.shapes[operation.output]
        return batch * -(-height // self.rows_summed(operation)) * 2 * channels * 4

    def statistics_bytes(self, shape: Shape) -> int:
        batch, channels, height, _ = shape
        return batch * -(-height // self.rows_summed_of(shape)) * 2 * channels * 4

    def coefficients_bytes(self, shape: Shape) -> int:
        return shape[0] * 2 * shape[1] * 4

    def rows_at_once(self, operation: Conv2d, *, summed: bool) -> int:
        return self.chunk_rows(operation)

    def strip_rows(self, sweep: Sweep) -> int:
        chunks = (self.chunk_rows(o) for o in (*sweep.members, *sweep.targets) if o.output)
        return min(chunks, default=self.machine.chunk_rows)

    @property
    def overwrites(self) -> bool:
        return True

    def runs_in_place(self, operation: Conv2d) -> bool:
        inputs, outputs = self.shapes[operation.input][1], self.shapes[operation.output][1]
        kernel = operation.kernel(self.graph.weights)[2:]
        return (
            kernel == (1, 1)
            and operation.frames == 1
            and operation.stride == 1
            and not any(operation.padding)
            and not operation.upsample
            and operation.residual is None
            and outputs <= inputs
        )

    # Lowering uses these, too.

    def rows_summed(self, operation: Operation) -> int:
        """Rows of an operation's output that have statistics of their own."""
        return 1 if self.machine.fused else self.chunk_rows(operation)

    def rows_summed_of(self, shape: Shape) -> int:
        """Rows of an image that have statistics of their own, where they are summed up apart."""
        return 1 if self.machine.fused else self.rows_of(shape)

    def chunk_rows(self, operation: Operation) -> int:
        """Rows of an operation's output that are computed at once."""
        value = operation.output
        if value not in self._chunks:
            shapes = [self.shapes[each] for each in operation.inputs]
            self._chunks[value] = self.rows_of(self.shapes[value], *shapes)
        return self._chunks[value]

    def rows_of(self, shape: Shape, *others: Shape) -> int:
        """Rows of an image that are processed at once.

        Args:
            shape: Of the image, whose rows count.
            others: Of images of any height that are read with it.
        """
        height = shape[2]
        together = self.machine.batches or self.graph.runs_clips or self.graph.state
        batch = shape[0] if together else 1
        sizes = (self.row_bytes(c, w) * h / height for _, c, h, w in (shape, *others))
        rows = max(2, int(self.machine.chunk_bytes / (batch * sum(sizes))))
        return int(min(self.machine.chunk_rows, 1 << (rows.bit_length() - 1)))

    def rows_copied(self, shape: Shape) -> int:
        """Rows of an image that are copied from or to the caller's at once, in float32."""
        batch, channels, height, width = shape
        wider = 16 // self.machine.dtype.itemsize
        return self.rows_of((batch, wider * channels, height, width))

    def queries(self, operation: Attention) -> int:
        """Rows of an image whose pixels are queries at once."""
        batch, _, height, width = self.shapes[operation.query]
        row = batch * operation.heads * height * width * width * 4
        return max(1, min(height, self.machine.score_bytes // row))
