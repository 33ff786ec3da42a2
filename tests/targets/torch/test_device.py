"""Streams of a GPU for runs beside each other, with stand-ins for the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from rbln_vae.targets.torch.device import SideStreams


class Stream:
    def __init__(self, device: object = None) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The current streams, the innermost last."""
    streams = [Stream()]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return streams


def test_runs_at_the_same_time_have_streams_that_are_used_again(current: list[Stream]) -> None:
    side = SideStreams(torch.device("cpu"))
    usual = current[-1]
    with side.one():
        first = current[-1]
        with side.one():
            second = current[-1]
    assert len({usual, first, second}) == 3
    assert first.waited == [usual, second]
    assert second.waited == [first]
    assert usual.waited == [first]
    with side.one():
        assert current[-1] in (first, second)
    assert current == [usual]


def test_a_run_that_fails_gives_its_stream_back(current: list[Stream]) -> None:
    side = SideStreams(torch.device("cpu"))
    with pytest.raises(RuntimeError), side.one():
        failed = current[-1]
        raise RuntimeError
    assert current[-1].waited == [failed]
    with side.one():
        assert current[-1] is failed
