"""Decides whether a run goes on: its time may be over, or its caller may not want it any more."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ..errors import RBLNCancelledError

_PATIENCE = 0.05
"""Seconds that a caller isn't asked again."""

ShouldStop = Callable[[], object]
"""Asked during a run, on the thread that called it; a true answer ends the run."""


class Watch:
    """The time and the caller's wish of one run.

    Args:
        timeout: Seconds that the run may take; `None` is no limit.
        should_stop: Asked at most every 50 ms; `None` asks nobody.
    """

    def __init__(self, timeout: float | None = None, should_stop: ShouldStop | None = None) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._end = time.monotonic() + self._timeout
        self._should_stop = should_stop
        self._next = -math.inf

    @property
    def seconds_left(self) -> float:
        """Until the time of the run is over; infinite where there is no limit."""
        return max(0.0, self._end - time.monotonic())

    @property
    def needs_asking(self) -> bool:
        """Whether anything but the time can end the run: the caller, or a signal.

        Python takes signals on its main thread alone.
        """
        main = threading.current_thread() is threading.main_thread()
        return self._should_stop is not None or main

    def ask(self) -> None:
        """Ask the caller, unless that was done just now.

        Raises:
            RBLNCancelledError: The caller wants the run to stop.
            Exception: What the callback raised.
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
        """Look at the time, and ask the caller.

        Raises:
            TimeoutError: The time is over.
            RBLNCancelledError: The caller wants the run to stop.
            Exception: What the callback raised.
        """
        if time.monotonic() > self._end:
            raise self.timed_out()
        self.ask()

    def timed_out(self) -> TimeoutError:
        """The error of a run that took longer than it may."""
        return TimeoutError(
            f"A run took longer than timeout={self._timeout:g} seconds and was given up; the model "
            "can be used again. Give a longer timeout, or a smaller batch or image."
        )
