"""The service on Ray Serve: one front end that speaks HTTP, and workers that run the models.

    serve run rbln_vae.serving.ray:build model=DIR replicas=2

The front end is the same application as `rbln-vae serve`; its backend sends tensors to a
worker, which has the same batcher and models. If a worker dies, its requests are only delayed:
the front end sends them to another worker.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import ray.serve
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from ..units import byte_count, optional_byte_count
from . import logs
from .app import create_app
from .backend import LocalBackend
from .batcher import Outcome, QueueFullError
from .models import ModelInfo, Output, PlannedRun, Shape, named_models, open_models
from .settings import RUN_TIMEOUT, BatcherOptions, Limits

_MANY = 10_000
"""The most concurrent requests for Ray: high, because the batcher's queue sets the limit."""

_PATIENCE = 60.0
"""Seconds in which a request must find another worker if its own died."""

_PAUSE = 0.25


class Options(BaseModel):
    """Options of `build`: `name=value` for `serve run`, or `args` in a configuration file.

    Options that `rbln-vae serve` also has mean the same there.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="MODEL or NAME=MODEL, or several, separated by commas.")
    replicas: int = Field(1, gt=0, description="The number of workers.")
    cpus: float = Field(1, ge=0, description="Processors that Ray reserves for each worker.")
    threads: int | None = Field(None, gt=0, description="Threads of a run; by default cpus.")
    max_batch: int = BatcherOptions.max_batch
    max_wait_ms: float = 1000 * BatcherOptions.max_wait
    memory_limit: str | None = Field(None, description="The memory limit of each worker.")
    queue: float = Field(BatcherOptions.queue, description="The queue of each worker.")
    concurrency: int = BatcherOptions.concurrency
    run_timeout: float = Field(RUN_TIMEOUT, gt=0)
    api_key: str | None = Field(None, description="By default RBLN_VAE_API_KEY, if it is set.")
    max_body: str = str(Limits.max_body)
    max_pixels: int = Field(Limits.max_pixels, gt=0)
    body_timeout: float = Field(Limits.body_timeout, gt=0)
    target: str | None = None
    dtype: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    kind: str | None = None

    @field_validator("model")
    @classmethod
    def _check_model(cls, text: str) -> str:
        named_models(text.split(","))  # fail here, not later on a worker
        return text

    def named_models(self) -> dict[str, str]:
        """The models by name, the default first."""
        return named_models(self.model.split(","))

    def batching(self, memory_limit: int | None) -> BatcherOptions:
        """The options of a worker's batcher, with the memory limit in bytes."""
        return BatcherOptions(
            max_batch=self.max_batch,
            max_wait=self.max_wait_ms / 1000,
            memory_limit=memory_limit,
            queue=self.queue,
            concurrency=self.concurrency,
        )

    def limits(self) -> Limits:
        """The limits of the front end."""
        return Limits(
            max_body=byte_count(self.max_body),
            max_pixels=self.max_pixels,
            body_timeout=self.body_timeout,
            api_key=self.api_key or os.environ.get("RBLN_VAE_API_KEY"),
        )


def build(args: Mapping[str, Any]) -> ray.serve.Application:
    """Build the application for Ray Serve.

    Args:
        args: The names and values of `Options`.

    Returns:
        An application for `serve.run`.

    Example:
        >>> serve.run(build({"model": "compiled-vae", "replicas": 2}))  # doctest: +SKIP
    """
    options = Options.model_validate(dict(args))
    worker = ray.serve.deployment(
        name="Worker",
        num_replicas=options.replicas,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": options.cpus},
    )(Worker).bind(options)
    front = ray.serve.deployment(
        name="Front", max_ongoing_requests=_MANY, ray_actor_options={"num_cpus": 0}
    )(ray.serve.ingress()(Front))
    return front.bind(worker, options.limits())


class Worker:
    """Runs models for the front end, in its own process."""

    def __init__(self, options: Options) -> None:
        run = {
            "target": options.target,
            "dtype": options.dtype,
            "num_threads": options.threads or max(1, math.ceil(options.cpus)),
            "timeout": options.run_timeout,
        }
        models, memory = open_models(
            options.named_models(),
            {name: value for name, value in run.items() if value is not None},
            optional_byte_count(options.memory_limit),
            subfolder=options.subfolder,
            revision=options.revision,
            kind=options.kind,
        )
        self._backend = LocalBackend(models, options.batching(memory))

    async def models(self) -> dict[str, ModelInfo]:
        """The models by name."""
        return dict(self._backend.models)

    async def plan(self, model: str) -> list[PlannedRun]:
        """What images of usual sizes take, as `Backend.plan`."""
        return await self._backend.plan(model)

    async def run(
        self, model: str, part: str, tensor: Tensor, output: Output = "sample"
    ) -> Outcome:
        """Run a tensor, as `Backend.run`."""
        return await self._backend.run(model, part, tensor, output)

    async def video(
        self, model: str, latent: Tensor, fps: float
    ) -> AsyncGenerator[bytes | Outcome, None]:
        """Decode a video, as `Backend.video`."""
        async with aclosing(self._backend.video(model, latent, fps)) as chunks:
            async for data in chunks:
                yield data


class Front:
    """Speaks HTTP, and sends tensors to workers."""

    async def __init__(self, workers: DeploymentHandle[Any], limits: Limits) -> None:  # type: ignore[misc]
        logs.configure()
        self._limits = limits
        self._backend = RemoteBackend(workers, await workers.models.remote())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._limits)


class RemoteBackend:
    """A backend that runs tensors on workers, through a handle of Ray Serve."""

    def __init__(self, workers: DeploymentHandle[Any], models: Mapping[str, ModelInfo]) -> None:
        self._workers = workers
        self._models = models

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        return self._models

    async def check(self, model: str, part: str, shape: Shape, output: Output = "sample") -> None:
        """Does nothing: a worker checks when it gets the tensor."""

    async def run(
        self, model: str, part: str, tensor: Tensor, output: Output = "sample"
    ) -> Outcome:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return await self._run_once(model, part, tensor, output)
            except (RayActorError, DeploymentUnavailableError):
                # The worker died. Runs have no side effects, so another worker can repeat it.
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(_PAUSE)

    async def video(
        self, model: str, latent: Tensor, fps: float
    ) -> AsyncGenerator[bytes | Outcome, None]:
        end, begun = time.monotonic() + _PATIENCE, False
        while True:
            response: Any = self._workers.options(stream=True).video.remote(model, latent, fps)
            try:
                async for data in response:
                    begun = True
                    yield data
                return
            except (RayActorError, DeploymentUnavailableError):
                if begun or time.monotonic() > end:
                    raise
            except BackPressureError:
                raise QueueFullError(1) from None
            except RayTaskError as error:
                raise error.cause from None
            finally:
                response.cancel()
            await asyncio.sleep(_PAUSE)

    async def _run_once(self, model: str, part: str, tensor: Tensor, output: Output) -> Outcome:
        response: Any = self._workers.run.remote(model, part, tensor, output)
        try:
            outcome: Outcome = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise QueueFullError(1) from None
        except RayTaskError as error:
            raise error.cause from None  # the worker's own exception
        return outcome

    async def plan(self, model: str) -> list[PlannedRun]:
        found: list[PlannedRun] = await self._workers.plan.remote(model)
        return found

    def load(self) -> Mapping[str, float]:
        return {}  # the workers have the load, and Ray's own metrics show it

    def drain(self) -> None:
        """Does nothing: the workers continue, and batches wait there."""

    async def close(self) -> None:
        """Does nothing: Ray ends the workers after the front end."""
