"""optimum-rbln's own `RBLNAutoencoderKL`, as it comes from PyPI, runs on `rbln_vae.rebel`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_vaes
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from optimum.rbln import RBLNAutoConfig, RBLNAutoencoderKL, RBLNAutoencoderKLConfig
from torch import Tensor

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vaes.make()


@pytest.fixture(scope="module")
def compiled(vae) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_model(vae, rbln_uses_encoder=True)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def latent() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def test_it_is_the_one_from_pypi():
    assert RBLNAutoencoderKL.__module__.startswith("optimum.rbln.")


def test_encode_matches_diffusers(vae, compiled, image):
    result = compiled.encode(image)
    assert isinstance(result, AutoencoderKLOutput)
    with torch.no_grad():
        expected = vae.encode(image).latent_dist
    assert_close(result.latent_dist.parameters, expected.parameters)
    (posterior,) = compiled.encode(image, return_dict=False)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    assert_close(
        posterior.sample(torch.Generator().manual_seed(2)),
        expected.sample(torch.Generator().manual_seed(2)),
    )


def test_decode_matches_diffusers(vae, compiled, latent):
    result = compiled.decode(latent)
    assert isinstance(result, DecoderOutput)
    with torch.no_grad():
        expected = vae.decode(latent).sample
    assert_close(result.sample, expected)
    assert_close(compiled.decode(latent, return_dict=False)[0], expected)


def test_strides_of_the_input_do_not_matter(vae, compiled, latent):
    turned = latent.to(memory_format=torch.channels_last)
    assert_close(compiled.decode(turned).sample, compiled.decode(latent).sample)


@pytest.mark.parametrize("batch_size", [2])
@pytest.mark.parametrize("sample_size", [32, (32, 48)])
def test_batch_and_size_are_compiled_in(vae, batch_size, sample_size):
    model = RBLNAutoencoderKL.from_model(
        vae, rbln_config={"batch_size": batch_size, "sample_size": sample_size}
    )
    height, width = model.rbln_config.latent_sample_size
    latent = torch.randn(batch_size, 4, height, width)
    with torch.no_grad():
        assert_close(model.decode(latent).sample, vae.decode(latent).sample)
    with pytest.raises(RuntimeError, match="compiled for the shape"):
        model.decode(latent[:1])
    assert model.encoder is None, "uses_encoder=None compiles no encoder there"


def test_a_model_in_bfloat16_is_as_close_as_diffusers_own(vae, latent):
    half = tiny_vaes.make().to(torch.bfloat16)
    model = RBLNAutoencoderKL.from_model(half)
    with torch.no_grad():
        expected = vae.decode(latent).sample
        own = half.decode(latent.to(torch.bfloat16)).sample
    found = model.decode(latent.to(torch.bfloat16)).sample
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 1.2 * (own.float() - expected).norm()


def test_saving_and_loading(compiled, latent, tmp_path):
    compiled.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "rbln_config.json", "encoder.rbln", "decoder.rbln"} <= names
    for options in ({}, {"export": False}, {"export": None}):
        again = RBLNAutoencoderKL.from_pretrained(tmp_path / "saved", **options)
        assert torch.equal(again.decode(latent).sample, compiled.decode(latent).sample)
    config = RBLNAutoConfig.from_pretrained(tmp_path / "saved")
    assert isinstance(config, RBLNAutoencoderKLConfig)
    assert tuple(config.image_size) == (64, 64)
    assert tuple(config.latent_sample_size) == (8, 8)


def test_from_pretrained_compiles_a_directory(vae, latent, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    model = RBLNAutoencoderKL.from_pretrained(
        tmp_path, subfolder="vae", export=True, rbln_uses_encoder=False
    )
    with torch.no_grad():
        assert_close(model.decode(latent).sample, vae.decode(latent).sample)


def test_a_model_without_runtimes_is_saved_and_run_later(vae, compiled, latent, tmp_path):
    config = RBLNAutoencoderKLConfig(create_runtimes=False, npu="RBLN-CR03", uses_encoder=True)
    model = RBLNAutoencoderKL.from_model(vae, rbln_config=config)
    with pytest.raises(RuntimeError, match="create_runtimes=False"):
        model.decode(latent)
    model.save_pretrained(tmp_path / "saved")
    again = RBLNAutoencoderKL.from_pretrained(tmp_path / "saved", rbln_create_runtimes=True)
    assert torch.equal(again.decode(latent).sample, compiled.decode(latent).sample)


@pytest.mark.parametrize(
    "options",
    [
        {"device": 1},
        {"device_map": {"encoder": 0, "decoder": 1}},
        {"activate_profiler": True, "timeout": 30},
        {"npu": "RBLN-CA22"},
        {"num_devices": 2},
        {"tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_options_of_the_run(vae, compiled, latent, options):
    model = RBLNAutoencoderKL.from_model(vae, rbln_config={"uses_encoder": True, **options})
    assert torch.equal(model.decode(latent).sample, compiled.decode(latent).sample)


@pytest.mark.parametrize("options", [{"device": 7}, {"num_devices": 3}, {"npu": "RBLN-CR03"}])
def test_a_device_that_is_not_there_is_refused(vae, options):
    with pytest.raises(ValueError):
        RBLNAutoencoderKL.from_model(vae, rbln_config=options)


def test_a_device_that_is_not_there_is_refused_when_loading(compiled, tmp_path):
    compiled.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match=r"Failed to create RBLN runtime: There is no NPU 7"):
        RBLNAutoencoderKL.from_pretrained(tmp_path / "saved", rbln_device=7)


def test_a_model_that_cannot_be_compiled_raises_a_runtime_error():
    vae = tiny_vaes.make()
    vae.decoder.conv_act = torch.nn.Softplus()
    with pytest.raises(RuntimeError, match="softplus"):
        RBLNAutoencoderKL.from_model(vae)


def test_a_damaged_file_is_refused(compiled, tmp_path):
    compiled.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "decoder.rbln"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RuntimeError, match="damaged"):
        RBLNAutoencoderKL.from_pretrained(tmp_path / "saved")


def test_it_runs_in_a_pipeline(vae, compiled):
    images = []
    for component in (vae, compiled):
        pipe = StableDiffusionPipeline(
            **tiny.stable_diffusion(), vae=component, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(
            pipe("a cat", num_inference_steps=1, output_type="pt", generator=generator).images
        )
    assert_close(images[1], images[0])


SCRIPT = """
import sys
from optimum.rbln import RBLNAutoencoderKL
model = RBLNAutoencoderKL.from_pretrained(sys.argv[1])
print(type(model).__name__, tuple(model.rbln_config.image_size))
"""


@pytest.mark.parametrize("module", [False, True])
def test_a_script_that_knows_nothing_of_it(compiled, tmp_path, module):
    compiled.save_pretrained(tmp_path / "saved")
    script = Path(tmp_path / "script.py")
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "rbln_vae.rebel"]
    command = [*start, "-m", "script"] if module else [*start, str(script)]
    result = subprocess.run(
        [*command, "saved"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "RBLNAutoencoderKL (64, 64)" in result.stdout
