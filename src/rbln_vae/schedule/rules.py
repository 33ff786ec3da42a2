"""The questions that the scheduler asks a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..graph.ir import Conv2d, Operation, Shape
from .sweep import Sweep


class Rules(Protocol):
    """A target's answers about the operations of one graph, for one shape of its input.

    No answer depends on the memory limit, so no result does.
    """

    def require(self, operation: Operation) -> None:
        """Raise an `RBLNCompileError` if the target can't run an operation."""

    def row_bytes(self, channels: int, width: int) -> int:
        """Bytes of one row of an image."""

    def prepared(self, operation: Operation) -> Mapping[str, int]:
        """Bytes of each buffer that must be prepared before an operation runs, by name.

        Examples are transformed weights, and an operand in another layout. It may be empty.
        """

    def sums_bytes(self, operation: Conv2d) -> int:
        """Bytes of the sums that a convolution stores for the norms of its output."""

    def statistics_bytes(self, shape: Shape) -> int:
        """Bytes of the sums of an image that no convolution has summed."""

    def coefficients_bytes(self, shape: Shape) -> int:
        """Bytes of the coefficients of a norm of an image, for all images of the batch."""

    def rows_at_once(self, operation: Conv2d, *, summed: bool) -> int:
        """Rows of the output that a strip must not cut.

        Args:
            operation: The convolution.
            summed: Whether the convolution also sums its output for norms.
        """

    def strip_rows(self, sweep: Sweep) -> int:
        """About how many rows a strip should have: enough work for all threads, little memory."""

    @property
    def overwrites(self) -> bool:
        """Whether a result may be written over an input that nothing reads later."""

    def runs_in_place(self, operation: Conv2d) -> bool:
        """Whether a convolution may overwrite its input with its output."""
