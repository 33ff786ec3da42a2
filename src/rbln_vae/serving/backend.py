"""Backends, which run models for the HTTP application."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .batcher import Batcher, Outcome
from .models import ModelInfo, PlannedRun, ServedModel, Shape
from .settings import BatcherOptions


class Backend(Protocol):
    """Runs tensors, in this process or elsewhere."""

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The models by name; the first is the default."""

    async def check(self, model: str, part: str, shape: Shape) -> None:
        """Raise the exception that `run` would raise now; called before a body is read."""

    async def run(self, model: str, part: str, tensor: Tensor, pictures: bool = False) -> Outcome:
        """Run a tensor, or decode it to pictures.

        If the caller is cancelled, a waiting tensor is not run, and a run stops unless other
        callers wait for it.

        Raises:
            TooLargeError, QueueFullError, ClosedError: The tensor is not admitted.
            Exception: The run failed.
        """

    async def plan(self, model: str) -> list[PlannedRun]:
        """What images of usual sizes take."""

    def load(self) -> Mapping[str, float]:
        """The load for metrics: `waiting`, `running` and `memory`."""

    def drain(self) -> None:
        """Start batches that wait for more requests; called when the server shuts down."""

    async def close(self) -> None:
        """Admit nothing more, and return when all admitted work is done."""


class LocalBackend:
    """Models and a batcher in this process."""

    def __init__(self, models: Sequence[ServedModel], options: BatcherOptions) -> None:
        self._models = {model.name: model for model in models}
        self._batcher = Batcher(options)
        self._plans: dict[str, asyncio.Future[list[PlannedRun]]] = {}

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        return {name: model.info for name, model in self._models.items()}

    async def check(self, model: str, part: str, shape: Shape) -> None:
        await self._batcher.check(self._models[model], part, shape)

    async def run(self, model: str, part: str, tensor: Tensor, pictures: bool = False) -> Outcome:
        return await self._batcher.submit(self._models[model], part, tensor, pictures)

    async def plan(self, model: str) -> list[PlannedRun]:
        if model not in self._plans:
            made = asyncio.to_thread(self._models[model].plan)
            self._plans[model] = asyncio.ensure_future(made)
        return await asyncio.shield(self._plans[model])  # others may wait for it, too

    def load(self) -> Mapping[str, float]:
        batcher = self._batcher
        return {"waiting": batcher.waiting, "running": batcher.running, "memory": batcher.memory}

    def drain(self) -> None:
        self._batcher.drain()

    async def close(self) -> None:
        await self._batcher.close()
