"""The arena: what lies in it, where, and from which task to which."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALIGNMENT = 4096
"""Buffers begin on a page of their own."""


@dataclass(eq=False)
class Buffer:
    """A range of the arena, and the tasks from the first to the last that need it.

    One may have to lie where another one lies that ends before, since what it holds is
    written over that.
    """

    name: str
    bytes: int
    first: int
    last: int
    over: Place | None = None
    offset: int = -1


@dataclass(frozen=True)
class Place:
    """Bytes into a buffer."""

    buffer: Buffer
    offset: int


@dataclass(frozen=True)
class View:
    """Some rows of an image that lies in a buffer, for each image of the batch.

    Attributes:
        buffer: Where it lies.
        channels, height, width: Of the view.
        room: Channels and rows that the buffer was laid out for, of this width.
        row: The row of the buffer in which it begins.
    """

    buffer: Buffer
    channels: int
    height: int
    width: int
    room: tuple[int, int]
    row: int = 0

    def rows(self, begin: int, end: int) -> View:
        """Some of its rows."""
        return dataclasses.replace(self, height=end - begin, row=self.row + begin)


def lay_out(buffers: list[Buffer], times: Sequence[int]) -> int:
    """Give each buffer an offset; those that live at different times may share memory.

    Large buffers first, each at the lowest offset where it meets no other that lives at
    the same time; or in the order of their lives, or of their lengths, if that leaves
    smaller holes.

    Args:
        buffers: All that the arena holds.
        times: Of the tasks, by which lives are measured.

    Returns:
        The size of the arena.
    """
    ends = {buffer.last for buffer in buffers}
    least = max((sum(b.bytes for b in buffers if b.first <= e <= b.last) for e in ends), default=0)
    best: tuple[int, dict[Buffer, int]] | None = None
    orders: tuple[Callable[[Buffer], tuple[int, int]], ...] = (
        lambda b: (-b.bytes, b.first),
        lambda b: (b.first, -b.bytes),
        lambda b: (times[b.first] - times[b.last], -b.bytes),
    )
    for order in orders:
        offsets = _first_fit(sorted(buffers, key=order))
        size = max((at + buffer.bytes for buffer, at in offsets.items()), default=0)
        if best is None or size < best[0]:
            best = size, offsets
        if size == least:
            break
    assert best is not None
    for buffer, offset in best[1].items():
        buffer.offset = offset
    return best[0]


def _first_fit(buffers: list[Buffer]) -> dict[Buffer, int]:
    offsets: dict[Buffer, int] = {}
    placed: list[Buffer] = []
    groups: dict[Buffer, dict[Buffer, int]] = {}
    for buffer in buffers:
        root, within = buffer, 0
        while over := root.over:
            root, within = over.buffer, within + over.offset
        groups.setdefault(root, {})[buffer] = within
    for group in groups.values():
        base, moved = 0, True
        while moved:
            moved = False
            for buffer, within in group.items():
                offset = _free(buffer, base + within, placed, offsets)
                if offset > base + within:
                    base, moved = offset - within, len(group) > 1
        for buffer, within in group.items():
            offsets[buffer] = base + within
            bisect.insort(placed, buffer, key=offsets.__getitem__)
    return offsets


def _free(buffer: Buffer, offset: int, placed: list[Buffer], offsets: dict[Buffer, int]) -> int:
    """The lowest offset, from one on, where a buffer meets none that was placed."""
    for other in placed:
        if other.last < buffer.first or buffer.last < other.first:
            continue
        if offsets[other] >= offset + buffer.bytes:
            break
        offset = max(offset, offsets[other] + other.bytes)
    return offset
