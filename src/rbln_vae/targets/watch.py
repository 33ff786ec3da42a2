"""Decides when a run must stop: at its timeout, or when its caller wants it to."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ..errors import RBLNCancelledError

_PATIENCE = 0.05
"""The least seconds between two calls of `should_stop`."""

ShouldStop = Callable[[], object]
"""Called during a run, on the calling thread; a true result stops the run."""


class Watch:
    """The timeout and the `should_stop` function of one run.

    Args:
        timeout: The most seconds of the run; `None` is no limit.
        should_stop: Called at most every 50 ms; a true result stops the run. `None` never
            stops it.
    """

    def __init__(self, timeout: float | None = None, should_stop: ShouldStop | None = None) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._end = time.monotonic() + self._timeout
        self._should_stop = should_stop
        self._next = -math.inf

    @property
    def seconds_left(self) -> float:
        """The seconds until the timeout; infinite without one."""
        return max(0.0, self._end - time.monotonic())

    @property
    def needs_asking(self) -> bool:
        """Whether the caller or a signal can end the run, and not only the timeout.

        Python handles signals only on its main thread.
        """
        main = threading.current_thread() is threading.main_thread()
        return self._should_stop is not None or main

    def ask(self) -> None:
        """Call `should_stop`, unless it was called less than 50 ms ago.

        Raises:
            RBLNCancelledError: `should_stop` returned true.
            Exception: `should_stop` raised it.
        """
        if self._should_stop is None or time.monotonic() < self._next:
            return
        stop = self._should_stop()
        self._next = time.monotonic() + _PATIENCE
        if stop:
            raise RBLNCancelledError(
                "The run was stopped, as should_stop asked; the model can be used again."
            )

    def check(self) -> None:
        """Check the timeout, and call `should_stop` as `ask` does.

        Raises:
            TimeoutError: The time is over.
            RBLNCancelledError: `should_stop` returned true.
            Exception: `should_stop` raised it.
        """
        if time.monotonic() > self._end:
            raise self.timed_out()
        self.ask()

    def timed_out(self) -> TimeoutError:
        """The error of a run that exceeded its timeout."""
        return TimeoutError(
            f"A run took longer than timeout={self._timeout:g} seconds and was given up; the model "
            "can be used again. Give a longer timeout, or a smaller batch or image."
        )
