"""The batcher runs what waits as memory and time allow, and gives each what it would get alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from services import PATIENCE

from rbln_vae.serving.batcher import (
    Batcher,
    BatcherOptions,
    ClosedError,
    Outcome,
    QueueFullError,
    TooLargeError,
)


class Doubler:
    """A model that doubles, whose runs wait for a gate; a row of 4 numbers costs 1 byte."""

    def __init__(self, name: str = "doubler", *, exact: bool = True, is_open: bool = True) -> None:
        self.name, self.exact_batches = name, exact
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.runs: list[tuple[int, ...]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def memory_needed(self, part: str, shape: tuple[int, ...]) -> int:
        return shape[0]

    def weight(self, part: str, shape: tuple[int, ...]) -> float:
        return shape[0]

    def run(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
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


async def occupied(batcher: Batcher, runner: Doubler) -> asyncio.Future[Outcome]:
    """Have one run under way, which waits for the gate of its model."""
    first = start(batcher, runner, rows(0))
    while not runner.runs:
        await asyncio.sleep(0.001)
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
        jobs += [start(batcher, model, rows(i)) for i in range(1, 6)]
        await asyncio.sleep(0.01)
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [1, 3, 2]
        assert [outcome.batch for outcome in outcomes] == [1, 3, 3, 3, 2, 2]

    run(main())


def test_a_request_of_several_samples_counts_as_many() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=4)), Doubler(is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += [start(batcher, model, rows(*values)) for values in ((1, 2, 3), (4, 5), (6,) * 9)]
        await asyncio.sleep(0.01)
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
        jobs.append(start(batcher, model, rows(1)))
        jobs.append(start(batcher, model, rows(1, width=5)))
        jobs.append(start(batcher, model, rows(1).double()))
        jobs.append(start(batcher, model, rows(1), part="encoder"))
        jobs.append(start(batcher, other, rows(1)))
        await asyncio.sleep(0.01)
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        assert all(outcome.batch == 1 for outcome in outcomes)
        assert outcomes[3].tensor.dtype == torch.float64

    run(main())


def test_where_a_batch_would_change_bits_each_runs_by_itself() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(exact=False, is_open=False)
        jobs = [await occupied(batcher, model)]
        jobs += [start(batcher, model, rows(i)) for i in range(1, 4)]
        await asyncio.sleep(0.01)
        model.gate.set()
        outcomes = await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [1, 1, 1, 1]
        assert torch.equal(outcomes[3].tensor, rows(6))

    run(main())


def test_waits_for_others_no_longer_than_max_wait() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions(max_batch=3, max_wait=0.2)), Doubler()
        jobs = [start(batcher, model, rows(1))]
        await asyncio.sleep(0.05)
        assert not model.runs
        jobs.append(start(batcher, model, rows(2)))
        outcomes = await asyncio.gather(*jobs)
        assert [shape[0] for shape in model.runs] == [2]
        assert outcomes[0].waited >= 0.2

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
        jobs += [start(batcher, model, rows(i)) for i in range(5)]
        await asyncio.sleep(0.01)
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
        while len(model.runs) < 2:
            await asyncio.sleep(0.001)
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
        jobs.append(start(batcher, model, rows(1, 1, 1, 1)))
        jobs.append(start(batcher, model, rows(1)))
        await asyncio.sleep(0.01)
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
        jobs += [start(batcher, model, rows(i)) for i in (1, 2)]
        await asyncio.sleep(0.01)
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
        leaving, staying = (start(batcher, model, rows(i)) for i in (1, 2))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0.01)
        assert batcher.waiting == 1
        model.gate.set()
        await asyncio.gather(first, staying)
        assert len(model.runs) == 2

    run(main())


def test_who_gives_up_in_a_batch_that_runs_one_by_one_is_left_out() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(exact=False, is_open=False)
        first = await occupied(batcher, model)
        jobs = [start(batcher, model, rows(i)) for i in (1, 2, 3)]
        await asyncio.sleep(0.01)
        model.gate.set()
        await first
        model.gate.clear()
        while len(model.runs) < 2:
            await asyncio.sleep(0.001)
        jobs[1].cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(jobs[0], jobs[2])
        assert len(model.runs) <= 4

    run(main())


def test_a_failed_run_fails_those_in_it_and_nobody_else() -> None:
    async def main() -> None:
        batcher, model = Batcher(BatcherOptions()), Doubler(is_open=False)
        first = await occupied(batcher, model)
        jobs = [start(batcher, model, rows(value)) for value in (-1, 1)]
        await asyncio.sleep(0.01)
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
        job = start(batcher, model, rows(1))
        await asyncio.sleep(0.01)
        await batcher.close()
        assert torch.equal((await job).tensor, rows(2))
        with pytest.raises(ClosedError):
            await start(batcher, model, rows(1))

    run(main())


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"queue": 0}, {"concurrency": 0}, {"max_wait": -1.0}]
)
def test_refuses_options_that_make_no_sense(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        BatcherOptions(**options)
