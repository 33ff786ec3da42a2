"""Finds the memory that runs need, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from .models import Runner, Shape

_MOST_KNOWN = 1024

_Key = tuple[str, str, Shape]
_Found = int | MemoryError | ValueError


@dataclass
class _Work:
    """A plan in progress, and the number of callers that wait for it."""

    future: asyncio.Future[_Found]
    waiters: int = 0


class Planner:
    """Asks models for the memory of a run in a thread, and caches the answers.

    All methods must be called in one event loop. The planner has a single thread: planning is
    Python code, so more threads would only compete with each other and with the event loop.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._known: OrderedDict[_Key, _Found] = OrderedDict()
        self._under_way: dict[_Key, _Work] = {}

    async def memory_needed(
        self, runner: Runner, part: str, shape: Shape, executor: Executor | None = None
    ) -> int:
        """The bytes that a run needs; returns immediately if they are cached.

        Concurrent calls for the same run share one plan. A plan is not started if no caller
        waits for it any more.

        Args:
            runner: The model; it is identified by its name.
            part: The part of the model.
            shape: The shape of the input.
            executor: The executor for the plan; `None` is the planner's own thread, which
                makes one plan at a time.

        Raises:
            MemoryError, ValueError: The model raised it; the exception is cached, too.
        """
        key = (runner.name, part, shape)
        if key not in self._known:
            self._known[key] = await self._made(key, runner, executor or self._thread)
        self._known.move_to_end(key)
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        found = self._known[key]
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    async def _made(self, key: _Key, runner: Runner, executor: Executor) -> _Found:
        work = self._under_way.get(key)
        if work is None:
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(executor, _plan, runner, *key[1:])
            work = self._under_way[key] = _Work(future)
        work.waiters += 1
        try:
            return await asyncio.shield(work.future)
        finally:
            work.waiters -= 1
            if not work.waiters:
                del self._under_way[key]
                work.future.cancel()

    def close(self) -> None:
        """Let the thread end after the plans that callers still wait for."""
        self._thread.shutdown(wait=False)


def _plan(runner: Runner, part: str, shape: Shape) -> _Found:
    try:
        return runner.memory_needed(part, shape)
    except (MemoryError, ValueError) as error:
        return error
