"""What a run asks of PyTorch and of the device: precision, threads, and not to run far ahead."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch

AHEAD = 2e12
"""Floating-point operations that a GPU may have before it when more are launched: milliseconds of
work. That keeps it busy, and a timeout or a caller can still end the run."""


class FullPrecision:
    """Switches TF32 off while any thread is in it: torch has one switch for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = (False, False)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = (
                    torch.backends.cudnn.allow_tf32,
                    torch.backends.cuda.matmul.allow_tf32,
                )
                self._set(False, False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(*self._before)

    def _set(self, convolutions: bool, products: bool) -> None:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products


_FULL_PRECISION = FullPrecision()


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Run on a device, without rounding float32 to TF32."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), _FULL_PRECISION:
        yield


class SideStreams:
    """Streams of a GPU for runs that take from the host and give to it.

    All threads have the same stream unless they ask for others. There, such runs would wait for
    each other; on streams of their own, the copies of one go on beside the kernels of another.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Used again, since torch keeps free memory for each stream by itself. A list's operations
        # are atomic.
        self._idle: list[torch.cuda.Stream] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Run what is called on a stream that no other run has.

        It comes after what was called before it, and what is called later comes after it: a run
        that was ended early may still read the weights, whose memory belongs to the usual stream.
        """
        before = torch.cuda.current_stream(self._device)
        try:
            stream = self._idle.pop()
        except IndexError:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)
            self._idle.append(stream)


class Clock:
    """Keeps a run at most `AHEAD` operations before the device, and tells when steps ended.

    Args:
        device: The device.
        timing: Whether times are wanted.
    """

    def __init__(self, device: torch.device, *, timing: bool) -> None:
        self._gpu, self._timing = device.type == "cuda", timing
        self._launched = 0
        self._waited = 0
        self._events: list[tuple[torch.cuda.Event, int]] = []
        self._times: list[float] = []
        self.lap(0)

    def lap(self, flops: int) -> None:
        """A step has been launched; on a CPU it has ended."""
        if not self._gpu:
            self._times.append(time.perf_counter())
            return
        self._launched += flops
        event = torch.cuda.Event(enable_timing=self._timing)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((event, self._launched))
        while self._launched - self._events[self._waited][1] > AHEAD:
            self._waited += 1
            self._events[self._waited][0].synchronize()

    def laps(self) -> list[float]:
        """Seconds from the start of the run to its beginning and the end of each step."""
        if not self._gpu:
            return [each - self._times[0] for each in self._times]
        self._events[-1][0].synchronize()
        first = self._events[0][0]
        return [first.elapsed_time(each) / 1000 for each, _ in self._events]


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set the number of torch's threads during a block; `None` changes nothing."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
