"""The batcher runs what waits as memory and time allow, and gives each what it would get alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from services import PATIENCE

from rbln_vae.errors import RBLNCancelledError
from rbln_vae.serving.batcher import (
    Batcher,
    ClosedError,
    Outcome,
    QueueFullError,
    TooLargeError,
)
from rbln_vae.serving.settings import BatcherOptions
from rbln_vae.targets.watch import ShouldStop


class Doubler:
    """A model that doubles, whose runs wait for a gate; a sample costs 1 byte.

    Plans of the shapes in `slow` wait, too, until the test lets them go.
    """

    def __init__(self, name: str = "doubler", *, exact: bool = True, is_open: bool = True) -> None:
        self.name, self.exact_batches = name, exact
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.runs: list[tuple[int, ...]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.slow: dict[tuple[int, ...], threading.Event] = {}
        self.plans: list[tuple[int, ...]] = []

    def memory_needed(self, part: str, shape: tuple[int, ...]) -> int:
        self.plans.append(shape)
        if shape in self.slow:
            assert self.slow[shape].wait(PATIENCE)
        return shape[0]

    def weight(self, part: str, shape: tuple[int, ...]) -> float:
        return shape[0]

    def whole_video(self, shape: tuple[int, ...], output: str) -> int:
        return 0

    def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
        with self.lock:
            self.runs.append(tuple(tensor.shape))
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.gate.wait(PATIENCE)
        with self.lock:
            self.now -= 1
        if bool((tensor < 0).any()):
            raise ArithmeticError("negative")
        return tensor * 2


def rows(*values: float, width: int = 4) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, width, 1, 1).clone()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, PATIENCE))


def start(batcher: Batcher, runner: Doubler, tensor: torch.Tensor, part: str = "decoder") -> Any:
    return asyncio.ensure_future(batcher.submit(runner, part, tensor))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def queued(
    batcher: Batcher, runner: Doubler, *tensors: torch.Tensor, part: str = "decoder"
) -> list[Any]:
    """Have tensors wait for their run: planned, as the service does it, and then submitted."""
    jobs = []
    for tensor in tensors:
        await batcher.check(runner, part, tuple(tensor.shape))
        jobs.append(start(batcher, runner, tensor, part))
        await asyncio.sleep(0)
    return jobs


async def occupied(batcher: Batcher, runner: Doubler) -> asyncio.Future[Outcome]:
    """Have one run under way, which waits for the gate of its model."""
    first = start(batcher, runner, rows(0))
    await until(lambda: runner.runs)
    return first


def test_gives_each_its_own_result() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler()
        outcomes = await asyncio.gather(*(start(batcher, model, rows(i)) for i in range(20)))
        for i, outcome in enumerate(outcomes):
            assert torch.equal(outcome.tensor, rows(2 * i))
            assert outcome.waited >= 0
            assert outcome.ran >= 0

    run(main())


def test_what_waits_runs_together_up_to_max_batch() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=3)), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, *(rows(i) for i in range(1, 6)))
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [1, 3, 2]
        assert [outcome.batch for outcome in outcomes] == [1, 3, 3, 3, 2, 2]

    run(main())


def test_a_request_of_several_samples_counts_as_many() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=4)), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        tensors = rows(1, 2, 3), rows(4, 5), rows(*(6,) * 9)
        jobs += await queued(batcher, model, *tensors)
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        # More than max_batch in one request is its own affair.
        assert [shape[0] for shape in model.runs] == [1, 3, 2, 9]
        assert torch.equal(outcomes[2].tensor, rows(8, 10))

    run(main())


def test_only_what_is_alike_runs_together() -> None:
    async def main() -> None:
        batcher, model, other = Batcher(BatcherOptions()), Doubler(is_open=False), Doubler("other")
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, rows(1), rows(1, width=5), rows(1).double())
        jobs += await queued(batcher, model, rows(1), part="encoder")
        jobs += await queued(batcher, other, rows(1))
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        assert all(outcome.batch == 1 for outcome in outcomes)
        assert outcomes[3].tensor.dtype == torch.float64

    run(main())


def test_where_a_batch_would_change_bits_each_runs_by_itself() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(exact=False, is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, *(rows(i) for i in range(1, 4)))
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [1, 1, 1, 1]
        assert torch.equal(outcomes[3].tensor, rows(6))

    run(main())


def test_who_waits_for_others_is_joined_by_those_who_come() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=3, max_wait=PATIENCE * 2)), Doubler()
        jobs = await queued(batcher, model, rows(1), rows(2))
        assert not model.runs
        jobs += await queued(batcher, model, rows(3))
        await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [3]

    run(main())


def test_waits_for_others_no_longer_than_max_wait() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=3, max_wait=0.05)), Doubler()
        outcome = await start(batcher, model, rows(1))
        assert [shape[0] for shape in model.runs] == [1]
        assert outcome.waited >= 0.05

    run(main())


def test_draining_waits_for_others_no_longer() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_wait=PATIENCE * 2)), Doubler()
        jobs = await queued(batcher, model, rows(1), rows(2))
        batcher.drain()
        await asyncio.gather(*jobs)
        # Nor does what comes later.
        await start(batcher, model, rows(3))
        assert [shape[0] for shape in model.runs] == [2, 1]

    run(main())


def test_a_full_batch_waits_for_nobody() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=2, max_wait=PATIENCE * 2)), Doubler()
        await asyncio.gather(*(start(batcher, model, rows(i)) for i in (1, 2)))
        assert [shape[0] for shape in model.runs] == [2]

    run(main())


def test_a_batch_keeps_to_the_memory_that_there_is() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(memory_limit=2)), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, *(rows(i) for i in range(5)))
        assert batcher.memory == 1
        model.gate.set()
        await asyncio.gather(*jobs)
        assert max(shape[0] for shape in model.runs) == 2

    run(main())


def test_runs_at_once_keep_to_memory_and_concurrency() -> None:
    async def main() -> None:
        options = BatcherOptions(memory_limit=5, concurrency=4, max_batch=1)
        batcher, model = Batcher(options), Doubler(is_open=False)
        jobs = [start(batcher, model, rows(i, i)) for i in range(4)]
        await until(lambda: len(model.runs) == 2)
        assert batcher.memory == 4
        assert batcher.running == 2
        model.gate.set()
        await asyncio.gather(*jobs)
        assert model.most == 2

    run(main())


def test_a_large_request_is_not_overtaken_by_small_ones_for_ever() -> None:
    async def main() -> None:
        options = BatcherOptions(memory_limit=4, concurrency=2, max_batch=1)
        batcher, model = Batcher(options), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, rows(1, 1, 1, 1), rows(1))
        await batcher.check(model, "decoder", (1, 4, 1, 1))
        assert model.runs == [(1, 4, 1, 1)]
        model.gate.set()
        await asyncio.gather(*jobs)
        assert model.runs[1] == (4, 4, 1, 1)

    run(main())


def test_what_never_fits_in_memory_is_refused_at_once() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(memory_limit=2)), Doubler()
        with pytest.raises(TooLargeError, match=r"needs 3 bytes .* gives 2"):
            await start(batcher, model, rows(1, 2, 3))
        assert not model.runs

    run(main())


def test_beyond_the_queue_is_refused_with_a_time_to_come_back() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(queue=2)), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, rows(1), rows(2))
        assert batcher.waiting == 2
        with pytest.raises(QueueFullError) as caught:
            await start(batcher, model, rows(3))
        assert caught.value.retry_after >= 1
        model.gate.set()
        await asyncio.gather(*jobs)
        assert torch.equal((await start(batcher, model, rows(3))).tensor, rows(6))

    run(main())


def test_a_request_larger_than_the_queue_gets_its_turn() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(queue=2)), Doubler()
        outcome = await start(batcher, model, rows(1, 2, 3))
        assert torch.equal(outcome.tensor, rows(2, 4, 6))

    run(main())


def test_who_gives_up_while_waiting_is_not_run_and_leaves_the_queue() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=1)), Doubler(is_open=False)
        first = await occupied(batcher, model)
        leaving, staying = await queued(batcher, model, rows(1), rows(2))
        leaving.cancel()
        await until(leaving.done)
        assert batcher.waiting == 1
        model.gate.set()
        await asyncio.gather(first, staying)
        assert len(model.runs) == 2

    run(main())


def test_who_gives_up_in_a_batch_that_runs_one_by_one_is_left_out() -> None:
    class Stepwise(Doubler):
        """A model each of whose runs waits for a word of its own."""

        def __init__(self) -> None:
            super().__init__(exact=False)
            self.words = threading.Semaphore(0)

        def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
            result = super().run(part, tensor, should_stop)
            assert self.words.acquire(timeout=PATIENCE)
            return result

    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Stepwise()
        first = await occupied(batcher, model)
        jobs = await queued(batcher, model, rows(1), rows(2), rows(3))
        model.words.release()
        await first
        await until(lambda: len(model.runs) == 2)
        jobs[1].cancel()
        await until(jobs[1].done)
        model.words.release(2)
        await asyncio.gather(jobs[0], jobs[2])
        assert len(model.runs) == 3

    run(main())


def test_a_run_is_stopped_when_the_last_who_waits_for_it_has_gone() -> None:
    class Stoppable(Doubler):
        """A model whose runs end when they are stopped, but those of ones."""

        asked = 0

        def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
            result = super().run(part, tensor, should_stop)
            while not bool((tensor == 1).any()):
                if should_stop():
                    raise RBLNCancelledError("stopped")
                self.asked += 1
                time.sleep(0.001)
            return result

    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Stoppable()
        # Those that wait for a plan at once run together.
        jobs = [start(batcher, model, rows(0)) for _ in range(2)]
        await until(lambda: model.runs == [(2, 4, 1, 1)])
        jobs[0].cancel()
        await until(jobs[0].done)
        asked = model.asked
        await until(lambda: model.asked > asked + 2)
        assert batcher.running == 1
        jobs[1].cancel()
        await until(lambda: batcher.running == 0)
        assert torch.equal((await start(batcher, model, rows(1))).tensor, rows(2))

    run(main())


def test_a_failed_run_fails_those_in_it_and_nobody_else() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(is_open=False)
        first = await occupied(batcher, model)
        jobs = await queued(batcher, model, rows(-1), rows(1))
        model.gate.set()
        failed = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(each) for each in failed] == [ArithmeticError, ArithmeticError]
        await first
        assert torch.equal((await start(batcher, model, rows(5))).tensor, rows(10))

    run(main())


def test_closing_finishes_what_was_admitted_and_takes_nothing_more() -> None:
    async def main() -> None:
        # Even what waits for others does so no longer.
        batcher = Batcher(BatcherOptions(max_wait=PATIENCE * 2))
        model = Doubler()
        (job,) = await queued(batcher, model, rows(1))
        await batcher.close()
        assert torch.equal((await job).tensor, rows(2))
        with pytest.raises(ClosedError):
            await start(batcher, model, rows(1))

    run(main())


# Plans


def test_others_are_admitted_and_run_while_a_plan_is_made() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler()
        await start(batcher, model, rows(1))
        model.slow[2, 4, 1, 1] = threading.Event()
        slow = start(batcher, model, rows(2, 3))
        await until(lambda: (2, 4, 1, 1) in model.plans)
        assert torch.equal((await start(batcher, model, rows(4))).tensor, rows(8))
        assert not slow.done()
        model.slow[2, 4, 1, 1].set()
        assert torch.equal((await slow).tensor, rows(4, 6))

    run(main())


def test_others_are_admitted_while_a_batch_is_planned() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=2)), Doubler(is_open=False)
        model.slow[2, 4, 1, 1] = threading.Event()
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, rows(1), rows(2))
        model.gate.set()
        await until(lambda: (2, 4, 1, 1) in model.plans)
        jobs += await queued(batcher, model, rows(3), rows(4, width=5))
        assert model.runs == [(1, 4, 1, 1)]
        model.slow[2, 4, 1, 1].set()
        await asyncio.gather(*jobs)
        assert model.runs[1] == (2, 4, 1, 1)

    run(main())


def test_what_is_being_planned_takes_its_room_in_the_queue() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(queue=3)), Doubler()
        model.slow = {(1, width, 1, 1): threading.Event() for width in range(1, 4)}
        jobs = [start(batcher, model, rows(1, width=width)) for width in range(1, 4)]
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        with pytest.raises(QueueFullError):
            await batcher.check(model, "decoder", (1, 4, 1, 1))
        for event in model.slow.values():
            event.set()
        await asyncio.gather(*jobs)
        assert batcher.waiting == 0
        await batcher.check(model, "decoder", (1, 4, 1, 1))

    run(main())


def test_who_gives_up_while_being_planned_leaves_the_queue_and_is_not_run() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(queue=1)), Doubler()
        model.slow[1, 4, 1, 1] = threading.Event()
        leaving = start(batcher, model, rows(1))
        await until(lambda: model.plans)
        leaving.cancel()
        await until(leaving.done)
        assert batcher.waiting == 0
        model.slow[1, 4, 1, 1].set()
        await start(batcher, model, rows(1, width=5))
        assert model.runs == [(1, 5, 1, 1)]

    run(main())


def test_a_batch_that_can_not_be_planned_runs_in_smaller_ones() -> None:
    class Limited(Doubler):
        def memory_needed(self, part: str, shape: tuple[int, ...]) -> int:
            if shape[0] > 2:
                raise MemoryError("no plan for more than 2")
            return super().memory_needed(part, shape)

    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(memory_limit=10)), Limited(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, *(rows(i) for i in range(5)))
        model.gate.set()
        await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [1, 2, 2, 1]

    run(main())


def test_of_a_batch_that_fits_no_smaller_one_is_planned() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, *(rows(i) for i in range(5)))
        model.gate.set()
        await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.plans] == [1, 5]

    run(main())


def test_who_leaves_while_the_batch_is_planned_is_not_in_it() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(is_open=False)
        model.slow[3, 4, 1, 1] = threading.Event()
        first = await occupied(batcher, model)
        jobs = await queued(batcher, model, *(rows(i) for i in range(3)))
        model.gate.set()
        await until(lambda: (3, 4, 1, 1) in model.plans)
        jobs[1].cancel()
        await until(jobs[1].done)
        model.slow[3, 4, 1, 1].set()
        await asyncio.gather(first, jobs[0], jobs[2])
        assert [shape[0] for shape in model.runs] == [1, 2]

    run(main())


def test_closing_does_not_admit_what_is_being_planned() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler()
        model.slow[1, 4, 1, 1] = threading.Event()
        job = start(batcher, model, rows(1))
        await until(lambda: model.plans)
        await batcher.close()
        model.slow[1, 4, 1, 1].set()
        with pytest.raises(ClosedError):
            await job
        assert not model.runs

    run(main())


def test_closing_finishes_a_batch_that_is_being_planned() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(is_open=False)
        model.slow[2, 4, 1, 1] = threading.Event()
        jobs = [await occupied(batcher, model)]
        jobs += await queued(batcher, model, rows(1), rows(2))
        model.gate.set()
        await until(lambda: (2, 4, 1, 1) in model.plans)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        model.slow[2, 4, 1, 1].set()
        await asyncio.gather(closing, *jobs)
        assert [shape[0] for shape in model.runs] == [1, 2]

    run(main())


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"queue": 0}, {"concurrency": 0}, {"max_wait": -1.0}]
)
def test_refuses_options_that_make_no_sense(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        BatcherOptions(**options)
