"""The threads of the engine: shared by all models, taking turns, and computing alike."""

from __future__ import annotations

import itertools
import platform
import threading
import time
from pathlib import Path

import pytest
import torch
from long_runs import attention_graph, endless_run
from processes import in_a_process

from rbln_vae.errors import RBLNCancelledError
from rbln_vae.targets.cpu.runtime import CpuRuntime

LOAD = """
import json, os, torch
from rbln_vae import RBLNAutoencoderKL

def load(**options):
    return RBLNAutoencoderKL.from_pretrained(sys.argv[1], **options)

def decoded(vae, latent, **arguments):
    return vae.decode(latent, return_dict=False, **arguments)[0]

def threads():
    return len(os.listdir("/proc/self/task"))

"""


def test_models_share_one_pool_for_a_number_of_threads(saved: Path) -> None:
    script = """
before = threads()
counts = []
kept = []
for number in (3, 3, 3, 5, 3):
    kept.append(load(rbln_num_threads=number))
    decoded(kept[-1], torch.randn(1, 4, 8, 8))
    counts.append(threads() - before)
kept.clear()
counts.append(threads() - before)
print(json.dumps(counts))
"""
    # Two threads besides the caller's for three, four more for five; none when all have gone.
    assert in_a_process(LOAD + script, saved) == [2, 2, 2, 6, 6, 0]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_does_not_wait_for_the_end_of_others(threads: int) -> None:
    endless, image = endless_run(num_threads=threads)
    short = CpuRuntime(attention_graph(), dtype="float32", num_threads=threads)
    small = torch.randn(1, 32, 40, 40)
    expected = short.run(small)
    begun = [threading.Event() for _ in range(3)]
    done = threading.Event()
    cancelled = []

    def work(event: threading.Event) -> None:
        try:
            endless.run(image, should_stop=lambda: event.set() or done.is_set())
        except RBLNCancelledError as error:
            cancelled.append(error)

    others = [threading.Thread(target=work, args=(event,)) for event in begun]
    for other in others:
        other.start()
    for event in begun:
        event.wait()
    # More runs than threads, none of which would end by itself.
    for _ in range(3):
        assert torch.equal(short.run(small), expected)
    done.set()
    for other in others:
        other.join()
    assert len(cancelled) == 3


def test_a_run_that_waits_for_its_turn_can_be_stopped() -> None:
    endless, image = endless_run(num_threads=1)
    stop = threading.Event()
    begun = threading.Event()

    def work() -> None:
        with pytest.raises(RBLNCancelledError):
            endless.run(image, should_stop=lambda: begun.set() or stop.is_set())

    other = threading.Thread(target=work)
    other.start()
    begun.wait()
    with pytest.raises(TimeoutError):
        CpuRuntime(attention_graph(), num_threads=1, timeout=0.0).run(torch.randn(1, 32, 9, 9))
    stop.set()
    other.join()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_caller_that_is_asked_may_use_the_same_threads(threads: int) -> None:
    """Though all of them lead runs whose callers are asked."""
    endless, image = endless_run(num_threads=threads)
    # A run that never got its turn would end in an error.
    short = CpuRuntime(attention_graph(), num_threads=threads, timeout=60.0)
    small = torch.randn(1, 32, 40, 40)
    expected = short.run(small)
    meet = threading.Barrier(threads, timeout=60.0)
    found: list[torch.Tensor] = []

    def work() -> None:
        def should_stop() -> bool:
            if next(asked) == 0:  # before the run begins
                return False
            meet.wait()
            found.append(short.run(small))
            return True

        asked = itertools.count()
        with pytest.raises(RBLNCancelledError):
            endless.run(image, should_stop=should_stop)

    others = [threading.Thread(target=work) for _ in range(threads)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(found) == threads
    assert all(torch.equal(each, expected) for each in found)


def test_threads_leave_a_run_whose_caller_takes_long() -> None:
    waits = CpuRuntime(attention_graph(), num_threads=2)
    busy = CpuRuntime(attention_graph(), num_threads=2)
    called, done = threading.Event(), threading.Event()

    def on_rows(first: int, count: int) -> None:
        called.set()
        done.wait()

    def work() -> None:
        waits.run(torch.randn(1, 32, 64, 64), on_rows=on_rows)

    other = threading.Thread(target=work)
    other.start()
    called.wait()
    process, thread = time.process_time(), time.thread_time()
    try:
        busy.run(torch.randn(1, 32, 160, 160))
        own = time.thread_time() - thread
        helped = time.process_time() - process - own
    finally:
        done.set()
        other.join()
    assert helped > own / 10


@pytest.mark.parametrize("threads", [16, 64])
def test_threads_far_beyond_the_cores_share_out_every_item_once(threads: int) -> None:
    graph = attention_graph()
    image = torch.randn(1, 32, 24, 40)
    expected = CpuRuntime(graph, dtype="float32", num_threads=1).run(image)
    many = CpuRuntime(graph, dtype="float32", num_threads=threads)
    found: list[torch.Tensor] = []

    def work() -> None:
        # Runs that meet each other, and a thread that comes late to a step.
        found.extend(many.run(image) for _ in range(10))

    others = [threading.Thread(target=work) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(found) == 30
    assert all(torch.equal(each, expected) for each in found)


NO_MORE = """
import resource
from rbln_vae import RBLNError

compiled = load()
latent = torch.randn(1, 4, 8, 8)
expected = decoded(compiled, latent)
before = threads()
# Each thread asks for a stack of its own, and there is no room for so many.
status = open("/proc/self/status").read()
size = 1024 * int(status.partition("VmSize:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))
message = ""
try:
    WHAT
except RBLNError as error:
    message = str(error)
after = threads()
same = torch.equal(decoded(compiled, latent), expected)
print(json.dumps([message, after - before, same]))
"""


def test_threads_that_can_not_be_started_are_an_error_and_none_is_left(saved: Path) -> None:
    script = NO_MORE.replace("WHAT", "load(rbln_num_threads=1000)")
    message, left, same = in_a_process(LOAD + script, saved)
    assert "999 threads were wanted" in message
    assert "the system gave" in message
    assert "num_threads" in message
    assert left == 0
    assert same


def test_a_limit_that_can_not_be_measured_on_so_many_threads_is_an_error(saved: Path) -> None:
    script = NO_MORE.replace(
        "    WHAT\nexcept RBLNError",
        """    from rbln_vae import _engine
    _engine.all_kernels()[-1].measure_limit(1000, 0.01)
    message = ""
except _engine.ThreadsUnavailableError""",
    )
    message, left, same = in_a_process(LOAD + script, saved)
    assert "999 threads were wanted" in message
    assert left == 0
    assert same


ARITHMETIC = """
import ctypes

libm = ctypes.CDLL("libm.so.6")
UPWARD, INVALID, DENORMAL = 0x800, 0x01, 0x02
latent = torch.randn(2, 4, 24, 24)
latent[1, 0, 0, 0] = float("nan")
usual = {n: decoded(load(rbln_num_threads=n), latent)[0] for n in (1, 3)}
fresh = {n: load(rbln_num_threads=n) for n in (1, 3)}
same, kept = [], []

def should_stop():
    kept.append(libm.fegetround() == UPWARD)

libm.fesetround(UPWARD)
found = {n: decoded(vae, latent, should_stop=should_stop)[0] for n, vae in fresh.items()}
kept.append(libm.fegetround() == UPWARD)
libm.fesetround(0)
same = [torch.equal(usual[1], each) for each in [*usual.values(), *found.values()]]
# A trap would end the process.
libm.feenableexcept(INVALID | DENORMAL)
decoded(fresh[1], latent)
libm.fedisableexcept(INVALID | DENORMAL)
print(json.dumps([same, kept]))
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="the numbers of rounding modes and traps are those of x86-64 and glibc",
)
def test_how_the_caller_rounds_and_traps_changes_no_bit(saved: Path) -> None:
    same, kept = in_a_process(LOAD + ARITHMETIC, saved)
    assert same == [True] * 4
    assert kept
    assert all(kept)
