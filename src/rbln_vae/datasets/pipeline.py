"""Splits in, shards out: images are read and decoded while others are encoded.

    feeder ──▶ decoders ──▶ encoder ──▶ writer
    1 thread    N threads   the caller   1 thread

On a GPU, two threads encode for the caller: while it computes one batch, the next is copied to it.

Everything keeps the order of the source, so that what is written doesn't depend on time or
on the number of threads; and everything between two of these is bounded, so that memory
doesn't depend on the number of samples.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from ..errors import RBLNDatasetError
from .buckets import Placer
from .encoder import Encoded, Encoder
from .job import Entry, Job, Part
from .pictures import Clip, Prepared, Rejected, prepare, quiet
from .sources import Split


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        encoded: Images that this run has encoded; a mirrored copy doesn't count.
        rejected: Samples that this run has rejected.
        resumed: Samples that were done before it.
        waiting: Seconds that the encoder has waited for images.
        start: When it began, by `time.perf_counter`.
        total: How many samples there are, once that is known.
    """

    encoded: int = 0
    rejected: int = 0
    resumed: int = 0
    waiting: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    total: int | None = None

    @property
    def done(self) -> int:
        """Samples that are dealt with, in this run and before."""
        return self.encoded + self.rejected + self.resumed

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.start

    @property
    def rate(self) -> float:
        """Images a second of this run."""
        return self.encoded / max(self.seconds, 1e-9)

    @property
    def waiting_share(self) -> float:
        """How much of the time the encoder has waited for images, 0 to 1."""
        return min(1.0, self.waiting / max(self.seconds, 1e-9))


@dataclass(frozen=True)
class _Begin:
    """A part begins."""

    part: Part
    fingerprint: str


@dataclass(frozen=True)
class _End:
    """The part ends."""

    last: bool


@dataclass(frozen=True)
class _Failed:
    """The source can't be read."""

    error: BaseException


_Group = list[tuple[int, Prepared | Clip]]
"""Images of one size, with their places among the results."""

_Item = _Begin | _End | _Failed | Future[Prepared | Clip | Rejected] | None


def encode_splits(
    splits: Iterable[tuple[int, Split]],
    encoder: Encoder,
    job: Job,
    sizing: Placer,
    *,
    decoders: int,
    progress: Progress,
    report: Callable[[], None] = lambda: None,
) -> Iterator[Entry]:
    """Encode what isn't done yet of some splits.

    Args:
        splits: With their numbers in the source.
        encoder: Runs in the thread of the caller, or in others if it gains by several.
        job: Where shards and journal go.
        sizing: The buckets.
        decoders: Threads that read and decode images.
        progress: Is kept up to date.
        report: Called when it has changed.

    Yields:
        The entries of the parts as they are done.

    Raises:
        RBLNDatasetError: The source has changed since the job began, or there is no room.
        OSError: The source can't be read.
    """
    with (
        ThreadPoolExecutor(decoders, "decode") as pool,
        ThreadPoolExecutor(encoder.at_once, "encode") as encoders,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        # Each decoder has one image under way and one done, and a run of the encoder waits.
        fed: queue.Queue[_Item] = queue.Queue(2 * decoders + encoder.batch_size)
        stopped = threading.Event()
        written: Future[Entry] | None = None

        def reported() -> None:
            if written is not None and written.done():
                written.result()  # raises what went wrong, without encoding the rest of a part
            report()

        def feed() -> None:
            try:
                for item in _feed(splits, job, sizing, pool, progress):
                    if not _put(fed, item, stopped):
                        return
                _put(fed, None, stopped)
            except BaseException as error:
                _put(fed, _Failed(error), stopped)

        feeder = threading.Thread(target=feed, name="feed", daemon=True)
        with quiet():
            feeder.start()
            try:
                for finish in _encode(fed, encoder, encoders, progress, reported):
                    if written is not None:
                        yield written.result()
                    written = writer.submit(finish, job)
                if written is not None:
                    yield written.result()
            finally:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                feeder.join()


def _put(fed: queue.Queue[_Item], item: _Item, stopped: threading.Event) -> bool:
    """Wait for room; `False` if the run is stopped meanwhile."""
    while not stopped.is_set():
        try:
            fed.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def first_missing(job: Job, number: int, split: Split, progress: Progress) -> int | None:
    """The first part of a split that isn't done; `None` if all are.

    Raises:
        RBLNDatasetError: The split isn't what it was when it was begun.
    """
    first, fingerprint = 0, None
    while entry := job.done(Part(number, first)):
        fingerprint = split.fingerprint() if fingerprint is None else fingerprint
        if entry.fingerprint != fingerprint:
            if job.trainer is not None:
                break  # images come and go in the folder of a trainer
            raise RBLNDatasetError(
                f"the source has changed since {job.directory} was begun: split {number} holds "
                "other files. Bring it back to what it was, or encode to another directory."
            )
        progress.resumed += entry.samples + len(entry.rejected)
        if entry.last:
            return None
        first += 1
    return first


def _feed(
    splits: Iterable[tuple[int, Split]],
    job: Job,
    sizing: Placer,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> Iterator[_Item]:
    """Cut splits into parts, and have the images of those that aren't done decoded."""
    size = job.options.shard_size
    for number, split in splits:
        part = first_missing(job, number, split, progress)
        if part is None:
            continue
        fingerprint = split.fingerprint()
        yield _Begin(Part(number, part), fingerprint)
        count = 0
        for sample in split.samples(part * size):
            if count == size:
                part, count = part + 1, 0
                yield _End(last=False)
                yield _Begin(Part(number, part), fingerprint)
            yield pool.submit(prepare, sample, job.options, sizing)
            count += 1
        yield _End(last=True)


def _encode(
    fed: queue.Queue[_Item],
    encoder: Encoder,
    encoders: ThreadPoolExecutor,
    progress: Progress,
    report: Callable[[], None],
) -> Iterator[Callable[[Job], Entry]]:
    """Encode part by part; gives what writes each."""
    while True:
        item = _next(fed, progress)
        if item is None:
            return
        assert isinstance(item, _Begin)
        begin, gathered = item, _Gathered(encoder, encoders)
        while not isinstance(item := _next(fed, progress), _End):
            assert isinstance(item, Future)
            start = time.perf_counter()
            prepared = item.result()
            progress.waiting += time.perf_counter() - start
            gathered.add(prepared)
            _count(gathered, progress, report)
        gathered.flush()
        _count(gathered, progress, report)
        yield _finisher(begin, gathered, item.last)


def _next(fed: queue.Queue[_Item], progress: Progress) -> _Item:
    start = time.perf_counter()
    item = fed.get()
    progress.waiting += time.perf_counter() - start
    if isinstance(item, _Failed):
        raise item.error
    return item


def _count(gathered: _Gathered, progress: Progress, report: Callable[[], None]) -> None:
    encoded, rejected = gathered.counted()
    if encoded or rejected:
        progress.encoded += encoded
        progress.rejected += rejected
        report()


def _finisher(begin: _Begin, gathered: _Gathered, last: bool) -> Callable[[Job], Entry]:
    def finish(job: Job) -> Entry:
        return job.finish(
            begin.part,
            [each for each in gathered.results if isinstance(each, Encoded)],
            [each for each in gathered.results if isinstance(each, Rejected)],
            last=last,
            fingerprint=begin.fingerprint,
        )

    return finish


class _Gathered:
    """The results of a part in its order; images of one size are encoded together."""

    def __init__(self, encoder: Encoder, threads: ThreadPoolExecutor) -> None:
        self._encoder = encoder
        self._threads = threads
        self._waiting: dict[tuple[int, int], _Group] = {}
        self._running: deque[tuple[_Group, Future[list[Encoded | Rejected]]]] = deque()
        self._counted = [0, 0]
        self.results: list[Encoded | Rejected | None] = []

    def add(self, prepared: Prepared | Clip | Rejected) -> None:
        """Take the next sample."""
        if isinstance(prepared, Rejected):
            self.results.append(prepared)
            self._counted[1] += 1
            return
        group = self._waiting.setdefault(prepared.placement.size, [])
        group.append((len(self.results), prepared))
        self.results.append(None)
        if len(group) == self._encoder.batch_size:
            self._run(self._waiting.pop(prepared.placement.size))

    def flush(self) -> None:
        """Encode what waits for others of its size, and wait for what runs."""
        for size in sorted(self._waiting):
            self._run(self._waiting.pop(size))
        self._take_results(0)

    def counted(self) -> tuple[int, int]:
        """How many were encoded and rejected since this was last asked."""
        encoded, rejected = self._counted
        self._counted = [0, 0]
        return encoded, rejected

    def _run(self, group: _Group) -> None:
        images = [prepared for _, prepared in group]
        if self._encoder.at_once == 1:  # here, where a signal ends it at once
            self._place(group, self._encoder.encode(images))
            return
        self._running.append((group, self._threads.submit(self._encoder.encode, images)))
        self._take_results(self._encoder.at_once)

    def _take_results(self, most: int) -> None:
        """Wait until at most so many groups are encoded."""
        while len(self._running) > most:
            group, results = self._running.popleft()
            self._place(group, results.result())

    def _place(self, group: _Group, encoded: Sequence[Encoded | Rejected]) -> None:
        for (place, _), result in zip(group, encoded, strict=True):
            self.results[place] = result
            self._counted[isinstance(result, Rejected)] += 1
