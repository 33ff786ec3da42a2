"""Services for tests: in this process without sockets, or on a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi import FastAPI
from torch import Tensor
from vaes import default_compiled

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.serving.app import create_app
from rbln_vae.serving.backend import LocalBackend
from rbln_vae.serving.models import ServedModel
from rbln_vae.serving.server import make_server
from rbln_vae.serving.settings import Address, BatcherOptions, Limits
from rbln_vae.targets.watch import ShouldStop

PATIENCE = 60
"""Seconds after which something that should happen won't."""


class GatedModel(ServedModel):
    """A model whose runs wait until the test opens the gate, and are noted.

    So do its plans, if the test closes their gate.
    """

    def __init__(self, name: str = "gated", vae: RBLNAutoencoderKL | None = None) -> None:
        super().__init__(name, vae or default_compiled())
        self.gate = threading.Event()
        self.plans = threading.Event()
        self.plans.set()
        self.planning = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.shapes: list[tuple[int, ...]] = []

    def memory_needed(self, part: str, shape: tuple[int, ...]) -> int:
        self.planning.release()
        assert self.plans.wait(PATIENCE)
        return super().memory_needed(part, shape)

    def run(self, part: str, tensor: Tensor, should_stop: ShouldStop) -> Tensor:
        self._enter(tensor)
        return super().run(part, tensor, should_stop)

    def decode_images(self, latent: Tensor, should_stop: ShouldStop) -> tuple[Tensor, Tensor]:
        self._enter(latent)
        return super().decode_images(latent, should_stop)

    def _enter(self, tensor: Tensor) -> None:
        self.shapes.append(tuple(tensor.shape))
        self.started.release()
        assert self.gate.wait(PATIENCE)


def make_app(*models: ServedModel, limits: Limits | None = None, **options: Any) -> FastAPI:
    """A service of these models, or of the default one, with options of its batcher."""
    served = models or (ServedModel("tiny", default_compiled()),)
    return create_app(LocalBackend(served, BatcherOptions(**options)), limits)


@dataclass
class Answer:
    """What an application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["code"])


Chunks = Sequence[bytes]
Receive = Callable[[], Awaitable[dict[str, Any]]]


async def call(
    app: FastAPI,
    method: str,
    path: str,
    query: Mapping[str, Any] | str = "",
    body: bytes | Chunks = b"",
    headers: Mapping[str, str] | None = None,
    receive: Receive | None = None,
) -> Answer:
    """Ask an application in this process; the client stays until it is answered."""
    chunks = [body] if isinstance(body, bytes) else list(body)
    text = query if isinstance(query, str) else urlencode(query, doseq=True)
    sent = dict(headers or {})
    if isinstance(body, bytes) and receive is None:
        sent.setdefault("content-length", str(len(body)))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": text.encode(),
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    answer, done = Answer(), asyncio.Event()

    async def receive_body() -> dict[str, Any]:
        if chunks:
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    try:
        await asyncio.wait_for(app(scope, receive or receive_body, send), PATIENCE)
    finally:
        done.set()
    return answer


def ask(app: FastAPI, method: str, path: str, *args: Any, **kwargs: Any) -> Answer:
    """`call` from outside of an event loop."""
    return asyncio.run(call(app, method, path, *args, **kwargs))


async def measured(app: FastAPI, metric: str, value: float) -> None:
    """Return when `/metrics` shows that value."""
    end = time.monotonic() + PATIENCE
    found = None
    while found != pytest.approx(value):
        assert time.monotonic() < end, f"{metric} is {found}, expected {value}"
        text = (await call(app, "GET", "/metrics")).body.decode()
        line = re.search(rf"^{metric} (\S+)", text, re.MULTILINE)
        assert line
        found = float(line[1])
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The application on a real socket of this machine, as its address."""
    ports: list[int] = []
    server = make_server(app, Address(port=0), ports.append)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: ports or not thread.is_alive())
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], Any]) -> None:
    """Return when it holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def query_of(tensor: Tensor, **more: Any) -> dict[str, Any]:
    """The query that goes with a tensor's bytes."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, **more}
