"""Stands between a run and its caller: decides when the run must stop, and tells how far it is."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ..errors import RBLNCancelledError

_PATIENCE = 0.05
"""The least seconds between two calls of the caller's functions."""

PER_IMAGE = 1000
"""The work of an image, as `Progress` counts it."""

ShouldStop = Callable[[], object]
"""Called during a run, on the calling thread; a true result stops the run."""

Progress = Callable[[int, int], object]
"""Called during a run, on the calling thread, with the work that is done and with all of it, in
thousandths of an image."""


class Watch:
    """The timeout of one run, and the functions that its caller gave.

    Args:
        timeout: The most seconds of the run; `None` is no limit.
        should_stop: Called at most every 50 ms; a true result stops the run. `None` never
            stops it.
        progress: Called as often, and at the end; `None` is not called.
        images: The size of the batch, by default 1.
    """

    def __init__(
        self,
        timeout: float | None = None,
        should_stop: ShouldStop | None = None,
        progress: Progress | None = None,
        images: int = 1,
    ) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._end = time.monotonic() + self._timeout
        self._should_stop = should_stop
        self._progress = progress
        self._total = images * PER_IMAGE
        self._done = 0
        self._next = -math.inf

    @property
    def seconds_left(self) -> float:
        """The seconds until the timeout; infinite without one."""
        return max(0.0, self._end - time.monotonic())

    @property
    def needs_asking(self) -> bool:
        """Whether the caller has functions to call, or a signal can end the run.

        Python handles signals only on its main thread.
        """
        main = threading.current_thread() is threading.main_thread()
        return self._should_stop is not None or self._progress is not None or main

    def ask(self, done: float = 0.0) -> None:
        """Call the caller's functions, unless that was less than 50 ms ago.

        Args:
            done: The images that are done, in fractions; no less counts than was said before.

        Raises:
            RBLNCancelledError: `should_stop` returned true.
            Exception: One of the functions raised it.
        """
        # A run that repeats images is done only when it says so.
        self._done = max(self._done, min(int(done * PER_IMAGE), self._total - 1))
        if time.monotonic() < self._next:
            return
        if self._progress is not None:
            self._progress(self._done, self._total)
        stop = self._should_stop is not None and self._should_stop()
        self._next = time.monotonic() + _PATIENCE
        if stop:
            raise RBLNCancelledError(
                "The run was stopped, as should_stop asked; the model can be used again."
            )

    def check(self, done: float = 0.0) -> None:
        """Check the timeout, and call the caller's functions as `ask` does.

        Args:
            done: As of `ask`.

        Raises:
            TimeoutError: The time is over.
            RBLNCancelledError: `should_stop` returned true.
            Exception: One of the caller's functions raised it.
        """
        if time.monotonic() > self._end:
            raise self.timed_out()
        self.ask(done)

    def finish(self) -> None:
        """Tell the caller that the run is done.

        Raises:
            Exception: The caller's function raised it.
        """
        if self._progress is not None:
            self._progress(self._total, self._total)

    def timed_out(self) -> TimeoutError:
        """The error of a run that exceeded its timeout."""
        return TimeoutError(
            f"A run took longer than timeout={self._timeout:g} seconds and was given up; the model "
            "can be used again. Give a longer timeout, or a smaller batch or image."
        )
