"""Where buffers lie: apart while both live, or where their contents demand."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rbln_vae.schedule.arena import ALIGNMENT, Buffer, Place, lay_out, live_bytes

TASKS = 12


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    """Some apart, and some that take the place of an earlier one after its life."""
    made: list[Buffer] = []
    replaced: set[Buffer] = set()
    for index in range(draw(st.integers(1, 12))):
        size = ALIGNMENT * draw(st.integers(1, 9))
        first = draw(st.integers(0, TASKS - 1))
        new = Buffer(str(index), size, first, draw(st.integers(first, TASKS - 1)))
        ended = [buffer for buffer in made if buffer.last < first and buffer not in replaced]
        if ended and draw(st.booleans()):
            new.over = Place(draw(st.sampled_from(ended)), ALIGNMENT * draw(st.integers(-9, 9)))
            replaced.add(new.over.buffer)
        made.append(new)
    return made


@given(buffers())
def test_buffers_that_live_at_the_same_time_lie_apart(made: list[Buffer]) -> None:
    size = lay_out(made, range(TASKS))
    assert size == max(buffer.offset + buffer.bytes for buffer in made)
    assert size >= max(live_bytes(made, TASKS))
    for buffer in made:
        assert buffer.offset >= 0
        if buffer.over is not None:
            assert buffer.offset == buffer.over.buffer.offset + buffer.over.offset
    for one, other in itertools.combinations(made, 2):
        if one.first <= other.last and other.first <= one.last:
            apart = one.offset + one.bytes <= other.offset
            assert apart or other.offset + other.bytes <= one.offset
