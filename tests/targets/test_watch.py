from __future__ import annotations

import math
import threading

import pytest

from rbln_vae.errors import RBLNCancelledError, RBLNError
from rbln_vae.targets.watch import Watch


def test_without_a_limit_and_a_caller_a_run_goes_on() -> None:
    watch = Watch()
    watch.check()
    assert watch.seconds_left == math.inf


def test_time_that_is_over_is_an_error_that_names_the_limit() -> None:
    watch = Watch(timeout=1e-9)
    with pytest.raises(TimeoutError, match="timeout=1e-09 seconds"):
        watch.check()
    assert watch.seconds_left == 0


def test_a_caller_is_asked_at_once_and_then_not_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("rbln_vae.targets.watch.time.monotonic", lambda: now)
    asked: list[float] = []
    watch = Watch(should_stop=lambda: asked.append(now))
    for now in (100.0, 100.04, 100.051, 100.09, 100.102):  # noqa: B007
        watch.check()
    assert asked == [100.0, 100.051, 100.102]


def test_a_caller_that_wants_no_more_ends_the_run() -> None:
    with pytest.raises(RBLNCancelledError, match="can be used again") as caught:
        Watch(should_stop=lambda: 1).check()
    assert isinstance(caught.value, RBLNError)


def test_only_the_main_thread_has_signals_to_look_for() -> None:
    assert Watch().needs_asking
    found: list[bool] = []

    def look() -> None:
        found.extend((Watch().needs_asking, Watch(should_stop=lambda: False).needs_asking))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False, True]
