from __future__ import annotations

import os

# OpenMP reads this when torch is imported. Tests run side by side, and a thread that spins while it
# waits takes a core from another: a decode that needs 0.5 s alone took 3 to 15 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Triton, which reads this when it is imported, interprets its kernels where no GPU could run them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Machines that run tests are slow at times, which is no failure; and a failure repeats.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")

# What is tested is compiled, here and in processes that tests start.
os.environ["RBLN_VAE_CACHE"] = "off"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test has the same ones in every run, whichever tests run before it."""
    torch.manual_seed(0)
