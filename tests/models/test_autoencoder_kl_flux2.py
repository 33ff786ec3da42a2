"""FLUX.2's autoencoder, compiled: diffusers' results, and what pipelines read of it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vaes import TOLERANCE, make_flux2, make_vae, moments, noise, pixels

from rbln_vae import (
    RBLNArtifactError,
    RBLNAutoConfig,
    RBLNAutoencoderKL,
    RBLNAutoencoderKLFlux2,
    RBLNAutoencoderKLFlux2Config,
    RBLNCompileError,
)
from rbln_vae.metrics import relative_l2

FLUX2 = make_flux2()


def compiled(vae: AutoencoderKLFlux2 = FLUX2, **options: object) -> RBLNAutoencoderKLFlux2:
    settings = {"target": "cpu", "dtype": "float32", **options}
    return RBLNAutoencoderKLFlux2.from_model(vae, rbln_config=settings)


@functools.cache
def ours() -> RBLNAutoencoderKLFlux2:
    return compiled()


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12))
def test_results_are_those_of_diffusers(batch: int, height: int, width: int) -> None:
    latent = noise(batch, 4, height, width)
    assert relative_l2(pixels(ours(), latent), pixels(FLUX2, latent)) < TOLERANCE
    image = noise(batch, 3, 2 * height, 2 * width)
    assert relative_l2(moments(ours(), image), moments(FLUX2, image)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"decoder_block_out_channels": (8, 8)},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
    ids=str,
)
def test_every_option_of_the_network_is_compiled(options: dict[str, object]) -> None:
    vae = make_flux2(**options)
    latent, image = noise(1, 4, 6, 5), noise(1, 3, 12, 10)
    assert relative_l2(pixels(compiled(vae), latent), pixels(vae, latent)) < TOLERANCE
    assert relative_l2(moments(compiled(vae), image), moments(vae, image)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_target_and_dtype(target: str, dtype: str) -> None:
    latent = noise(1, 4, 8, 8)
    error = relative_l2(pixels(compiled(target=target, dtype=dtype), latent), pixels(FLUX2, latent))
    own = relative_l2(pixels(make_flux2().to(torch.bfloat16), latent.bfloat16()).float(),
                      pixels(FLUX2, latent))  # fmt: skip
    assert error < (TOLERANCE if dtype == "float32" else own)


def test_pipelines_find_the_statistics_of_latents() -> None:
    assert torch.equal(ours().bn.running_mean, FLUX2.bn.running_mean)
    assert torch.equal(ours().bn.running_var, FLUX2.bn.running_var)
    assert ours().bn.running_mean.dtype == torch.float32
    assert ours().config.batch_norm_eps == FLUX2.config.batch_norm_eps


def test_the_statistics_are_a_copy() -> None:
    vae = make_flux2()
    mean = vae.bn.running_mean.clone()
    found = compiled(vae)
    vae.bn.running_mean.zero_()
    assert torch.equal(found.bn.running_mean, mean)


def test_latents_are_scaled_as_the_pipeline_does() -> None:
    z = noise(2, 4, 6, 8)
    patched = Flux2Pipeline._patchify_latents(z)
    mean = FLUX2.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(FLUX2.bn.running_var.view(1, -1, 1, 1) + FLUX2.config.batch_norm_eps)
    scaled = ours().latent_scaling.scale(z)
    torch.testing.assert_close(scaled, (patched - mean) / std)
    torch.testing.assert_close(ours().latent_scaling.unscale(scaled), z)


def test_a_saved_model_is_the_same_when_loaded(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    loaded = RBLNAutoencoderKLFlux2.from_pretrained(tmp_path)
    latent = noise(1, 4, 5, 7)
    assert torch.equal(pixels(loaded, latent), pixels(ours(), latent))
    assert torch.equal(loaded.bn.running_mean, ours().bn.running_mean)
    assert torch.equal(loaded.bn.running_var, ours().bn.running_var)
    assert loaded.resolved_config == ours().resolved_config
    assert isinstance(RBLNAutoConfig.load(tmp_path), RBLNAutoencoderKLFlux2Config)


def test_a_diffusers_directory_is_compiled(tmp_path: Path) -> None:
    FLUX2.save_pretrained(tmp_path)
    found = RBLNAutoencoderKLFlux2.from_pretrained(
        tmp_path, export=True, rbln_target="cpu", rbln_dtype="float32"
    )
    latent = noise(1, 4, 5, 7)
    assert torch.equal(pixels(found, latent), pixels(ours(), latent))


@pytest.mark.parametrize("damage", ["missing", "no safetensors", "other shapes", "not finite"])
def test_damaged_statistics_are_refused(tmp_path: Path, damage: str) -> None:
    ours().save_pretrained(tmp_path)
    file = tmp_path / "buffers.safetensors"
    buffers = load_file(file)
    if damage == "missing":
        file.unlink()
    elif damage == "no safetensors":
        file.write_bytes(b"x" * 100)
    elif damage == "other shapes":
        save_file({name: buffer[:-1].clone() for name, buffer in buffers.items()}, file)
    else:
        save_file({name: buffer * torch.nan for name, buffer in buffers.items()}, file)
    with pytest.raises(RBLNArtifactError, match=r"buffers\.safetensors.*Save the model again"):
        RBLNAutoencoderKLFlux2.from_pretrained(tmp_path)


def test_a_model_without_statistics_takes_away_those_of_another(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    RBLNAutoencoderKL.from_model(make_vae(), rbln_target="cpu").save_pretrained(tmp_path)
    assert not (tmp_path / "buffers.safetensors").exists()


def test_a_class_that_gets_a_model_of_another_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"compiles AutoencoderKL, and got .*Flux2.*RBLNAutoenc"):
        RBLNAutoencoderKL.from_model(FLUX2)
    with pytest.raises(TypeError, match="compiles AutoencoderKLFlux2, and got"):
        RBLNAutoencoderKLFlux2.from_model(make_vae())
    FLUX2.save_pretrained(tmp_path / "original")
    with pytest.raises(RBLNCompileError, match=r"holds AutoencoderKLFlux2.*RBLNAutoencoder "):
        RBLNAutoencoderKL.from_pretrained(tmp_path / "original", export=True)
    ours().save_pretrained(tmp_path / "compiled")
    with pytest.raises(RBLNArtifactError):
        RBLNAutoencoderKL.from_pretrained(tmp_path / "compiled")


@pytest.mark.parametrize("patch", [(2, 1), 2, (2, 2, 2)], ids=str)
def test_patches_that_are_no_squares_are_refused(patch: object) -> None:
    vae = make_flux2()
    vae.register_to_config(patch_size=patch)
    with pytest.raises(ValueError, match="patch_size"):
        compiled(vae)


def test_a_latent_of_the_denoiser_is_refused_with_the_channels_that_are_wanted() -> None:
    with pytest.raises(ValueError, match=r"\(N, 4, H, W\)"):
        ours().decode(noise(1, 16, 4, 4))


def test_the_scaling_of_a_model_without_statistics_has_no_patches() -> None:
    assert dataclasses.asdict(RBLNAutoencoderKL.from_model(
        make_vae(), rbln_target="cpu"
    ).latent_scaling)["patch_size"] == 1  # fmt: skip
