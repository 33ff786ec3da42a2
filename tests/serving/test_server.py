"""The server on real sockets: slow clients, many at once, and its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from services import PATIENCE, GatedModel, make_app, query_of, raw, running, wait_until
from vaes import default_compiled, noise

from rbln_vae.errors import RBLNCancelledError
from rbln_vae.serving import server as server_module
from rbln_vae.serving.models import ServedModel
from rbln_vae.serving.server import make_server
from rbln_vae.serving.settings import Address, Limits
from rbln_vae.targets.watch import ShouldStop


def post(address: str, tensor: torch.Tensor, path: str = "/decode", **query: Any) -> Any:
    return requests.post(
        address + path,
        params=query_of(tensor, output_type="pt", **query),
        data=raw(tensor),
        timeout=PATIENCE,
    )


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


# Connections


def test_many_clients_at_once_each_get_their_own() -> None:
    latents = [noise(1, 4, 4 + seed % 3, 4, seed=seed) for seed in range(40)]
    with running(make_app(max_batch=4)) as address, ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda latent: post(address, latent), latents))
    for latent, answer in zip(latents, answers, strict=True):
        assert answer.status_code == 200
        assert answer.content == raw(default_compiled().decode(latent).sample)


def test_a_client_that_hangs_up_leaves_the_queue() -> None:
    model = GatedModel()
    latent = noise(1, 4, 4, 4)
    with running(make_app(model, max_batch=1)) as address, ThreadPoolExecutor(1) as clients:
        first = clients.submit(post, address, latent)
        assert model.started.acquire(timeout=PATIENCE)
        query = "shape=1&shape=4&shape=4&shape=4&dtype=float32"
        head = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 256\r\n\r\n"
        with connect(address) as leaving:
            leaving.sendall(head.encode() + raw(latent))
            wait_until(lambda: waiting(address) > 0)
        wait_until(lambda: waiting(address) == 0)
        model.gate.set()
        assert first.result().status_code == 200
        assert len(model.shapes) == 1


def test_a_run_whose_client_hangs_up_is_stopped() -> None:
    class Endless(ServedModel):
        """A model that takes as long as somebody waits, and then begins."""

        def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
            started.set()
            wait_until(should_stop)
            with pytest.raises(RBLNCancelledError) as stopped:
                super().run(part, tensor, should_stop)
            errors.append(stopped.value)
            raise stopped.value

    started, errors = threading.Event(), list[Exception]()
    with running(make_app(Endless("endless", default_compiled()))) as address:
        query = "shape=1&shape=4&shape=4&shape=4&dtype=float32&output_type=pt"
        head = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 256\r\n\r\n"
        with connect(address) as leaving:
            leaving.sendall(head.encode() + raw(noise(1, 4, 4, 4)))
            assert started.wait(PATIENCE)
            assert metric(address, "rbln_vae_runs") == 1
        wait_until(lambda: metric(address, "rbln_vae_runs") == 0)
    assert len(errors) == 1


def metric(address: str, name: str) -> float:
    text = requests.get(f"{address}/metrics", timeout=PATIENCE).text
    found = re.search(rf"^{name} (\S+)", text, re.MULTILINE)
    assert found
    return float(found[1])


def waiting(address: str) -> float:
    return metric(address, "rbln_vae_queue_images")


@pytest.mark.parametrize("start", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_doesnt_come_ends_the_connection(
    start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.2)
    with running(make_app()) as address, connect(address) as connection:
        connection.sendall(start)
        began = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - began < PATIENCE / 2


def test_a_body_that_trickles_is_answered_and_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_REST_SECONDS", 0.2)
    app = make_app(limits=Limits(body_timeout=0.3))
    with running(app) as address, connect(address) as connection:
        query = "shape=1&shape=4&shape=4&shape=4&dtype=float32"
        head = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 256\r\n\r\n"
        connection.sendall(head.encode() + b"x")
        received = read_all(connection)
    assert b" 408 " in received
    assert b'"slow_client"' in received


def test_an_answer_that_nobody_reads_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_STALL_SECONDS", 0.3)

    class Verbose(ServedModel):
        def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
            return torch.zeros(1, 3, 2048, 2048)  # 48 MB, more than sockets hold

    app = make_app(Verbose("verbose", default_compiled()))
    with running(app) as address, connect(address) as connection:
        query = "shape=1&shape=4&shape=4&shape=4&dtype=float32&output_type=pt"
        head = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 256\r\n\r\n"
        connection.sendall(head.encode() + raw(noise(1, 4, 4, 4)))
        wait_until(lambda: is_cut_off(connection))
        assert requests.get(f"{address}/health", timeout=PATIENCE).status_code == 200


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the other side has ended the connection, seen without reading."""
    try:
        connection.send(b"x")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def test_a_refusal_reaches_a_client_that_sends_a_large_body() -> None:
    app = make_app(limits=Limits(max_body=1000))
    with running(app) as address:
        answer = requests.post(f"{address}/encode", data=bytes(20_000_000), timeout=PATIENCE)
        assert answer.status_code == 413
        assert answer.json()["code"] == "too_large"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /decode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100_000,
    ],
)
def test_what_is_no_http_is_answered_in_the_same_form(request_bytes: bytes) -> None:
    with running(make_app()) as address:
        with connect(address) as connection:
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
            received = read_all(connection)
        assert received == b"" or b" 4" in received.split(b"\r\n")[0]
        assert requests.get(f"{address}/health", timeout=PATIENCE).status_code == 200


def test_idle_connections_are_kept_for_the_next_request() -> None:
    with running(make_app()) as address, requests.Session() as session:
        for _ in range(3):
            assert session.get(f"{address}/health", timeout=PATIENCE).status_code == 200


# The process


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    default_compiled().save_pretrained(directory)
    return directory


@pytest.fixture
def process(compiled: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rbln-vae serve` in a process of its own, and its address.

    It lets requests wait for others longer than any test does, so that they are seen to wait.
    """
    arguments = ["serve", str(compiled), "--model", f"second={compiled}", "--port", "0"]
    arguments += ["--memory-limit", ""]  # as an empty field of a form gives it: none
    started = subprocess.Popen(
        [sys.executable, "-m", "rbln_vae", *arguments, "--max-wait-ms", str(2000 * PATIENCE)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RBLN_VAE_API_KEY": "key"},
    )
    assert started.stderr
    try:
        told = (re.match(r"serving tiny, second on http://(\S+)$", line) for line in started.stderr)
        address = next(f"http://:key@{match[1]}" for match in told if match)
        assert requests.get(f"{address}/ready", timeout=PATIENCE).ok
        yield started, address
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_sigterm_starts_what_waits_for_others_and_finishes_it(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    started, address = process
    latent = noise(1, 4, 8, 8)
    with ThreadPoolExecutor(4) as clients:
        answers = [
            clients.submit(post, address, latent, model=model)
            for model in ("tiny", "second", "tiny", "second")
        ]
        wait_until(lambda: waiting(address) == len(answers))
        started.send_signal(signal.SIGTERM)
        expected = raw(default_compiled().decode(latent).sample)
        for answer in answers:
            assert answer.result().status_code == 200
            assert len(answer.result().content) == len(expected)
    _, log = started.communicate(timeout=PATIENCE)
    assert started.returncode in (0, -signal.SIGTERM)
    assert "traceback" not in log.lower()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address}/health", timeout=PATIENCE)


@pytest.mark.slow
def test_the_command_names_what_is_wrong(compiled: Path) -> None:
    def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rbln_vae", "serve", *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    result = serve(str(compiled), "--memory-limit", "lots")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --memory-limit lots:")
    result = serve(str(compiled), "--model", f"{compiled.name}={compiled}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: two models are named 'tiny'")


def test_a_port_that_is_taken_is_not_said_to_be_listened_on() -> None:
    ports: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = make_server(make_app(), Address(port=taken.getsockname()[1]), ports.append)
        with pytest.raises(SystemExit):
            server.run()
    assert not ports


def test_the_application_closes_its_backend() -> None:
    async def main() -> None:
        app = make_app()
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
