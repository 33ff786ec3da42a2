from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Iterator

# OpenMP reads this when torch is imported. Tests run side by side, and a thread that spins while it
# waits takes a core from another: a decode that needs 0.5 s alone took 3 to 15 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from rbln_vae.graph.capture import capture
from rbln_vae.graph.ir import Graph

# Triton, which reads this when it is imported, interprets its kernels where no GPU could run them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Machines that run tests are slow at times, which is no failure; and a failure repeats.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")

# What is tested is compiled, here and in processes that tests start.
os.environ["RBLN_VAE_CACHE"] = "off"


@pytest.fixture(scope="session", autouse=True)
def _captured_once() -> Iterator[None]:
    """Capture each model once, and take the graph for every other of the same class and weights.

    That is nine tenths of the work of compiling a small model, and depends on neither target nor
    dtype. Tests of capturing call `capture` itself.
    """
    graphs: dict[tuple[str, str, int], Graph] = {}

    def once(module: torch.nn.Module, part: str, channels: int) -> Graph:
        stored = io.BytesIO()
        try:
            torch.save(module, stored)
        except (AttributeError, TypeError, pickle.PicklingError):  # of a class within a test
            return capture(module, part, channels)
        key = hashlib.sha256(stored.getbuffer()).hexdigest(), part, channels
        if key not in graphs:
            graphs[key] = capture(module, part, channels)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rbln_vae.targets.base.capture", once)
        yield


@pytest.fixture
def captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test compiles is captured in it, whatever was captured before."""
    monkeypatch.setattr("rbln_vae.targets.base.capture", capture)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test has the same ones in every run, whichever tests run before it."""
    torch.manual_seed(0)
