"""Working on an image in strips of rows, so that what comes in between is never held whole.

A sweep goes down the rows of its *targets*. For each strip it computes those rows of the
*members*, the values that are only held in part, which the strip needs and no strip before
has computed. A member's window holds the rows that are still needed, so that no row is
computed twice in a sweep.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..graph.ir import Conv2d, Operation, Value

Rows = tuple[int, int]
"""From a row up to another."""

PERIOD = 16
"""After so many strips the windows repeat: rows are rounded to small powers of two."""


@dataclass(frozen=True)
class Import(Operation):
    """The arrival of the caller's tensor."""


@dataclass(frozen=True)
class Export(Operation):
    """The way of the result into the caller's tensor."""

    input: Value = field(metadata={"role": "value"})


@dataclass(frozen=True)
class Keep(Operation):
    """A value that is held whole, copied before what is made of it is written over it."""


def top_row(operation: Conv2d, begin: int) -> int:
    """The first row of its input that a row of the output reads; above the image if negative."""
    if operation.upsample:
        return begin // 2 - operation.padding[0]
    return begin * operation.stride - operation.padding[0]


def rows_read(
    operation: Operation, rows: Rows, kernel_height: int, heights: Mapping[Value, int]
) -> Iterator[tuple[Value, Rows]]:
    """Which rows of which values some rows of an output need."""
    begin, end = rows
    if isinstance(operation, Conv2d):
        top = top_row(operation, begin)
        if operation.upsample:
            # Phases read 2x2 each, of three rows together.
            bottom = top_row(operation, end - 1) + 3
        else:
            bottom = top_row(operation, end - 1) + kernel_height
        height = heights[operation.input]
        yield operation.input, (min(height, max(0, top)), max(0, min(height, bottom)))
        if operation.residual is not None:
            yield operation.residual, rows
    elif isinstance(operation, Export):
        yield operation.input, rows


@dataclass(frozen=True)
class Strip:
    """One step of a sweep.

    Attributes:
        computed: For each member and target, the rows that it computes; perhaps none.
        held: For each member, the rows that its window holds then.
    """

    computed: Mapping[Value, Rows]
    held: Mapping[Value, Rows]


@dataclass(frozen=True)
class Sweep:
    """What is computed together, strip by strip.

    Attributes:
        members: What makes the values that are held in part, in order.
        targets: What is made of them; all have the same height.
        heights: Of every value.
        kernel_heights: Of every convolution, by its output.
        multiples: Of how many rows a value is computed at once, where it isn't one.
        step: Rows of a strip.
    """

    members: Sequence[Operation]
    targets: Sequence[Operation]
    heights: Mapping[Value, int]
    kernel_heights: Mapping[Value, int]
    multiples: Mapping[Value, int]
    step: int

    @property
    def height(self) -> int:
        target = self.targets[0]
        return self.heights[target.input if isinstance(target, Export) else target.output]

    def strips(self) -> Iterator[Strip]:
        """All strips from top to bottom."""
        operations = (*self.members, *self.targets)
        ends = {operation.output: 0 for operation in operations}
        for begin in range(0, self.height, self.step):
            stop = min(self.height, begin + self.step)
            computed = {target.output: (begin, stop) for target in self.targets}
            held: dict[Value, Rows] = {}
            for member in reversed(self.members):
                value = member.output
                low, high = self.heights[value], ends[value]
                for operation in operations:
                    if value not in operation.inputs:
                        continue
                    first, last = computed[operation.output]
                    # An operation that computes nothing here needs its next row later.
                    for name, rows in self.read(operation, (first, max(last, first + 1))):
                        if name == value:
                            low = min(low, rows[0])
                            if last > first:
                                high = max(high, rows[1])
                multiple = self.multiples.get(value, 1)
                high = min(-(-high // multiple) * multiple, self.heights[value])
                computed[value] = (ends[value], high)
                held[value] = (min(low, ends[value]), high)
            ends |= {value: rows[1] for value, rows in computed.items()}
            yield Strip(computed, held)

    def read(self, operation: Operation, rows: Rows) -> Iterator[tuple[Value, Rows]]:
        return rows_read(
            operation, rows, self.kernel_heights.get(operation.output, 1), self.heights
        )

    def window_heights(self) -> dict[Value, int]:
        """For each member, the most rows that its window holds."""
        most = {member.output: 1 for member in self.members}
        for strip in itertools.islice(self.strips(), PERIOD):
            for value, (low, high) in strip.held.items():
                most[value] = max(most[value], high - low)
        return most

    def may_overwrite(self, value: Value) -> bool:
        """Whether the only target may be written over a value as it goes.

        It may where it reads the same rows as it writes and no strip reads rows that an
        earlier one has overwritten.
        """
        (target,) = self.targets
        if isinstance(target, Export) or self.heights[value] != self.height:
            return False
        if isinstance(target, Conv2d) and target.input == value:
            return False
        for strip in itertools.islice(self.strips(), PERIOD):
            begin = strip.computed[target.output][0]
            for operation in (*self.members, target):
                first, last = strip.computed[operation.output]
                if first == last:
                    continue
                if any(n == value and r[0] < begin for n, r in self.read(operation, (first, last))):
                    return False
        return True
