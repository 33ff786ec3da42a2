"""Decides what runs when: tensors wait, and run together as time and memory allow.

It knows nothing of HTTP. All of it but plans and runs themselves happens in one event loop,
so there are no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..units import format_bytes
from .models import Output, Runner, Shape
from .planner import Planner
from .settings import BatcherOptions

_LEAST_WEIGHT = 1 / 8
"""Even the smallest request takes this much of the queue, so that their number is bounded."""

_NEW_RATE = 0.2
"""How much the latest run counts in the estimate of the time that a run takes."""


TakeFrames: TypeAlias = Callable[[Iterator[Tensor]], Any]
"""What a video is given to, frame by frame, on the thread of its run."""


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
class Outcome:
    """A result, and how it came about.

    Attributes:
        tensor: What the model gave; empty for a video that was taken frame by frame.
        finite: Whether all values of pictures were finite; else true.
        waited: Seconds in the queue.
        ran: Seconds of the run that made it.
        batch: Samples of that run, those of other requests included.
    """

    tensor: Tensor
    finite: bool
    waited: float
    ran: float
    batch: int


@dataclass(eq=False)
class _Job:
    runner: Runner
    part: str
    tensor: Tensor
    output: Output
    take: TakeFrames | None
    weight: float
    memory: int
    arrived: float
    done: asyncio.Future[Outcome]

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def kind(self) -> object:
        """What jobs that run together have in common; videos run alone."""
        if len(self.shape) == 5:
            return self
        return self.runner.name, self.part, self.output, self.tensor.dtype, self.shape[1:]


@dataclass(eq=False)
class _Batch:
    """Jobs of one kind that are started together, and the memory that they take."""

    jobs: Sequence[_Job]
    memory: int

    def runs(self) -> Sequence[Sequence[_Job]]:
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
        self._planner = Planner()
        self._planned: list[float] = []
        self._waiting: list[_Job] = []
        self._running: set[_Batch] = set()
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="run")
        self._scheduler: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._draining = self._closed = False
        self._seconds_per_weight = 1.0

    @property
    def waiting(self) -> float:
        """How much waits for a plan or for a run, in the unit of `BatcherOptions.queue`."""
        return math.fsum([*self._planned, *(job.weight for job in self._waiting)])

    @property
    def running(self) -> int:
        """How many runs are under way."""
        return len(self._running)

    @property
    def memory(self) -> int:
        """Bytes that the runs under way were admitted for."""
        return sum(batch.memory for batch in self._running)

    async def check(
        self, runner: Runner, part: str, shape: Shape, output: Output = "sample"
    ) -> None:
        """Raise if a request of that shape would be refused now.

        It is planned in a thread, and takes room in the queue meanwhile.

        Raises:
            TooLargeError: It needs more than `memory_limit`.
            QueueFullError: Too much waits.
            ClosedError: The batcher is closed.
            ValueError: The model takes no such shape.
        """
        with self._room_for(runner, part, shape):
            await self._admitted_memory(runner, part, shape, output)

    async def submit(
        self,
        runner: Runner,
        part: str,
        tensor: Tensor,
        output: Output = "sample",
        take: TakeFrames | None = None,
    ) -> Outcome:
        """Run a tensor when its turn comes.

        If the caller is cancelled while the tensor waits, it is not run. If all callers of a
        run are cancelled, it is stopped.

        Args:
            runner: The model.
            part: Which part of it.
            tensor: `(N, C, H, W)`, of videos `(N, C, T, H, W)`; not to be written to any more.
            output: What the run gives, by default floats.
            take: What takes the frames if these are the output.

        Raises:
            TooLargeError, QueueFullError, ClosedError, ValueError: As `check`.
            Exception: What the run raised.
        """
        arrived, shape = time.monotonic(), tuple(tensor.shape)
        with self._room_for(runner, part, shape) as weight:
            memory = await self._admitted_memory(runner, part, shape, output)
        # Nothing can come between: the room that it had is the room that it takes now.
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        job = _Job(runner, part, tensor, output, take, weight, memory, arrived, done)
        self._waiting.append(job)
        self._wake()
        try:
            return await done
        finally:
            if job in self._waiting:
                self._waiting.remove(job)
                self._wake()

    def drain(self) -> None:
        """Let no batch wait for others to join it, now and from now on."""
        self._draining = True
        self._wake()

    async def close(self) -> None:
        """Take nothing more, and return when all that was admitted is done.

        What still waits for its plan is not admitted: it gets a `ClosedError`.
        """
        self._closed = True
        self.drain()
        if self._scheduler is not None:
            await asyncio.wait([self._scheduler])
        self._threads.shutdown()
        self._planner.close()

    # Admission

    @contextlib.contextmanager
    def _room_for(self, runner: Runner, part: str, shape: Shape) -> Iterator[float]:
        """Keep room in the queue for what is being planned, which gives its weight."""
        if self._closed:
            raise ClosedError
        weight = max(_LEAST_WEIGHT, runner.weight(part, shape))
        waiting = self.waiting
        # Alone it may be larger than the queue: nothing that fits in memory is shut out.
        if waiting and waiting + weight > self.options.queue:
            raise QueueFullError(max(1, math.ceil(waiting * self._seconds_per_weight)))
        self._planned.append(weight)
        try:
            yield weight
        finally:
            self._planned.remove(weight)

    async def _admitted_memory(
        self, runner: Runner, part: str, shape: Shape, output: Output
    ) -> int:
        """Bytes that a run of its own takes, if that is no more than the limit."""
        limit = self.options.memory_limit
        try:
            needed = await self._planner.memory_needed(runner, part, shape)
        except MemoryError as error:
            raise TooLargeError(str(error)) from error
        needed += runner.whole_video(shape, output)
        if self._closed:
            raise ClosedError
        if limit is not None and needed > limit:
            raise TooLargeError(
                f"A run of the {part} on {'x'.join(map(str, shape))} needs {format_bytes(needed)} "
                f"besides the weights, and this server gives {format_bytes(limit)} to runs."
            )
        return needed

    # Scheduling

    def _wake(self) -> None:
        """Have the scheduler look at what has changed, and start it if there is work again."""
        if self._scheduler is None or self._scheduler.done():
            if not self._waiting:
                return
            self._changed = asyncio.Event()
            self._scheduler = asyncio.get_running_loop().create_task(self._schedule())
        self._changed.set()

    async def _schedule(self) -> None:
        """Start one batch after the other, as time, memory and threads allow."""
        while self._waiting or self._running:
            self._changed.clear()
            patience = None
            if len(self._running) < self.options.concurrency:
                jobs, patience = self._next_jobs()
                batch = await self._fill(jobs)
                if batch is not None:
                    self._start(batch)
                    continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), patience)

    def _next_jobs(self) -> tuple[list[_Job], float | None]:
        """The oldest jobs of a kind that need not wait for more, as far as a batch may hold them.

        Returns:
            The jobs, and if there are none, the seconds after which there will be.
        """
        now, earliest = time.monotonic(), math.inf
        kinds: dict[object, list[_Job]] = {}
        for job in self._waiting:
            kinds.setdefault(job.kind, []).append(job)
        for alike in kinds.values():
            samples = list(itertools.accumulate(job.shape[0] for job in alike))
            count = max(1, sum(total <= self.options.max_batch for total in samples))
            ripe = alike[0].arrived + self.options.max_wait
            full = samples[count - 1] >= self.options.max_batch
            if full or self._draining or now >= ripe:
                return alike[:count], None
            earliest = min(earliest, ripe)
        return [], max(0.0, earliest - now) if kinds else None

    async def _fill(self, jobs: list[_Job]) -> _Batch | None:
        """As many of the jobs as there is memory for; `None` if that is none now.

        The most come first: usually there is memory, and then one plan is made, that of the
        run itself.
        """
        for count in range(len(jobs), 0, -1):
            some = jobs[:count]
            needed = await self._memory_of(some)
            if not all(job in self._waiting for job in some):
                return None  # somebody has left meanwhile, which has woken the scheduler
            limit = self.options.memory_limit
            if needed is not None and (limit is None or self.memory + needed <= limit):
                return _Batch(some, needed)
        return None

    async def _memory_of(self, jobs: Sequence[_Job]) -> int | None:
        """Bytes that jobs take together; `None` if they can't be run so."""
        first = jobs[0]
        if len(jobs) == 1 or not first.runner.exact_batches:
            return max(job.memory for job in jobs)
        shape = (sum(job.shape[0] for job in jobs), *first.shape[1:])
        try:
            # The thread that will run them has nothing to do yet.
            return await self._planner.memory_needed(first.runner, first.part, shape, self._threads)
        except Exception:  # whatever it is, fewer of them may do
            return None

    def _start(self, batch: _Batch) -> None:
        self._waiting = [job for job in self._waiting if job not in batch.jobs]
        self._running.add(batch)
        asyncio.get_running_loop().run_in_executor(self._threads, self._run, batch)

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

    def _run_together(self, jobs: Sequence[_Job], loop: asyncio.AbstractEventLoop) -> None:
        first = jobs[0]
        sizes = [job.shape[0] for job in jobs]

        def nobody_waits() -> bool:
            return all(job.done.done() for job in jobs)

        started = time.monotonic()
        try:
            tensor = first.tensor if len(jobs) == 1 else torch.cat([job.tensor for job in jobs])
            finite = torch.ones(len(tensor), dtype=torch.bool)
            if first.take is not None:
                with contextlib.closing(first.runner.decode_frames(tensor, nobody_waits)) as frames:
                    first.take(frames)
                result = torch.empty(len(tensor), 0)
            elif first.output == "pictures":
                result, finite = first.runner.decode_images(tensor, nobody_waits)
            else:
                result = first.runner.run(first.part, tensor, nobody_waits)
        except Exception as error:
            for job in jobs:
                loop.call_soon_threadsafe(_fail, job, error)
            return
        ran = time.monotonic() - started
        parts = zip(torch.split(result, sizes), torch.split(finite, sizes), strict=True)
        for job, (tensor, of_job) in zip(jobs, parts, strict=True):
            waited = started - job.arrived
            outcome = Outcome(tensor, bool(of_job.all()), waited, ran, sum(sizes))
            loop.call_soon_threadsafe(_succeed, job, outcome)

    # Back in the event loop

    def _finished(self, batch: _Batch, seconds: float) -> None:
        self._running.remove(batch)
        if not all(job.done.cancelled() for job in batch.jobs):  # else it was cut short
            latest = seconds / math.fsum(job.weight for job in batch.jobs)
            self._seconds_per_weight += _NEW_RATE * (latest - self._seconds_per_weight)
        self._wake()


def _succeed(job: _Job, outcome: Outcome) -> None:
    if not job.done.done():
        job.done.set_result(outcome)


def _fail(job: _Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
