"""The planner asks models in a thread, once for each shape, and for nobody who has gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from services import PATIENCE

from rbln_vae.serving.planner import Planner
from rbln_vae.targets.watch import ShouldStop

Shape = tuple[int, ...]


class Slow:
    """A model whose plans wait for a gate, and are noted."""

    name, exact_batches = "slow", True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[Shape] = []
        self.threads: set[int] = set()

    def memory_needed(self, part: str, shape: Shape) -> int:
        self.begun.append(shape)
        self.threads.add(threading.get_ident())
        assert self.gate.wait(PATIENCE)
        if shape[0] > 9:
            raise MemoryError("too large")
        return 10 * shape[0]

    def weight(self, part: str, shape: Shape) -> float:
        return 1

    def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
        raise AssertionError("nothing is run")


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, PATIENCE))


def ask(planner: Planner, model: Slow, count: int) -> asyncio.Future[int]:
    return asyncio.ensure_future(planner.memory_needed(model, "decoder", (count,)))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_all_plans_are_made_in_one_thread_which_is_not_that_of_the_loop() -> None:
    async def main() -> None:
        planner, model = Planner(), Slow()
        plans = [ask(planner, model, count) for count in range(5)]
        await until(lambda: model.begun)
        model.gate.set()
        assert await asyncio.gather(*plans) == [0, 10, 20, 30, 40]
        assert len(model.threads) == 1
        assert threading.get_ident() not in model.threads

    run(main())


def test_a_plan_is_made_once_for_all_who_ask() -> None:
    async def main() -> None:
        planner, model = Planner(), Slow()
        plans = [ask(planner, model, 2) for _ in range(5)]
        await until(lambda: model.begun)
        model.gate.set()
        assert await asyncio.gather(*plans) == [20] * 5
        assert await ask(planner, model, 2) == 20
        assert model.begun == [(2,)]

    run(main())


def test_what_is_known_is_said_without_a_pause() -> None:
    async def main() -> None:
        planner, model = Planner(), Slow()
        model.gate.set()
        await ask(planner, model, 1)
        model.gate.clear()
        slow = ask(planner, model, 2)
        await until(lambda: len(model.begun) == 2)
        known = ask(planner, model, 1)
        await asyncio.sleep(0)
        assert known.done()
        model.gate.set()
        await slow

    run(main())


def test_that_there_is_no_plan_is_remembered_too() -> None:
    async def main() -> None:
        planner, model = Planner(), Slow()
        model.gate.set()
        for _ in range(2):
            with pytest.raises(MemoryError, match="too large"):
                await ask(planner, model, 10)
        assert model.begun == [(10,)]

    run(main())


def test_a_plan_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def main() -> None:
        planner, model = Planner(), Slow()
        first, left, shared, stays = (ask(planner, model, count) for count in (1, 2, 3, 3))
        await until(lambda: model.begun)
        left.cancel()
        shared.cancel()
        await until(lambda: left.done() and shared.done())
        model.gate.set()
        assert await first == 10
        assert await stays == 30
        assert model.begun == [(1,), (3,)]
        assert await ask(planner, model, 2) == 20

    run(main())


def test_who_leaves_while_the_plan_is_made_does_not_take_it_from_others() -> None:
    async def main() -> None:
        planner, model = Planner(), Slow()
        left, stays = ask(planner, model, 1), ask(planner, model, 1)
        await until(lambda: model.begun)
        left.cancel()
        await until(left.done)
        model.gate.set()
        assert await stays == 10
        assert model.begun == [(1,)]

    run(main())
