"""The local pipeline: its order, its bounds, and how it ends."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import encoded, picture

from rbln_vae.datasets import Options, Progress, Sample, Split, pipeline
from rbln_vae.datasets.encoder import Encoded
from rbln_vae.datasets.job import Job, open_job
from rbln_vae.datasets.pictures import Prepared
from rbln_vae.datasets.pipeline import encode_splits

OPTIONS = Options(sizes=((32, 32),), shard_size=4)
CONTENT = encoded(picture(0))
PATIENCE = 60
"""Seconds after which something that must happen never will."""


@dataclasses.dataclass
class Simulated(Split):
    """Samples without end, which counts those that were asked for."""

    given: list[int]
    end: int = 10**9

    def fingerprint(self) -> str:
        return "simulated"

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for number in range(start, self.end):
            self.given.append(number)
            yield Sample(f"{number:09d}", CONTENT)


class Recording:
    """An encoder that computes nothing and keeps the keys that it was given."""

    at_once = 1

    def __init__(self, batch_size: int = 1, fails_at: int | None = None) -> None:
        self.batch_size, self.fails_at = batch_size, fails_at
        self.keys: list[str] = []
        self.begun, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def encode(self, images: Sequence[Prepared]) -> list[Encoded | None]:
        self.begun.set()
        self.gate.wait()
        self.keys += [image.key for image in images]
        if self.fails_at is not None and len(self.keys) > self.fails_at:
            raise TimeoutError("too long")
        latent = torch.zeros(1, 2, 2)
        return [
            Encoded({"key": i.key, "target_size": [32, 32], "columns": {}}, {"mean": latent})
            for i in images
        ]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with open_job(tmp_path / "out", OPTIONS, {}, {}) as opened:
        yield opened


def run(split: Split, encoder: Recording, job: Job, decoders: int = 2, **given):
    progress = given.pop("progress", Progress())
    return encode_splits(
        [(0, split)], encoder, job, OPTIONS.sizing(8), decoders=decoders, progress=progress, **given
    )


@pytest.mark.parametrize("decoders", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_are_encoded_in_the_order_of_the_source(
    job: Job, decoders: int, batch_size: int
) -> None:
    encoder = Recording(batch_size)
    entries = list(run(Simulated([], 14), encoder, job, decoders))
    assert encoder.keys == [f"{n:09d}" for n in range(14)]
    assert [(e.part.number, e.samples, e.last) for e in entries] == [
        *((0, 4, False), (1, 4, False), (2, 4, False), (3, 2, True))
    ]


class InPairs(Recording):
    """An encoder that goes on only where two threads call it."""

    at_once = 2

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def encode(self, images: Sequence[Prepared]) -> list[Encoded | None]:
        self.both.wait(timeout=60)
        return super().encode(images)


def test_an_encoder_that_gains_by_it_has_several_threads(job: Job, tmp_path: Path) -> None:
    encoder, progress = InPairs(), Progress()
    shards = [entry.shard for entry in run(Simulated([], 8), encoder, job, progress=progress)]
    assert progress.encoded == 8
    with open_job(tmp_path / "other", OPTIONS, {}, {}) as other:
        assert shards == [entry.shard for entry in run(Simulated([], 8), Recording(), other)]


def test_a_part_that_ends_with_its_split_has_none_behind_it(job: Job) -> None:
    assert [e.last for e in run(Simulated([], 8), Recording(), job)] == [False, True]
    assert len(list(job.entries())) == 2


def test_an_empty_split_is_done(job: Job) -> None:
    (entry,) = run(Simulated([], 0), Recording(), job)
    assert (entry.samples, entry.last, entry.shard) == (0, True, None)
    assert list(run(Simulated([], 0), Recording(), job)) == []


def test_no_more_is_read_than_there_is_room_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled = threading.Event()

    class Watched(queue.Queue[Any]):
        """Tells when there was no room."""

        def put(self, *arguments: Any, **options: Any) -> None:
            try:
                super().put(*arguments, **options)
            except queue.Full:
                stalled.set()
                raise

    monkeypatch.setattr(pipeline.queue, "Queue", Watched)
    split, encoder = Simulated([]), Recording()
    encoder.gate.clear()
    entries = run(split, encoder, job, decoders=3)
    reader = threading.Thread(target=lambda: next(entries))
    reader.start()
    try:
        # The encoder takes nothing any more: where there is no room now, there will be none.
        assert encoder.begun.wait(PATIENCE)
        stalled.clear()
        assert stalled.wait(PATIENCE)
        # Each decoder is given something; at most two for each, one that the encoder has, one
        # that it would take next, and one that is handed over.
        assert 3 < len(split.given) <= 2 * 3 + 1 + 1 + 1
    finally:
        encoder.gate.set()
        reader.join()
    entries.close()  # ends all threads of a source that has no end
    assert not [t for t in threading.enumerate() if t.name.startswith(("feed", "decode", "write"))]


def test_it_goes_on_behind_what_is_done(job: Job) -> None:
    with pytest.raises(TimeoutError):
        list(run(Simulated([], 14), Recording(fails_at=9), job))
    split, encoder, progress = Simulated([], 14), Recording(), Progress()
    entries = list(run(split, encoder, job, progress=progress))
    assert [entry.part.number for entry in entries] == [2, 3]
    assert split.given == list(range(8, 14))
    assert (progress.resumed, progress.encoded, progress.done) == (8, 6, 14)


def test_an_error_ends_all_threads(job: Job) -> None:
    with pytest.raises(TimeoutError):
        list(run(Simulated([]), Recording(fails_at=2), job))
    assert not [t for t in threading.enumerate() if t.name.startswith(("feed", "decode", "write"))]


def test_a_shard_that_cannot_be_written_stops_it_before_the_next_is_full(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_, **__):
        raise OSError("no room")

    class Prompt(ThreadPoolExecutor):
        """Has tried to write a shard before the next image is encoded."""

        def __init__(self, threads: int, name: str) -> None:
            super().__init__(threads, name)
            self.writes = name == "write"

        def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
            future = super().submit(*arguments, **options)
            if self.writes:
                wait([future])
            return future

    monkeypatch.setattr(Job, "finish", failing)
    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", Prompt)
    encoder = Recording()
    with pytest.raises(OSError, match="no room"):
        list(run(Simulated([]), encoder, job))
    assert len(encoder.keys) == OPTIONS.shard_size + 1
