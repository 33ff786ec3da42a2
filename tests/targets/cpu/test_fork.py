"""Models in forked processes, which have the memory of their parents and none of the threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from processes import in_a_process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PRELUDE = """
import gc, json, os, threading, torch
from rbln_vae import RBLNAutoencoderKL

torch.manual_seed(0)
vae = RBLNAutoencoderKL.from_pretrained(sys.argv[1], rbln_num_threads=3)
latents = [torch.randn(1, 4, 8 + n, 8) for n in range(4)]

def decoded(latent):
    return vae.decode(latent, return_dict=False)[0]

expected = list(map(decoded, latents))

def right():
    return all(map(torch.equal, map(decoded, latents), expected))

def threads():
    return len(os.listdir("/proc/self/task"))

def child(work):
    number = os.fork()
    if number == 0:
        try:
            code = 0 if work() else 3
        except BaseException as error:
            print(repr(error), flush=True)
            code = 4
        os._exit(code)
    return number

def code_of(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
"""


Run: TypeAlias = Callable[[str], Any]


@pytest.fixture
def run(saved: Path) -> Run:
    """Runs a script in a process that has loaded a model."""
    return lambda script: in_a_process(PRELUDE + script, saved)


def test_a_child_has_threads_of_its_own(run: Run) -> None:
    script = """
def work():
    before = threads()
    same = right()
    return same and before == 1 and threads() == 3

print(json.dumps([code_of(child(work)), right()]))
"""
    assert run(script) == [0, True]


def test_a_child_that_drops_its_model_ends(run: Run) -> None:
    script = """
def drop():
    global vae
    del vae
    gc.collect()
    return True

def run_and_drop():
    return right() and drop()

print(json.dumps([code_of(child(drop)), code_of(child(run_and_drop)), right()]))
"""
    assert run(script) == [0, 0, True]


@pytest.mark.slow
def test_a_child_that_ends_as_usual_ends(run: Run) -> None:
    script = """
number = os.fork()
if number == 0:
    sys.exit(0 if right() else 3)
print(json.dumps(code_of(number)))
"""
    assert run(script) == 0


@pytest.mark.slow
def test_a_fork_in_the_middle_of_runs_leaves_no_lock_behind(run: Run) -> None:
    script = """
stop = threading.Event()
failed = []

def keep_running():
    while not stop.is_set():
        if not right():
            failed.append(True)

runners = [threading.Thread(target=keep_running) for _ in range(3)]
for each in runners: each.start()
codes = [code_of(child(right)) for _ in range(40)]
stop.set()
for each in runners: each.join()
print(json.dumps([codes, failed]))
"""
    assert run(script) == [[0] * 40, []]


def test_a_child_of_a_child_runs_too(run: Run) -> None:
    script = """
print(json.dumps(code_of(child(lambda: right() and code_of(child(right)) == 0))))
"""
    assert run(script) == 0


def test_a_run_whose_callback_forks_goes_on_in_the_parent_alone(run: Run) -> None:
    script = """
from long_runs import endless_run
runtime, image = endless_run(num_threads=3)
parent, asked = os.getpid(), 0

def should_stop():
    global asked
    asked += 1
    if asked == 2:
        os.fork()
    return asked == 4

try:
    runtime.run(image, should_stop=should_stop)
except RuntimeError as error:
    message = str(error)
if os.getpid() != parent:
    os._exit(0 if "forked" in message and right() else 3)
print(json.dumps([code_of(-1), "should_stop" in message, right()]))
"""
    assert run(script) == [0, True, True]


def test_workers_of_multiprocessing_share_a_model(run: Run) -> None:
    script = """
import multiprocessing
context = multiprocessing.get_context("fork")

def decode(n):
    return decoded(latents[n]).numpy()

with context.Pool(2) as pool:
    found = pool.map(decode, [0, 1, 2, 3, 0, 1])
same = [torch.equal(torch.from_numpy(f), expected[n % 4]) for n, f in enumerate(found)]
print(json.dumps([all(same), right()]))
"""
    assert run(script) == [True, True]


@pytest.mark.slow
def test_workers_of_a_data_loader_encode(run: Run) -> None:
    script = """
images = torch.randn(6, 3, 16, 16)
moments = vae.encode(images).latent_dist.parameters

class Latents(torch.utils.data.Dataset):
    def __len__(self):
        return len(images)
    def __getitem__(self, n):
        return vae.encode(images[n : n + 1]).latent_dist.parameters[0]

loader = torch.utils.data.DataLoader(
    Latents(), batch_size=2, num_workers=2, multiprocessing_context="fork"
)
print(json.dumps([torch.equal(torch.cat(list(loader)), moments), right()]))
"""
    assert run(script) == [True, True]


def test_a_server_that_forks_before_it_serves(run: Run) -> None:
    script = """
import socket
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()

def serve():
    connection, _ = listener.accept()
    with connection:
        n = connection.recv(1)[0]
        connection.sendall(decoded(latents[n]).numpy().tobytes())
    return True

workers = [child(serve) for _ in range(4)]
same = []
for n in range(4):
    with socket.create_connection(listener.getsockname()) as connection:
        connection.sendall(bytes([n]))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    same.append(answer == expected[n].numpy().tobytes())
print(json.dumps([same, [code_of(each) for each in workers]]))
"""
    assert run(script) == [[True] * 4, [0] * 4]


def test_arrays_converted_by_torch_do_not_hang_a_child(run: Run) -> None:
    script = """
torch.set_num_threads(2)
large = torch.randn(1, 4, 64, 64, dtype=torch.float64)
result = decoded(large)  # torch converts it, on threads of its own
print(json.dumps(code_of(child(lambda: torch.equal(decoded(large), result)))))
"""
    assert run(script) == 0
