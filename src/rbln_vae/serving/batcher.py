"""Decides what runs when: tensors wait, and run together as time and memory allow.

It knows nothing of HTTP. All of it but the runs themselves happens in one event loop, so
there are no locks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..units import format_bytes
from .models import Runner, Shape

_LEAST_WEIGHT = 1 / 8
"""Even the smallest request takes this much of the queue, so that their number is bounded."""

_NEW_RATE = 0.2
"""How much the latest run counts in the estimate of the time that a run takes."""


class QueueFullError(Exception):
    """No more may wait now.

    Attributes:
        retry_after: Seconds after which there will probably be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class TooLargeError(MemoryError):
    """The run would never fit in the memory that there is for runs."""


class ClosedError(Exception):
    """The batcher finishes what it has, and takes nothing more."""


@dataclass(frozen=True)
class BatcherOptions:
    """When work is admitted, and when it runs.

    Attributes:
        max_batch: The most samples that run together.
        max_wait: Seconds that a request may wait for others to fill its batch.
        memory_limit: The most bytes that the activations of all runs may take at once.
        queue: How much may wait, in images of the size that the model was compiled for; a
            larger image counts as many times as it is larger, so that the bound is one of
            time.
        concurrency: The most runs at once.
    """

    max_batch: int = 8
    max_wait: float = 0.0
    memory_limit: int | None = None
    queue: float = 32
    concurrency: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "concurrency", "queue"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0.")
        if not 0 <= self.max_wait < math.inf:
            raise ValueError(f"max_wait is {self.max_wait}, expected seconds, 0 or more.")


@dataclass(frozen=True)
class Outcome:
    """A result, and how it came about.

    Attributes:
        tensor: What the model gave.
        waited: Seconds in the queue.
        ran: Seconds of the run that made it.
        batch: Samples of that run, those of other requests included.
    """

    tensor: Tensor
    waited: float
    ran: float
    batch: int


@dataclass(eq=False)
class _Job:
    runner: Runner
    part: str
    tensor: Tensor
    weight: float
    arrived: float
    done: asyncio.Future[Outcome]

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def kind(self) -> tuple[str, str, torch.dtype, Shape]:
        """What jobs that run together have in common."""
        return self.runner.name, self.part, self.tensor.dtype, self.shape[1:]


@dataclass(eq=False)
class _Batch:
    """Jobs of one kind that are admitted together."""

    jobs: list[_Job]
    samples: int = field(init=False)
    memory: int = field(init=False)

    def __post_init__(self) -> None:
        self.samples = sum(job.shape[0] for job in self.jobs)
        first = self.jobs[0]
        self.memory = max(
            first.runner.memory_needed(
                first.part, (sum(job.shape[0] for job in run), *first.shape[1:])
            )
            for run in self.runs()
        )

    def runs(self) -> Sequence[list[_Job]]:
        """The jobs that the model gets in one tensor.

        Where a batch would change the bits of a result, each job runs by itself.
        """
        return [self.jobs] if self.jobs[0].runner.exact_batches else [[j] for j in self.jobs]


class Batcher:
    """Runs tensors through models, within bounds of memory and of waiting.

    What came first runs first: a large request is never overtaken for ever by small ones.

    Args:
        options: The bounds.
    """

    def __init__(self, options: BatcherOptions) -> None:
        self.options = options
        self._waiting: list[_Job] = []
        self._running: set[_Batch] = set()
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="run")
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event | None = None
        self._closed = False
        self._seconds_per_weight = 1.0

    @property
    def waiting(self) -> float:
        """How much waits, in the unit of `BatcherOptions.queue`."""
        return math.fsum(job.weight for job in self._waiting)

    @property
    def running(self) -> int:
        """How many runs are under way."""
        return len(self._running)

    @property
    def memory(self) -> int:
        """Bytes that the runs under way were admitted for."""
        return sum(batch.memory for batch in self._running)

    def check(self, runner: Runner, part: str, shape: Shape) -> float:
        """Raise if a request of that shape would be refused now; cheap.

        Returns:
            How much of the queue it takes.

        Raises:
            TooLargeError: It needs more than `memory_limit`.
            QueueFullError: Too much waits.
            ClosedError: The batcher is closed.
        """
        if self._closed:
            raise ClosedError
        limit = self.options.memory_limit
        try:
            needed = runner.memory_needed(part, shape)
        except MemoryError as error:
            raise TooLargeError(str(error)) from error
        if limit is not None and needed > limit:
            raise TooLargeError(
                f"A run of the {part} on {'x'.join(map(str, shape))} needs {format_bytes(needed)} "
                f"besides the weights, and this server gives {format_bytes(limit)} to runs."
            )
        weight = max(_LEAST_WEIGHT, runner.weight(part, shape))
        waiting = self.waiting
        # Alone it may be larger than the queue: nothing that fits in memory is shut out.
        if waiting and waiting + weight > self.options.queue:
            raise QueueFullError(max(1, math.ceil(waiting * self._seconds_per_weight)))
        return weight

    async def submit(self, runner: Runner, part: str, tensor: Tensor) -> Outcome:
        """Run a tensor when its turn comes.

        If the caller is cancelled while the tensor waits, it is not run.

        Args:
            runner: The model.
            part: Which part of it.
            tensor: `(N, C, H, W)`; not to be written to any more.

        Raises:
            TooLargeError, QueueFullError, ClosedError: As `check`.
            Exception: What the run raised.
        """
        weight = self.check(runner, part, tuple(tensor.shape))
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        job = _Job(runner, part, tensor, weight, time.monotonic(), done)
        self._waiting.append(job)
        self._start_what_can()
        try:
            return await done
        finally:
            if job in self._waiting:
                self._waiting.remove(job)
                self._start_what_can()

    async def close(self) -> None:
        """Take nothing more, and return when all that was admitted is done."""
        self._closed = True
        self._idle = asyncio.Event()
        self._start_what_can()
        await self._idle.wait()
        self._threads.shutdown()

    def _start_what_can(self) -> None:
        """Start batches until time, memory or threads say to wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and len(self._running) < self.options.concurrency:
            batch = self._next_batch()
            if batch is None:
                break
            self._waiting = [job for job in self._waiting if job not in batch.jobs]
            self._running.add(batch)
            asyncio.get_running_loop().run_in_executor(self._threads, self._run, batch)
        if self._idle is not None and not self._waiting and not self._running:
            self._idle.set()

    def _next_batch(self) -> _Batch | None:
        """The batch of the oldest job whose kind need not wait for more.

        `None` where that is none yet, or where it must wait for memory.
        """
        now = time.monotonic()
        earliest = math.inf
        for oldest in self._first_of_each_kind():
            batch = self._fill(oldest)
            if not self._fits(batch):
                return None
            ripe = oldest.arrived + self.options.max_wait
            if now >= ripe or batch.samples >= self.options.max_batch or self._closed:
                return batch
            earliest = min(earliest, ripe)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, earliest - now), self._start_what_can)
        return None

    def _first_of_each_kind(self) -> Iterator[_Job]:
        seen = set()
        for job in self._waiting:
            if job.kind not in seen:
                seen.add(job.kind)
                yield job

    def _fill(self, oldest: _Job) -> _Batch:
        """The job, and as many of its kind as the bounds allow, in the order they came."""
        batch = _Batch([oldest])
        for job in self._waiting:
            if job is oldest or job.kind != oldest.kind:
                continue
            if batch.samples + job.shape[0] > self.options.max_batch:
                break
            larger = _Batch([*batch.jobs, job])
            if not self._fits(larger):
                break
            batch = larger
        return batch

    def _fits(self, batch: _Batch) -> bool:
        limit = self.options.memory_limit
        return limit is None or self.memory + batch.memory <= limit

    # In a thread of its own

    def _run(self, batch: _Batch) -> None:
        loop = batch.jobs[0].done.get_loop()
        started = time.monotonic()
        try:
            for jobs in batch.runs():
                # Whoever has gone meanwhile is left out.
                wanted = [job for job in jobs if not job.done.done()]
                if wanted:
                    self._run_together(wanted, loop)
        finally:
            seconds = time.monotonic() - started
            loop.call_soon_threadsafe(self._finished, batch, seconds)

    def _run_together(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        first = jobs[0]
        sizes = [job.shape[0] for job in jobs]
        started = time.monotonic()
        try:
            tensor = first.tensor if len(jobs) == 1 else torch.cat([job.tensor for job in jobs])
            result = first.runner.run(first.part, tensor)
        except Exception as error:
            for job in jobs:
                loop.call_soon_threadsafe(_fail, job, error)
            return
        ran = time.monotonic() - started
        for job, tensor in zip(jobs, torch.split(result, sizes), strict=True):
            outcome = Outcome(tensor, started - job.arrived, ran, sum(sizes))
            loop.call_soon_threadsafe(_succeed, job, outcome)

    # Back in the event loop

    def _finished(self, batch: _Batch, seconds: float) -> None:
        self._running.remove(batch)
        latest = seconds / math.fsum(job.weight for job in batch.jobs)
        self._seconds_per_weight += _NEW_RATE * (latest - self._seconds_per_weight)
        self._start_what_can()


def _succeed(job: _Job, outcome: Outcome) -> None:
    if not job.done.done():
        job.done.set_result(outcome)


def _fail(job: _Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
