"""Runs that are stopped: by their time, by their caller, and by Ctrl-C.

The run that is stopped consists of one step and takes minutes: a test ends soon only if the
step itself is left.
"""

from __future__ import annotations

import itertools
import math
import threading
import time

import pytest
import torch
from long_runs import attention_graph, endless_run
from processes import in_a_process

from rbln_vae.errors import RBLNCancelledError
from rbln_vae.targets.cpu.runtime import CpuRuntime


def check_still_usable(runtime: CpuRuntime) -> None:
    image = torch.randn(1, 32, 9, 7)
    fresh = CpuRuntime(attention_graph(), dtype="float32")
    assert torch.equal(runtime.run(image), fresh.run(image))


def test_time_that_is_over_ends_a_step() -> None:
    runtime, image = endless_run(timeout=0.2)
    with pytest.raises(TimeoutError, match=r"timeout=0\.2 seconds"):
        runtime.run(image)
    runtime.timeout = None
    check_still_usable(runtime)


def test_no_timeout_is_no_limit() -> None:
    runtime = CpuRuntime(attention_graph(), dtype="float32", timeout=math.inf)
    check_still_usable(runtime)
    assert CpuRuntime(attention_graph()).timeout is None


def test_a_caller_can_stop_a_run() -> None:
    runtime, image = endless_run()
    threads = []

    def should_stop() -> bool:
        threads.append(threading.current_thread())
        return len(threads) == 4

    begin = time.monotonic()
    with pytest.raises(RBLNCancelledError, match="should_stop"):
        runtime.run(image, should_stop=should_stop)
    assert threads == [threading.current_thread()] * 4
    # The first question comes at once, the others at least 50 ms apart.
    assert time.monotonic() - begin >= 3 * 0.05
    check_still_usable(runtime)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_caller_may_run_a_model_while_it_is_asked(dtype: str) -> None:
    """In the midst of a step, whose unit of products the other run begins and ends."""
    runtime, image = endless_run(dtype, num_threads=2)
    other = CpuRuntime(attention_graph(), dtype=dtype, num_threads=1)
    small = torch.randn(1, 32, 40, 40)
    expected, found = other.run(small), list[torch.Tensor]()

    def should_stop() -> bool:
        found.append(other.run(small))
        return len(found) == 20

    with pytest.raises(RBLNCancelledError):
        runtime.run(image, should_stop=should_stop)
    assert all(torch.equal(each, expected) for each in found)


def test_a_run_that_nobody_wants_is_not_begun() -> None:
    runtime, image = endless_run(memory_limit=1)
    with pytest.raises(RBLNCancelledError):
        runtime.run(image, should_stop=lambda: True)


def test_what_a_callback_raises_passes_through() -> None:
    runtime, image = endless_run()
    answers = iter([False, False])
    with pytest.raises(StopIteration):
        runtime.run(image, should_stop=lambda: next(answers))
    check_still_usable(runtime)


@pytest.mark.parametrize("error", [TimeoutError, MemoryError, RuntimeError])
def test_an_error_of_a_callback_is_not_taken_for_one_of_ours(error: type[Exception]) -> None:
    runtime, image = endless_run()
    answers = [False]

    def should_stop() -> bool:
        if answers:
            return answers.pop()
        raise error("the caller's own")

    with pytest.raises(error, match="the caller's own"):
        runtime.run(image, should_stop=should_stop)


def test_a_thread_of_python_can_be_stopped_too() -> None:
    runtime, image = endless_run()
    found = []

    def work() -> None:
        try:
            runtime.run(image, should_stop=lambda: begun.set() or not wanted.is_set())
        except RBLNCancelledError as error:
            found.append(error)

    begun, wanted = threading.Event(), threading.Event()
    wanted.set()
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    wanted.clear()
    thread.join()
    assert found
    check_still_usable(runtime)


CTRL_C = """
import json, os, signal
from long_runs import attention_graph, endless_run
from rbln_vae.targets.cpu.runtime import CpuRuntime
import torch

# Whoever runs the tests in the background may have had Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
runtime, image = endless_run()
asked = 0

def should_stop():
    global asked
    asked += 1
    if asked == 2:
        # As the terminal does it: the handler of Python runs later, when it can.
        os.kill(os.getpid(), signal.SIGINT)

try:
    runtime.run(image, should_stop=should_stop if sys.argv[1] == "callback" else None)
except KeyboardInterrupt:
    pass
small = torch.randn(1, 32, 9, 7)
expected = CpuRuntime(attention_graph(), dtype="float32").run(small)
print(json.dumps(torch.equal(runtime.run(small), expected)))
"""


def test_ctrl_c_ends_a_run_and_leaves_the_model_usable() -> None:
    assert in_a_process(CTRL_C, "callback") is True


LATE_SIGNAL = """
import json, signal, threading, time
from long_runs import endless_run

signal.signal(signal.SIGINT, signal.default_int_handler)
runtime, image = endless_run()
sent = []

def interrupt():
    sent.append(time.monotonic())
    signal.raise_signal(signal.SIGINT)

# The run has no callback: nothing but the engine's own look finds the signal.
threading.Timer(1.0, interrupt).start()
try:
    runtime.run(image)
except KeyboardInterrupt:
    print(json.dumps(time.monotonic() - sent[0]))
"""


def test_ctrl_c_is_seen_without_a_callback() -> None:
    assert in_a_process(LATE_SIGNAL) >= 0


def test_batches_that_are_run_in_parts_are_stopped_between_them() -> None:
    runtime = CpuRuntime(attention_graph(), dtype="float32")
    runtime.save_memory(slicing=True, tiling=False)
    # Each image is done before the engine would ask.
    image = torch.randn(100_000, 32, 2, 2)
    asked = []
    with pytest.raises(RBLNCancelledError):
        runtime.run(image, should_stop=lambda: asked.append(time.monotonic()) or len(asked) > 2)
    assert min(b - a for a, b in itertools.pairwise(asked)) >= 0.05


AT_EXIT = """
import json, threading
from long_runs import endless_run

runtime, image = endless_run()
begun, within = threading.Event(), threading.Event()

def should_stop():
    # The first question is asked before the step, the others within it.
    (within if begun.is_set() else begun).set()

run = lambda: runtime.run(image, should_stop=should_stop)
threading.Thread(target=run, daemon=True).start()
within.wait()
print(json.dumps(True))
"""


def test_a_run_of_a_daemon_thread_does_not_abort_the_process_as_it_ends() -> None:
    assert in_a_process(AT_EXIT) is True
