"""The service on a real local Ray cluster."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from services import PATIENCE, query_of, raw, wait_until
from test_served_videos import MP4, assert_shows, wan
from vaes import default_compiled, default_vae, noise

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rbln-vae[ray]'")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'rbln-vae[ray]'")

pytestmark = pytest.mark.slow

MARK = "RBLN_VAE_TEST_CLUSTER"


@pytest.fixture(scope="module")
def mark() -> str:
    """What the processes of this test's cluster have in their environment."""
    return uuid.uuid4().hex


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mark: str) -> Iterator[str]:
    from ray import serve

    from rbln_vae.serving.ray import build

    directory = tmp_path_factory.mktemp("models") / "tiny"
    default_compiled().save_pretrained(directory)
    wan().save_pretrained(directory.parent / "wan")
    os.environ[MARK] = mark
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        models = f"{directory},{directory.parent / 'wan'}"
        options = {"model": models, "replicas": "2", "queue": "1000"}
        serve.run(build(options))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        del os.environ[MARK]


def workers(mark: str) -> list[int]:
    """The processes of this cluster that run models."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            title = (directory / "cmdline").read_bytes()
            ours = f"{MARK}={mark}".encode() in (directory / "environ").read_bytes()
        except OSError:
            continue
        if ours and title.startswith(b"ray::") and b"Worker" in title:
            found.append(int(directory.name))
    return found


def post(address: str, tensor: torch.Tensor) -> Any:
    return requests.post(
        f"{address}/decode",
        params=query_of(tensor, output_type="pt"),
        data=raw(tensor),
        timeout=2 * PATIENCE,
    )


def test_answers_diffusers_client(server: str) -> None:
    latent, image = noise(1, 4, 6, 5), noise(1, 3, 12, 10)
    found = remote_decode(
        f"{server}/decode", latent, do_scaling=False, output_type="pt", return_type="pt"
    )
    assert torch.equal(found, default_compiled().decode(latent).sample)
    expected = default_compiled().encode(image).latent_dist.mode()
    assert torch.equal(remote_encode(f"{server}/encode", image), expected)


def test_sends_videos(server: str) -> None:
    latent = noise(1, 16, 3, 4, 6)
    assert_shows(remote_decode(f"{server}/decode?model=wan", latent, **MP4), latent)
    with pytest.raises(RuntimeError, match="'code': 'not_finite'"):
        remote_decode(f"{server}/decode?model=wan", latent.fill_(3e38), **MP4)


def test_a_client_that_leaves_a_video_lets_the_next_one_in(server: str) -> None:
    def ask(frames: int) -> Any:
        latent = noise(1, 16, frames, 4, 6)
        query = query_of(latent, output_type="mp4", model="wan")
        return requests.post(
            f"{server}/decode", params=query, data=raw(latent), stream=True, timeout=2 * PATIENCE
        )

    for _ in range(4):  # more than there are workers, each for many minutes
        answer = ask(20_000)
        assert answer.status_code == 200
        answer.close()
    assert_shows(ask(3).content, noise(1, 16, 3, 4, 6))


def test_refuses_in_the_same_form(server: str) -> None:
    with pytest.raises(RuntimeError, match="'code': 'wrong_shape'"):
        remote_decode(f"{server}/decode", noise(1, 5, 6, 5), do_scaling=False)
    assert requests.get(f"{server}/models", timeout=PATIENCE).json()["models"][0]["name"] == "tiny"


def test_a_worker_that_is_killed_costs_no_answer(server: str, mark: str) -> None:
    wait_until(lambda: len(workers(mark)) == 2)
    latents = [noise(1, 4, 24, 24, seed=seed) for seed in range(8)]
    expected = [raw(default_compiled().decode(latent).sample) for latent in latents]
    answers: list[list[Any]] = [[] for _ in latents]
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            answers[number].append(post(server, latents[number]))

    def each_is_answered_twice_more() -> None:
        before = list(map(len, answers))
        wait_until(
            lambda: (
                all(len(a) >= n + 2 for a, n in zip(answers, before, strict=True))
                or any(each.done() for each in clients)
            )
        )

    before = workers(mark)
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        try:
            each_is_answered_twice_more()
            os.kill(before[0], signal.SIGKILL)
            wait_until(lambda: before[0] not in workers(mark))
            each_is_answered_twice_more()
        finally:
            stop.set()
        for each in clients:
            each.result()
    for number, received in enumerate(answers):
        for answer in received:
            assert answer.status_code == 200, answer.text
            assert answer.content == expected[number]
    # And another takes its place.
    wait_until(lambda: len(workers(mark)) == 2)


def test_options_that_are_wrong_are_named() -> None:
    from rbln_vae.serving.ray import Options

    with pytest.raises(ValueError, match="replica"):
        Options.model_validate({"model": "x", "replica": 2})
    options = Options.model_validate({"model": "a=x,b=y/z", "replicas": "3"})
    assert options.replicas == 3
    assert options.named_models() == {"a": "x", "b": "y/z"}


@pytest.mark.parametrize("model", ["", "=x", "a=", "a=x,,b=y", "a=x,a=y", "x/a,y/a"])
def test_models_that_lack_a_name_or_share_it_are_refused_before_a_worker_starts(model: str) -> None:
    from rbln_vae.serving.ray import build

    with pytest.raises(ValueError, match=r"lacks a name|two models are named 'a'"):
        build({"model": model})


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_a_worker_opens_what_the_command_opens(tmp_path: Path, nothing: str | None) -> None:
    from rbln_vae.serving.ray import Options, Worker

    default_vae().save_pretrained(tmp_path / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    options = Options(model=f"sd={tmp_path}", dtype="float32", memory_limit=nothing)
    worker = Worker(options)
    latent = noise(1, 4, 6, 5)
    outcome = asyncio.run(worker.run("sd", "decoder", latent))
    assert torch.equal(outcome.tensor, default_compiled().decode(latent).sample)


def test_workers_plan(server: str) -> None:
    answer = requests.get(f"{server}/plan", timeout=PATIENCE).json()
    assert answer["model"] == "tiny"
    assert {run["part"] for run in answer["runs"]} == {"encoder", "decoder"}
    assert all(run["memory"] > 0 and run["seconds"] > 0 for run in answer["runs"])
