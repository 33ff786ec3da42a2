"""Metrics for Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .batcher import Outcome
from .models import ModelInfo

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_SAMPLES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one application.

    Args:
        models: The models that it serves.
        load: Returns the load, as `Backend.load`; called at each scrape.
        bodies: Returns the bytes of the request bodies in memory; called at each scrape.
    """

    def __init__(
        self,
        models: Mapping[str, ModelInfo],
        load: Callable[[], Mapping[str, float]],
        bodies: Callable[[], float],
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rbln_vae_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "rbln_vae_request_seconds",
            "Time from the headers of a request to the end of its response.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._waited = Histogram(
            "rbln_vae_queue_seconds",
            "Time that a tensor waited for its run.",
            ["model", "part"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._ran = Histogram(
            "rbln_vae_run_seconds",
            "Time of the run that produced a result.",
            ["model", "part"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "rbln_vae_run_samples",
            "Samples of the run that produced a result.",
            ["model", "part"],
            buckets=_SAMPLES,
            registry=registry,
        )
        names = {
            "waiting": ("rbln_vae_queue_images", "Waiting work, in images of the compiled size."),
            "running": ("rbln_vae_runs", "Runs in progress."),
            "memory": ("rbln_vae_run_memory_bytes", "Memory of runs in progress."),
        }
        for key, (name, text) in names.items():
            gauge = Gauge(name, text, registry=registry)
            gauge.set_function(functools.partial(_read, load, key))
        held = Gauge("rbln_vae_body_bytes", "Bytes of request bodies in memory.", registry=registry)
        held.set_function(bodies)
        info = Gauge(
            "rbln_vae_model", "1 for each model.", ["model", "dtype", "target"], registry=registry
        )
        for model in models.values():
            info.labels(model.name, model.dtype, model.target).set(1)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def ran(self, model: str, part: str, outcome: Outcome) -> None:
        """Count a result of a run."""
        self._waited.labels(model, part).observe(outcome.waited)
        self._ran.labels(model, part).observe(outcome.ran)
        self._batch.labels(model, part).observe(outcome.batch)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


def _read(load: Callable[[], Mapping[str, float]], key: str) -> float:
    return load().get(key, 0.0)
