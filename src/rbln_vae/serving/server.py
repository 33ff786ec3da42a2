"""The service on uvicorn: sockets, timeouts of connections, signals."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import logs
from .settings import Address

_HEAD_SECONDS = 10.0
"""In which the head of a request must arrive."""
_STALL_SECONDS = 30.0
"""How long a client may leave an answer unread."""
_REST_SECONDS = 5.0
"""How long a body is still received, and thrown away, that was answered before its end."""
_KEEP_ALIVE_SECONDS = 30
_MOST_HEAD = 32 * 1024


def make_server(
    app: FastAPI, address: Address, listening: Callable[[int], object]
) -> uvicorn.Server:
    """A server for the application of `create_app`, which `run` starts.

    Args:
        app: The application.
        address: Where it listens; the port 0 takes one that is free.
        listening: Called with the port when it does.
    """
    logs.configure()
    return DrainingServer(
        uvicorn.Config(
            app,
            host=address.host,
            port=address.port,
            http=GuardedProtocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(address.grace),
            h11_max_incomplete_event_size=_MOST_HEAD,
        ),
        listening,
    )


class DrainingServer(uvicorn.Server):
    """A server that tells when it listens, and its application when it begins to end.

    uvicorn waits for the answers first and then lets the application end, which so could not
    know that there is nothing left to wait for.
    """

    def __init__(self, config: uvicorn.Config, listening: Callable[[int], object]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.drain()  # type: ignore[union-attr]
        await super().shutdown(sockets)


class GuardedProtocol(H11Protocol):
    """A connection that ends when its client stalls, in either direction.

    The time of a body is the application's concern: it knows how long a body may be.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head, self._rest, self._stall = (_Deadline(self) for _ in range(3))

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head.start(_HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        for deadline in (self._head, self._rest, self._stall):
            deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        waiting = self.conn.their_state is h11.IDLE
        super().data_received(data)
        if not waiting:
            return
        if self.conn.their_state is not h11.IDLE:
            self._head.cancel()
        elif not self._head.running:
            self._head.start(_HEAD_SECONDS)

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self._rest.start(_REST_SECONDS)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.start(_STALL_SECONDS)

    def resume_writing(self) -> None:
        self._stall.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        content = {"code": "invalid_http", "message": msg, "request_id": ""}
        body = json.dumps(content).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Deadline:
    """Ends a connection after a time, unless it is cancelled before."""

    def __init__(self, connection: GuardedProtocol) -> None:
        self._connection = connection
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._timer is not None

    def start(self, seconds: float) -> None:
        self.cancel()
        self._timer = self._connection.loop.call_later(seconds, self._connection.transport.abort)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
