"""Bytes from a thread that writes them to an event loop that sends them."""

from __future__ import annotations

import asyncio
import threading

_MOST_WAITING = 256
"""The writes that wait to be read, of at most 32 KiB each as PyAV makes them."""


class Pipe:
    """A file that threads write to, and its end that a coroutine of one event loop reads.

    It holds so much that a video of usual length doesn't wait for a slow client, and no more.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(_MOST_WAITING)
        self._closed = False

    # In a thread

    def write(self, data: bytes, /) -> int:
        """Write, once there is room.

        Raises:
            BrokenPipeError: Nobody reads any more.
        """
        if not self._closed:
            self._room.acquire()
        if self._closed:
            raise BrokenPipeError("Nobody reads what is written.")
        self._loop.call_soon_threadsafe(self._waiting.put_nowait, bytes(data))
        return len(data)

    # In the event loop

    async def read(self) -> bytes:
        """What was written next; nothing at the end."""
        data = await self._waiting.get()
        self._room.release()
        return data

    def end(self) -> None:
        """Let the reader come to an end after what was written."""
        self._waiting.put_nowait(b"")

    def close(self) -> None:
        """Read no more, and let no writer wait."""
        self._closed = True
        self._room.release()
