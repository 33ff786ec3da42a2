"""Receives request bodies within limits on size, time and type."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from typing import TypeVar

from starlette.requests import Request

from ..units import format_bytes
from .edge import CLIENT_GONE
from .errors import RefusedError

Result = TypeVar("Result")

_RETRY_AFTER = 1
_REFUSED_TYPES = ("application/json", "multipart/", "application/x-www-form-urlencoded")


class Bodies:
    """A limit on all request bodies in memory.

    Args:
        most: The most bytes of all bodies together.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[int]:
        """Reserve memory for a body during a `with` block, which gets its size.

        Raises:
            RefusedError: There is not enough memory now.
        """
        if self.held and self.held + size > self.most:
            raise RefusedError(
                429,
                "busy",
                f"The server holds {format_bytes(self.held)} of other requests and has no room for "
                f"{format_bytes(size)} more. Try again after {_RETRY_AFTER} second.",
                retry_after=_RETRY_AFTER,
            )
        self.held += size
        try:
            yield size
        finally:
            self.held -= size


def announced_length(request: Request, most: int) -> int | None:
    """The length of the body according to its headers; `None` if they have none.

    Args:
        request: The request.
        most: The most bytes of a body.

    Raises:
        RefusedError: The body is too long or has an unsupported type.
    """
    headers = request.headers
    coding = headers.get("content-encoding", "identity").lower()
    kind = headers.get("content-type", "").lower()
    if coding != "identity" or kind.startswith(_REFUSED_TYPES):
        raise RefusedError(
            415,
            "unsupported_body",
            "The body must be the bytes of a tensor or of a picture, not compressed and not JSON. "
            f"It came with Content-Type {kind[:100]!r} and Content-Encoding {coding[:100]!r}.",
        )
    text = headers.get("content-length")
    if text is None:
        return None
    # 20 digits or more are too many bytes, and slow to parse.
    length = int(text) if text.isdecimal() and len(text) < 20 else most + 1
    if length > most:
        raise too_long(most)
    return length


def too_long(most: int) -> RefusedError:
    """The error of a body that is longer than allowed."""
    return RefusedError(
        413,
        "too_large",
        f"The body exceeds the limit of this server, {format_bytes(most)}. Send a smaller image or "
        "batch.",
    )


async def read_body(request: Request, most: int, seconds: float) -> bytearray:
    """Read the body of a request.

    Args:
        request: The request.
        most: The most bytes of the body.
        seconds: The most seconds for receiving it.

    Raises:
        RefusedError: The body is too long or too slow, or the client disconnected.
    """
    body = bytearray()

    async def receive() -> None:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise _gone()
            body.extend(message.get("body", b""))
            if len(body) > most:
                raise too_long(most)
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(receive(), seconds)
    except asyncio.TimeoutError:
        raise RefusedError(
            408,
            "slow_client",
            f"The body was not complete after {seconds:g} seconds, with {len(body):,} bytes.",
        ) from None
    return body


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work, and cancel it if the client disconnects; the body must have been read.

    Raises:
        RefusedError: The client disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _gone()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working, leaving))  # so that nothing of it runs any more


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _gone() -> RefusedError:
    return RefusedError(CLIENT_GONE, "client_gone", "The client disconnected.")
