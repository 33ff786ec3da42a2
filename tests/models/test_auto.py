"""`RBLNAutoencoder` finds the class for a model by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_vaes
import torch
from vaes import make_flux2, make_vae, noise

from rbln_vae import (
    RBLNAutoencoder,
    RBLNAutoencoderKL,
    RBLNAutoencoderKLFlux2,
    RBLNCompileError,
    demo_model,
)

MODELS = {RBLNAutoencoderKL: make_vae, RBLNAutoencoderKLFlux2: make_flux2}
OPTIONS = {"target": "cpu", "dtype": "float32"}
by_class = pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)


@by_class
def test_a_loaded_model_is_compiled_by_its_class(cls: type[RBLNAutoencoderKL]) -> None:
    assert type(RBLNAutoencoder.from_model(MODELS[cls](), rbln_config=OPTIONS)) is cls


@by_class
@pytest.mark.parametrize("subfolder", [None, "vae"])
def test_a_directory_is_compiled_and_loaded_by_its_class(
    cls: type[RBLNAutoencoderKL], subfolder: str | None, tmp_path: Path
) -> None:
    where = {} if subfolder is None else {"subfolder": subfolder}
    MODELS[cls]().save_pretrained(tmp_path / "original" / (subfolder or ""))
    found = RBLNAutoencoder.from_pretrained(
        tmp_path / "original", export=True, rbln_config=OPTIONS, **where
    )
    assert type(found) is cls
    found.save_pretrained(tmp_path / "compiled" / (subfolder or ""))
    loaded = RBLNAutoencoder.from_pretrained(tmp_path / "compiled", rbln_num_threads=1, **where)
    assert type(loaded) is cls and loaded.rbln_config.num_threads == 1


def test_the_shipped_model_is_an_autoencoder_kl() -> None:
    found = RBLNAutoencoder.from_pretrained(
        demo_model(), export=None, rbln_config={**OPTIONS, "create_runtimes": False}
    )
    assert type(found) is RBLNAutoencoderKL


def test_a_class_that_is_not_compiled_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(RBLNCompileError, match=r"is a UNet2DModel.*AutoencoderKLFlux2"):
        RBLNAutoencoder.from_pretrained(tmp_path, export=True)
    with pytest.raises(RBLNCompileError, match="is a Conv2d"):
        RBLNAutoencoder.from_model(torch.nn.Conv2d(1, 1, 1))


def test_a_model_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="There is no directory"):
        RBLNAutoencoder.from_pretrained(f"{tmp_path}/missing/")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLWan", "VQModel"])
def test_models_are_compiled_and_loaded_whatever_the_default_dtype(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = tiny_vaes.make(kind)
    vae = RBLNAutoencoder.from_model(original, rbln_config=OPTIONS)
    z = noise(1, vae.resolved_config.latent_channels, 2, 2)
    expected = vae.decode_images(z)
    torch.set_default_dtype(dtype)
    try:
        again = RBLNAutoencoder.from_model(original, rbln_config=OPTIONS)
        again.save_pretrained(tmp_path)
        loaded = RBLNAutoencoder.from_pretrained(tmp_path)
        assert torch.equal(again.decode_images(z), expected)
        assert torch.equal(loaded.decode_images(z), expected)
    finally:
        torch.set_default_dtype(torch.float32)
