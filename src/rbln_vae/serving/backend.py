"""Backends, which run models for the HTTP application."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..models.family import DECODER
from ..videos import write_video
from .batcher import Batcher, Outcome
from .models import ModelInfo, Output, PlannedRun, ServedModel, Shape
from .pipe import Pipe
from .settings import BatcherOptions


class Backend(Protocol):
    """Runs tensors, in this process or elsewhere."""

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The models by name; the first is the default."""

    async def check(self, model: str, part: str, shape: Shape, output: Output = "sample") -> None:
        """Raise the exception that `run` would raise now; called before a body is read."""

    async def run(
        self, model: str, part: str, tensor: Tensor, output: Output = "sample"
    ) -> Outcome:
        """Run a tensor, or decode it to pictures.

        If the caller is cancelled, a waiting tensor is not run, and a run stops unless other
        callers wait for it.

        Raises:
            TooLargeError, QueueFullError, ClosedError: The tensor is not admitted.
            Exception: The run failed.
        """

    def video(
        self, model: str, latent: Tensor, fps: float
    ) -> AsyncGenerator[bytes | Outcome, None]:
        """Decode the latent of a video `(1, C, T, H, W)` to the bytes of an MP4.

        If the generator is closed, the run stops.

        Yields:
            Bytes as they are written, and at the end how it came about.

        Raises:
            TooLargeError, QueueFullError, ClosedError, Exception: As `run`.
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

    async def check(self, model: str, part: str, shape: Shape, output: Output = "sample") -> None:
        await self._batcher.check(self._models[model], part, shape, output)

    async def run(
        self, model: str, part: str, tensor: Tensor, output: Output = "sample"
    ) -> Outcome:
        return await self._batcher.submit(self._models[model], part, tensor, output)

    async def video(
        self, model: str, latent: Tensor, fps: float
    ) -> AsyncGenerator[bytes | Outcome, None]:
        pipe = Pipe()
        take = functools.partial(write_video, pipe, fps=fps)
        run = asyncio.ensure_future(
            self._batcher.submit(self._models[model], DECODER, latent, "frames", take)
        )
        run.add_done_callback(lambda _: pipe.end())
        try:
            while data := await pipe.read():
                yield data
            yield await run
        finally:
            run.cancel()
            pipe.close()

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
