"""optimum-rbln's own `RBLNVQModel`, as it comes from PyPI, runs on `rbln_vae.rebel`."""

from __future__ import annotations

import pytest
import tiny_vaes
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from optimum.rbln import RBLNAutoConfig, RBLNVQModel, RBLNVQModelConfig
from torch import Tensor

TOLERANCE = 1e-4
SIZE = {"sample_size": 64}


@pytest.fixture(scope="module", params=["spatial", "group"])
def movq(request) -> VQModel:
    return tiny_vaes.make("VQModel", norm_type=request.param)


@pytest.fixture(scope="module")
def compiled(movq) -> RBLNVQModel:
    return RBLNVQModel.from_model(movq, rbln_config={"uses_encoder": True, **SIZE})


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def latent() -> Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def decoded(model: VQModel | RBLNVQModel, latent: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(latent, force_not_quantize=True)["sample"]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def test_it_is_the_one_from_pypi():
    assert RBLNVQModel.__module__.startswith("optimum.rbln.")


def test_encode_matches_diffusers(movq, compiled, image):
    result = compiled.encode(image)
    assert isinstance(result, VQEncoderOutput)
    with torch.no_grad():
        assert_close(result.latents, movq.encode(image).latents)
    assert torch.equal(compiled.encode(image, return_dict=False)[0], result.latents)


def test_decode_matches_diffusers(movq, compiled, latent):
    result = compiled.decode(latent, force_not_quantize=True)
    assert isinstance(result, DecoderOutput)
    assert_close(result.sample, decoded(movq, latent))
    assert torch.equal(result.commit_loss, torch.zeros(1))
    sample, _ = compiled.decode(latent, return_dict=False, force_not_quantize=True)
    assert torch.equal(sample, result.sample)


def test_batch_and_size_are_compiled_in(movq):
    options = {"batch_size": 2, "sample_size": (32, 48)}
    model = RBLNVQModel.from_model(movq, rbln_config=options)
    latent = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    assert_close(decoded(model, latent), decoded(movq, latent))
    with pytest.raises(RuntimeError, match="compiled for the shape"):
        decoded(model, latent[:1])


@pytest.mark.parametrize("norm_type", ["spatial", "group"])
def test_a_model_in_bfloat16_is_as_close_as_diffusers_own(norm_type, latent):
    half = tiny_vaes.make("VQModel", norm_type=norm_type).to(torch.bfloat16)
    model = RBLNVQModel.from_model(half, rbln_config=SIZE)
    assert model.rbln_config.dtype == torch.bfloat16
    expected = decoded(tiny_vaes.make("VQModel", norm_type=norm_type), latent)
    own = decoded(half, latent.bfloat16())
    found = decoded(model, latent)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 1.2 * (own.float() - expected).norm()


def test_saving_and_loading(compiled, image, latent, tmp_path):
    compiled.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "rbln_config.json", "encoder.rbln", "decoder.rbln"} <= names
    again = RBLNVQModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(decoded(again, latent), decoded(compiled, latent))
    assert torch.equal(again.encode(image).latents, compiled.encode(image).latents)
    config = RBLNAutoConfig.from_pretrained(tmp_path / "saved")
    assert isinstance(config, RBLNVQModelConfig)
    assert tuple(config.latent_sample_size) == (16, 16)


def test_from_pretrained_compiles_a_directory(movq, latent, tmp_path):
    movq.save_pretrained(tmp_path / "movq")
    model = RBLNVQModel.from_pretrained(
        tmp_path, subfolder="movq", export=True, rbln_sample_size=64
    )
    assert_close(decoded(model, latent), decoded(movq, latent))
