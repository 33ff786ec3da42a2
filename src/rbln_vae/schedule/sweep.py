"""Sweeps: compute an image in strips of rows, so that intermediate values are never held whole.

A sweep goes down the rows of its *targets*. *Members* are the intermediate values, of which
only a window of rows is in memory. For each strip, the sweep computes the rows of each member
that the strip needs and that no earlier strip has computed. The window keeps the rows that
later strips need, so that a sweep computes no row twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..graph.ir import Conv2d, Modulate, Operation, Shuffle, Value

Rows = tuple[int, int]
"""A range of rows: the first, and the one after the last."""

SWEPT = (Conv2d, Modulate, Shuffle)
"""The operations that a sweep can compute in strips: those that read rows near those they make."""

PERIOD = 16
"""The windows repeat after this many strips, because rows are rounded to small powers of two."""


@dataclass(frozen=True)
class Import(Operation):
    """Reads the caller's tensor."""


@dataclass(frozen=True)
class Export(Operation):
    """Writes the result to the caller's tensor."""

    input: Value = field(metadata={"role": "value"})


def top_row(operation: Conv2d, begin: int) -> int:
    """The first input row that an output row reads; negative rows lie above the image."""
    if operation.upsample:
        return begin // 2 - operation.padding[0]
    return begin * operation.stride - operation.padding[0]


def rows_read(
    operation: Operation, rows: Rows, kernel_height: int, heights: Mapping[Value, int]
) -> Iterator[tuple[Value, Rows]]:
    """The rows of each value that some rows of an output need."""
    begin, end = rows
    if isinstance(operation, Conv2d):
        top = top_row(operation, begin)
        if operation.upsample:
            # Each phase reads 2x2 pixels; together they read three rows.
            bottom = top_row(operation, end - 1) + 3
        else:
            bottom = top_row(operation, end - 1) + kernel_height
        height = heights[operation.input]
        near = (min(height, max(0, top)), max(0, min(height, bottom)))
        yield operation.input, near
        if operation.residual is not None:
            yield operation.residual, rows
        for value in operation.earlier:
            yield value, near
    elif isinstance(operation, Modulate):
        yield operation.input, rows
        for value in operation.inputs[1:]:
            factor = heights[operation.input] // heights[value]
            yield value, (begin // factor, -(-end // factor))
    elif isinstance(operation, Shuffle):
        cells = {"up": (begin // 2, -(-end // 2)), "down": (2 * begin, 2 * end)}
        yield operation.input, cells.get(operation.way, rows)
    elif isinstance(operation, Export):
        yield operation.input, rows


@dataclass(frozen=True)
class Strip:
    """One strip of a sweep.

    Attributes:
        computed: The rows to compute of each member and target; may be empty.
        held: The rows in the window of each member.
    """

    computed: Mapping[Value, Rows]
    held: Mapping[Value, Rows]


@dataclass(frozen=True)
class Sweep:
    """Operations that are computed together, strip by strip.

    Attributes:
        members: The producers of the values that are held in part, in order.
        targets: The consumers of these values; all have the same height.
        heights: The height of every value.
        kernel_heights: The kernel height of every convolution, by its output.
        multiples: The number of rows that a value is computed in multiples of, by value;
            1 for values that are missing.
        step: The number of rows of a strip.
    """

    members: Sequence[Operation]
    targets: Sequence[Operation]
    heights: Mapping[Value, int]
    kernel_heights: Mapping[Value, int]
    multiples: Mapping[Value, int]
    step: int
    _starts: dict[tuple[Value, int, int], int] = field(default_factory=dict, init=False, repr=False)
    _overwritten: dict[Value, bool] = field(default_factory=dict, init=False, repr=False)
    """What is known of values: a search asks for the same thousands of times."""

    @functools.cached_property
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
                    # An operation without rows in this strip needs its next row later.
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

    @functools.cached_property
    def first_strips(self) -> list[Strip]:
        """As many strips as it takes until the windows repeat."""
        return list(itertools.islice(self.strips(), PERIOD))

    @functools.cached_property
    def window_heights(self) -> dict[Value, int]:
        """The most rows that the window of each member holds."""
        most = {member.output: 1 for member in self.members}
        for strip in self.first_strips:
            for value, (low, high) in strip.held.items():
                most[value] = max(most[value], high - low)
        return most

    def next_row(self, value: Value, readers: Sequence[Operation], begin: int) -> int:
        """The next row of a value that some operations of the sweep read.

        Args:
            value: The value.
            readers: The operations.
            begin: The targets have their rows before this one; members have the rows that these
                need, and may have more.
        """
        ends = {target.output: begin for target in self.targets}
        for operation in (*self.targets, *reversed(self.members)):
            end = ends.setdefault(operation.output, 0)
            if end > 0:
                for each, rows in self.read(operation, (end - 1, end)):
                    ends[each] = max(ends.get(each, 0), rows[1])
        row = self.heights[value]
        for reader in readers:
            end = ends[reader.output]
            if end < self.heights.get(reader.output, self.height):
                for each, rows in self.read(reader, (end, end + 1)):
                    if each == value:
                        row = min(row, rows[0])
        return row

    def may_overwrite(self, value: Value) -> bool:
        """Whether the only target may overwrite each pixel of a value with its own.

        It may if the value has the rows of the target, and no strip reads rows that an
        earlier strip has overwritten.
        """
        if value not in self._overwritten:
            self._overwritten[value] = self._may_overwrite(value)
        return self._overwritten[value]

    def _may_overwrite(self, value: Value) -> bool:
        (target,) = self.targets
        if self.heights[value] != self.height:
            return False
        if isinstance(target, Conv2d) and value in (target.input, *target.earlier):
            return False
        readers = [o for o in (*self.members, target) if value in o.inputs]
        begins = range(0, self.height, self.step)
        return all(self.next_row(value, readers, begin) >= begin for begin in begins[:PERIOD])

    def head_start(self, value: Value, written: int, read: int) -> int:
        """The bytes by which the targets must begin before a value that they are written over.

        Then no strip overwrites rows of the value that are still needed.

        Args:
            value: A value that is held whole.
            written: Bytes of a row of all targets together.
            read: Bytes from one row of the value to the next.
        """
        key = value, written, read
        if key not in self._starts:
            self._starts[key] = self._head_start(*key)
        return self._starts[key]

    def _head_start(self, value: Value, written: int, read: int) -> int:
        targets = [target for target in self.targets if value in target.inputs]
        members = [member for member in self.members if value in member.inputs]
        begins = range(0, self.height, self.step)
        grows = self.height * written > self.heights[value] * read
        most = 0
        for begin in begins[-PERIOD:] if grows else begins[:PERIOD]:
            end = min(self.height, begin + self.step)
            # Before a strip of a target is written, members have read what it needs.
            row = min(self.next_row(value, targets, begin), self.next_row(value, members, end))
            most = max(most, end * written - row * read)
        return most
