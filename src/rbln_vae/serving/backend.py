"""Where runs happen, as the HTTP application sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .batcher import Batcher, Outcome
from .models import ModelInfo, ServedModel, Shape
from .settings import BatcherOptions


class Backend(Protocol):
    """Runs tensors, in this process or elsewhere."""

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The models by name; the first is what a request gets that names none."""

    async def check(self, model: str, part: str, shape: Shape) -> None:
        """Raise what `run` would raise now; called before a body is read."""

    async def run(self, model: str, part: str, tensor: Tensor) -> Outcome:
        """Run a tensor; if the caller is cancelled, it is not run, or stopped if it runs alone.

        Raises:
            TooLargeError, QueueFullError, ClosedError: It isn't admitted.
            Exception: What the run raised.
        """

    def load(self) -> Mapping[str, float]:
        """What to show of the load: `waiting`, `running`, `memory`."""

    def drain(self) -> None:
        """Start what waits for others to join it; called when the end is near."""

    async def close(self) -> None:
        """Take nothing more, and return when all that was admitted is done."""


class LocalBackend:
    """Models and a batcher in this process."""

    def __init__(self, models: Sequence[ServedModel], options: BatcherOptions) -> None:
        self._models = {model.name: model for model in models}
        self._batcher = Batcher(options)

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        return {name: model.info for name, model in self._models.items()}

    async def check(self, model: str, part: str, shape: Shape) -> None:
        await self._batcher.check(self._models[model], part, shape)

    async def run(self, model: str, part: str, tensor: Tensor) -> Outcome:
        return await self._batcher.submit(self._models[model], part, tensor)

    def load(self) -> Mapping[str, float]:
        batcher = self._batcher
        return {"waiting": batcher.waiting, "running": batcher.running, "memory": batcher.memory}

    def drain(self) -> None:
        self._batcher.drain()

    async def close(self) -> None:
        await self._batcher.close()
