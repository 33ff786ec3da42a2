"""The arena: the buffers in it, their offsets, and their lifetimes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..graph.ir import Value

ALIGNMENT = 4096
"""The alignment of buffers in bytes: each begins on its own page."""


@dataclass(eq=False, slots=True)
class Buffer:
    """A range of the arena, and the first and the last task that need it.

    The state of a video has buffers, too. They lie behind the arena, in memory that outlives the
    run.

    `holds` has the values that are kept in it, one after the other or side by side, and for
    each the first task that needs it.
    `over` fixes the place of a buffer relative to another one, whose lifetime ends before,
    because its contents overwrite those of the other.
    """

    name: str
    bytes: int
    first: int
    last: int
    holds: dict[Value, int] = field(default_factory=dict)
    over: Place | None = None
    offset: int = -1


@dataclass(frozen=True, slots=True)
class Place:
    """An offset in bytes from the beginning of a buffer; it may be negative."""

    buffer: Buffer
    offset: int


@dataclass(frozen=True, slots=True)
class View:
    """Some rows of an image in a buffer, for each image of the batch.

    Attributes:
        buffer: The buffer of the image.
        channels, height, width: The size of the view.
        row_bytes: Bytes from one row to the next.
        image_bytes: Bytes from one image of the batch to the next.
        offset: Bytes from the beginning of the buffer to the first row.
    """

    buffer: Buffer
    channels: int
    height: int
    width: int
    row_bytes: int
    image_bytes: int
    offset: int = 0

    def rows(self, begin: int, end: int) -> View:
        """A view of the rows from `begin` up to `end`."""
        return self._with(self.channels, end - begin, self.offset + begin * self.row_bytes)

    def beginning_at(self, image: int) -> View:
        """A view of the images of the batch from one on."""
        return self._with(self.channels, self.height, self.offset + image * self.image_bytes)

    def of_channels(self, channels: int) -> View:
        """A view of as many pixels with another number of channels."""
        return self._with(channels, self.height, self.offset)

    def _with(self, channels: int, height: int, offset: int) -> View:
        # Searches make many, and `dataclasses.replace` takes twice as long.
        return View(
            self.buffer, channels, height, self.width, self.row_bytes, self.image_bytes, offset
        )


def live_bytes(buffers: Iterable[Buffer], tasks: int) -> list[int]:
    """The bytes of all live buffers at each task."""
    changes = [0] * (tasks + 1)
    for buffer in buffers:
        changes[buffer.first] += buffer.bytes
        changes[buffer.last + 1] -= buffer.bytes
    return list(itertools.accumulate(changes[:-1]))


def lay_out(buffers: list[Buffer], times: Sequence[int]) -> int:
    """Give each buffer an offset; buffers with disjoint lifetimes may share memory.

    Each buffer gets the lowest offset where it overlaps no placed buffer with an overlapping
    lifetime. Three orders are tried, and the one with the smallest arena is taken: by size,
    by start of life, and by length of life.

    Args:
        buffers: All buffers of the arena; their offsets are set.
        times: The time of each task, which measures lifetimes.

    Returns:
        The size of the arena in bytes.
    """
    least = max(live_bytes(buffers, len(times)), default=0)
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


_Placed = tuple[int, int, int, int]
"""The offset of a buffer that is placed, its end, and its first and last task."""


def _first_fit(buffers: list[Buffer]) -> dict[Buffer, int]:
    offsets: dict[Buffer, int] = {}
    placed: list[_Placed] = []
    groups: dict[Buffer, dict[Buffer, int]] = {}
    for buffer in buffers:
        root, within = buffer, 0
        while over := root.over:
            root, within = over.buffer, within + over.offset
        groups.setdefault(root, {})[buffer] = within
    for group in groups.values():
        base, moved = max(0, -min(group.values())), True
        while moved:
            moved = False
            for buffer, within in group.items():
                offset = _free(buffer, base + within, placed)
                if offset > base + within:
                    base, moved = offset - within, len(group) > 1
        for buffer, within in group.items():
            offset = offsets[buffer] = base + within
            bisect.insort(placed, (offset, offset + buffer.bytes, buffer.first, buffer.last))
    return offsets


def _free(buffer: Buffer, offset: int, placed: list[_Placed]) -> int:
    """The lowest offset, at least `offset`, where a buffer overlaps no placed buffer."""
    size, first, last = buffer.bytes, buffer.first, buffer.last
    for begin, end, born, dead in placed:
        if dead < first or last < born:
            continue
        if begin >= offset + size:
            break
        if end > offset:
            offset = end
    return offset
