"""One VAE, original and compiled, for all tests of pipelines; not to be written to."""

from __future__ import annotations

import pytest
import tiny_vaes
from diffusers import AutoencoderKL

from rbln_vae import RBLNAutoencoderKL


@pytest.fixture(scope="session")
def vae() -> AutoencoderKL:
    return tiny_vaes.make()


@pytest.fixture(scope="session")
def compiled(vae: AutoencoderKL) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_model(vae, rbln_target="cpu", rbln_dtype="float32")
