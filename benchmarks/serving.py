"""The service under load: one client, eight, and more than it can answer.

The server is `rbln-vae serve` in a process of its own; the clients are diffusers' own
`remote_decode`, which gets a PNG, and a raw one, which gets the tensor.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import requests
import torch

from .machine import threads
from .models import make_input, make_model
from .report import write

CLIENTS = 8
QUEUE = 16
PATIENCE = 600.0
LARGE = 4096
"""Pixels a side of the images that are only planned."""
TIGHT = "3GiB"
"""A memory limit in which these need a plan that takes a second or more."""
PLANS = 10


@dataclass
class Server:
    """A running server."""

    address: str
    process: subprocess.Popen[bytes]

    @property
    def memory(self) -> int:
        """Resident bytes now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s*(\d+)", status)
        assert found
        return int(found[1]) * 1024


@contextlib.contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[Server]:
    """`rbln-vae serve` on a free port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rbln_vae", "serve", str(model), "--port", str(port)]
    command += ["--queue", str(QUEUE), "--threads", str(threads()), "--run-timeout", "600"]
    command += options
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    running = Server(f"http://127.0.0.1:{port}", process)
    try:
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{running.address}/ready", timeout=PATIENCE).ok:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        process.wait(PATIENCE)


# Clients: each gives the status


def raw_client(address: str, latent: torch.Tensor) -> int:
    """Post bytes, get the tensor."""
    answer = requests.post(
        f"{address}/decode",
        params={"shape": list(latent.shape), "dtype": "float32", "output_type": "pt"},
        data=latent.numpy().tobytes(),
        timeout=PATIENCE,
    )
    return answer.status_code


def diffusers_client(address: str, latent: torch.Tensor) -> int:
    """Post a latent with diffusers' client, get a picture."""
    from diffusers.utils.remote_utils import remote_decode

    try:
        remote_decode(f"{address}/decode", latent, do_scaling=False, image_format="png")
    except RuntimeError as error:
        (answer,) = error.args
        return 429 if answer["code"] == "queue_full" else 500
    return 200


def run_seconds(address: str) -> float:
    """Seconds of all runs of the server so far."""
    metrics = requests.get(f"{address}/metrics", timeout=PATIENCE).text
    return sum(map(float, re.findall(r"^rbln_vae_run_seconds_sum\S* (\S+)", metrics, re.M)))


KINDS: dict[str, Callable[[str, torch.Tensor], int]] = {
    "raw tensor": raw_client,
    "diffusers, PNG": diffusers_client,
}


@dataclass
class Added:
    """One client: seconds of a decode alone, and through the service.

    `beside` are those of a request in which the model didn't run: what the service adds,
    without what one run differs from another.
    """

    bare: list[float] = field(default_factory=list)
    served: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    beside: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})


def added(
    address: str, decode: Callable[[torch.Tensor], object], latent: torch.Tensor, rounds: int
) -> Added:
    """Decode here and there in turn, after one of each to warm up."""
    result = Added()
    for number in range(rounds + 1):
        start = time.perf_counter()
        decode(latent)
        bare = time.perf_counter() - start
        if number:
            result.bare.append(bare)
        for kind, client in KINDS.items():
            before = run_seconds(address)
            start = time.perf_counter()
            status = client(address, latent)
            seconds = time.perf_counter() - start
            assert status == 200, status
            if number:
                result.served[kind].append(seconds)
                result.beside[kind].append(seconds - (run_seconds(address) - before))
    return result


def loop_rate(decode: Callable[[torch.Tensor], object], latent: torch.Tensor, calls: int) -> float:
    """Images a second of calls one after the other in this process."""
    decode(latent)
    start = time.perf_counter()
    for _ in range(calls):
        decode(latent)
    return calls / (time.perf_counter() - start)


def served_rate(address: str, kind: str, latent: torch.Tensor, calls: int) -> float:
    """Images a second of eight clients that each wait for their answer."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda _: KINDS[kind](address, latent), range(calls)))
        seconds = time.perf_counter() - start
    assert all(status == 200 for status in answers)
    return calls / seconds


@dataclass
class Overload:
    """What became of more requests than the server can answer.

    Attributes:
        rate: Requests a second that were sent.
        statuses: How many were answered how; 0 is no answer.
        p50: Seconds of those that were admitted, at the median.
        p99: The same at the 99th percentile.
        bound: Seconds that a full queue takes, and a batch before it.
        memory: Resident bytes of the server, every few seconds.
    """

    rate: float
    statuses: dict[int, int]
    p50: float
    p99: float
    bound: float
    memory: list[int]


def overload(running: Server, latent: torch.Tensor, capacity: float, seconds: float) -> Overload:
    """Send twice as much as the server can answer, whatever it answers."""
    rate = 2 * capacity
    # Those that are admitted wait, and all that wait have a thread here.
    most = 4 * (QUEUE + 8) + 64
    statuses: Counter[int] = Counter()
    admitted: list[float] = []
    memory: list[int] = []

    def one(client: Callable[[str, torch.Tensor], int]) -> None:
        start = time.perf_counter()
        try:
            status = client(running.address, latent)
        except Exception:
            status = 0
        statuses[status] += 1
        if status == 200:
            admitted.append(time.perf_counter() - start)

    kinds = list(KINDS.values())
    with ThreadPoolExecutor(most) as pool:
        start, sampled = time.perf_counter(), -math.inf
        for number in range(max(1, math.ceil(rate * seconds))):
            while (now := time.perf_counter() - start) < number / rate:
                time.sleep(min(0.05, number / rate - now))
            if now - sampled >= max(1.0, seconds / 120):
                memory.append(running.memory)
                sampled = now
            pool.submit(one, kinds[number % len(kinds)])
    memory.append(running.memory)
    return Overload(
        rate,
        dict(statuses),
        statistics.median(admitted),
        percentile(admitted, 0.99),
        (QUEUE + 8 + 1) / capacity,
        memory,
    )


def measure(model: Path | None, size: int, rounds: int, minutes: float) -> str:
    """Run all of it.

    Args:
        model: A compiled or a diffusers model; `None` is that of Stable Diffusion with
            random weights.
        size: Pixels a side.
        rounds: Counted runs of each kind.
        minutes: How long the overload lasts.

    Returns:
        A Markdown table.
    """
    from rbln_vae import RBLNAutoencoderKL

    warnings.simplefilter("ignore", FutureWarning)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        if model is None:
            make_model(directory / "original")
            model = directory / "original"
        ours = RBLNAutoencoderKL.from_pretrained(
            model,
            export=None,
            rbln_target="cpu",
            rbln_num_threads=threads(),
            rbln_timeout=PATIENCE,
            **({} if (model / "rbln_config.json").exists() else {"rbln_sample_size": size}),
        )
        compiled = directory / "compiled"
        ours.save_pretrained(compiled)
        factor = int(ours.rbln_config.vae_scale_factor or 1)
        channels = ours.rbln_config.latent_channels or 4
        latent = make_input(compiled, "decode", size)
        with server(compiled, directory / "log") as running:
            one = added(running.address, ours.decode, latent, rounds)
            loop = loop_rate(ours.decode, latent, 2 * rounds)
            rates = {
                kind: served_rate(running.address, kind, latent, max(CLIENTS, 2 * rounds))
                for kind in KINDS
            }
            load = overload(running, latent, rates["raw tensor"], 60 * minutes)
        with server(compiled, directory / "log", "--memory-limit", TIGHT) as running:
            watch = watched(running.address, channels, factor, PLANS)
    return _save(size, minutes, one, loop, rates, load, watch)


@dataclass
class Watched:
    """How a server answers those who watch it while it plans.

    Attributes:
        plans: Seconds from a request of a new size to its admission.
        health: Seconds of each `GET /health` meanwhile.
    """

    plans: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


def watched(address: str, channels: int, factor: int, count: int) -> Watched:
    """Ask for large images, each of a size that is planned for the first time.

    No body is sent: a request is planned by its query, and then the client hangs up.
    """
    result, done = Watched(), threading.Event()
    host, port = address.removeprefix("http://").split(":")
    cells = LARGE // factor

    def plan() -> None:
        for number in range(count):
            shape = (1, channels, cells - number, cells)
            query = "&".join([*(f"shape={n}" for n in shape), "dtype=float32"])
            head = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            with socket.create_connection((host, int(port)), PATIENCE) as connection:
                start = time.perf_counter()
                connection.sendall(f"{head}Content-Length: {4 * math.prod(shape)}\r\n\r\n".encode())
                # The body is asked for when the request is admitted; else it is refused.
                connection.recv(1)
                result.plans.append(time.perf_counter() - start)
        done.set()

    with ThreadPoolExecutor(1) as pool, requests.Session() as session:
        planning = pool.submit(plan)
        while not done.is_set() and not planning.done():
            start = time.perf_counter()
            assert session.get(f"{address}/health", timeout=PATIENCE).ok
            result.health.append(time.perf_counter() - start)
        planning.result()
    return result


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share of all doesn't exceed."""
    return sorted(values)[min(len(values) - 1, math.floor(share * len(values)))]


def _save(
    size: int,
    minutes: float,
    one: Added,
    loop: float,
    rates: dict[str, float],
    load: Overload,
    watch: Watched,
) -> str:
    bare = statistics.median(one.bare)
    rows = [f"| a decode of {size}² alone | {bare * 1e3:.0f} ms |"]
    for kind, seconds in one.served.items():
        more, beside = statistics.median(seconds) - bare, statistics.median(one.beside[kind])
        rows.append(f"| a request less such a decode, {kind} | {more * 1e3:.0f} ms |")
        rows.append(
            f"| a request less its own run, {kind} | {beside * 1e3:.1f} ms, {beside / bare:.1%} |"
        )
    rows.append(f"| calls in a loop in one process | {loop:.2f} images/s |")
    for kind, rate in rates.items():
        rows.append(f"| {CLIENTS} clients, {kind} | {rate:.2f} images/s, {rate / loop:.1%} |")
    counts = load.statuses
    refused = counts.get(429, 0)
    others = sum(n for status, n in counts.items() if status not in (200, 429, 0))
    rows += [
        f"| {minutes:g} minutes of {load.rate:.1f} requests/s, twice the capacity | "
        f"{counts.get(200, 0)} results, {refused} refused with 429, {others} other answers, "
        f"{counts.get(0, 0)} without an answer |",
        f"| latency of the admitted | median {load.p50:.2f} s, p99 {load.p99:.2f} s, "
        f"a full queue is {load.bound:.2f} s |",
        f"| memory of the server, after a tenth of the time and at the end | "
        f"{load.memory[len(load.memory) // 10] / 1e6:.0f} MB, {load.memory[-1] / 1e6:.0f} MB |",
        f"| `GET /health` while {len(watch.plans)} sizes are planned, each in "
        f"{statistics.median(watch.plans):.2f} s | "
        f"median {statistics.median(watch.health) * 1e3:.1f} ms, "
        f"p99 {percentile(watch.health, 0.99) * 1e3:.1f} ms |",
    ]
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    data = {"one client": asdict(one), "loop": loop, "rates": rates, "overload": asdict(load)}
    data["planning"] = asdict(watch)
    write("serving", table, data)
    return table
