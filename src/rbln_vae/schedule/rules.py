"""What a scheduler asks a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..graph.ir import Conv2d, Operation, Shape
from .sweep import Sweep


class Rules(Protocol):
    """A target's answers about the operations of one graph on one shape of its input.

    None depends on the memory that there is, so neither does a result.
    """

    def require(self, operation: Operation) -> None:
        """Raise an `RBLNCompileError` if the target can't run an operation."""

    def row_bytes(self, channels: int, width: int) -> int:
        """Bytes of a row of an image."""

    def prepared(self, operation: Operation) -> Mapping[str, int]:
        """Bytes of what is made for an operation before it runs, by name; perhaps nothing.

        Transformed weights are such, or an operand in another order.
        """

    def sums_bytes(self, operation: Conv2d) -> int:
        """Bytes of the sums that a convolution leaves for the norms of its output."""

    def statistics_bytes(self, shape: Shape) -> int:
        """Bytes of the sums of an image that no convolution left any for."""

    def coefficients_bytes(self, channels: int) -> int:
        """Bytes of what a norm is, once its sums are known, for all images of the batch."""

    def rows_at_once(self, operation: Conv2d, *, summed: bool) -> int:
        """Rows of the output that strips must not cut, perhaps for the sake of its sums."""

    def strip_rows(self, sweep: Sweep) -> int:
        """Rows of a strip, about: work enough for all threads, little memory."""

    @property
    def overwrites(self) -> bool:
        """Whether a result may be written over an input that nothing reads later."""

    def runs_in_place(self, operation: Conv2d) -> bool:
        """Whether a convolution may write its output over its input."""
