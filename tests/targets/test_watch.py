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


def test_a_caller_is_told_how_far_its_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rbln_vae.targets.watch.time.monotonic", lambda: now)
    told: list[tuple[int, int]] = []
    watch = Watch(progress=lambda *work: told.append(work), images=2)
    watch.check()
    for now, done in ((100.04, 0.5), (100.06, 0.75), (100.12, 1.25), (100.18, 2.0)):  # noqa: B007
        watch.check(done)
    watch.finish()
    assert told == [(0, 2000), (750, 2000), (1250, 2000), (1999, 2000), (2000, 2000)]


def test_work_that_is_done_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbln_vae.targets.watch._PATIENCE", 0.0)
    told: list[int] = []
    watch = Watch(progress=lambda done, total: told.append(done))
    for done in (0.3, 0.1, 0.2, 0.4):
        watch.ask(done)
    assert told == [300, 300, 300, 400]


def test_what_the_caller_raises_when_it_is_told_passes_through() -> None:
    def refuse(done: int, total: int) -> None:
        raise ZeroDivisionError

    for call in (Watch.check, Watch.finish):
        with pytest.raises(ZeroDivisionError):
            call(Watch(progress=refuse))


def test_only_the_main_thread_has_signals_to_look_for() -> None:
    assert Watch().needs_asking
    found: list[bool] = []

    def look() -> None:
        watches = (Watch(), Watch(should_stop=lambda: False), Watch(progress=lambda *_: None))
        found.extend(watch.needs_asking for watch in watches)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False, True, True]
