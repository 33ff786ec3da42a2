"""The vector-quantised autoencoders of Kandinsky and aMUSEd, compiled: diffusers' results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from vaes import make_vae, make_vq, noise

from rbln_vae import (
    RBLNArtifactError,
    RBLNAutoConfig,
    RBLNAutoencoder,
    RBLNCancelledError,
    RBLNRuntimeError,
    RBLNVQModel,
    RBLNVQModelConfig,
)
from rbln_vae.metrics import relative_l2

EQUAL = 1e-5
"""The largest relative L2 error against diffusers in float32 that counts as equal."""

MOVQ = make_vq()
AMUSED: dict[str, Any] = {
    "norm_type": "group",
    "norm_num_groups": 8,
    "block_out_channels": (8, 16),
    "latent_channels": 6,
    "vq_embed_dim": 5,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}
LOOKUP = make_vq(**AMUSED)


def compiled(vae: VQModel = MOVQ, **options: object) -> RBLNVQModel:
    settings = {"target": "cpu", "dtype": "float32", **options}
    return RBLNVQModel.from_model(vae, rbln_config=settings)


@functools.cache
def ours() -> RBLNVQModel:
    return compiled()


@functools.cache
def lookup() -> RBLNVQModel:
    return compiled(LOOKUP)


def latents(vae: VQModel | RBLNVQModel, image: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = vae.encode(image).latents
    return found


def pixels(vae: VQModel | RBLNVQModel, latent: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = vae.decode(latent, **{"force_not_quantize": True, **options}).sample
    return found


# Results


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 3), height=st.integers(2, 12), width=st.integers(1, 12))
def test_results_are_those_of_diffusers(batch: int, height: int, width: int) -> None:
    latent = noise(batch, 4, height, width)
    assert relative_l2(pixels(ours(), latent), pixels(MOVQ, latent)) < EQUAL
    image = noise(batch, 3, 2 * height, 2 * width)
    assert relative_l2(latents(ours(), image), latents(MOVQ, image)) < EQUAL


KANDINSKY = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
    "layers_per_block": 2,
    "vq_embed_dim": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        KANDINSKY,
        {"norm_type": "group", "norm_num_groups": 8, "vq_embed_dim": 3},
        {"mid_block_add_attention": False},
        {"act_fn": "gelu"},
        {
            "block_out_channels": (32,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ],
    ids=["as Kandinsky's", "group norm, fewer channels", "no attention", "gelu", "one block"],
)
def test_every_option_of_the_network_is_compiled(options: dict[str, Any]) -> None:
    vae = make_vq(**options)
    found = compiled(vae)
    factor = found.resolved_config.vae_scale_factor
    channels = vae.config.vq_embed_dim or vae.config.latent_channels
    latent, image = noise(1, channels, 6, 5), noise(1, 3, 6 * factor, 4 * factor)
    assert relative_l2(pixels(found, latent), pixels(vae, latent)) < EQUAL
    assert relative_l2(latents(found, image), latents(vae, image)) < EQUAL


def test_the_latent_counts_in_every_norm() -> None:
    """Else a norm that forgot it would look right."""
    latent = noise(1, 4, 6, 5)
    for name, weight in MOVQ.state_dict().items():
        if name.endswith(("conv_y.weight", "conv_b.weight")):
            kept = weight.clone()
            weight.zero_()
            changed = pixels(MOVQ, latent)
            weight.copy_(kept)
            assert relative_l2(changed, pixels(MOVQ, latent)) > 100 * EQUAL, name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_target_and_dtype(target: str, dtype: str) -> None:
    found = compiled(target=target, dtype=dtype)
    # The error of one image of so small a model varies by a tenth.
    latent, image = noise(24, 4, 16, 16), noise(24, 3, 32, 32)
    half = make_vq().to(torch.bfloat16)
    for run, input_ in ((pixels, latent), (latents, image)):
        expected = run(MOVQ, input_)
        own = relative_l2(run(half, input_.bfloat16()).float(), expected)
        assert relative_l2(run(found, input_), expected) <= (EQUAL if dtype == "float32" else own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert latents(ours(), noise(1, 3, 8, 8).to(dtype)).dtype == dtype
    latent = noise(1, 4, 4, 4).to(dtype)
    for force in (True, False):
        decoded = ours().decode(latent, force)
        assert decoded.sample.dtype == decoded.commit_loss.dtype == dtype


def test_diffusers_arguments_and_results() -> None:
    image, latent = noise(2, 3, 8, 8), noise(2, 4, 4, 4)
    assert isinstance(ours().encode(image), VQEncoderOutput)
    assert torch.equal(ours().encode(image)["latents"], ours().encode(image, False)[0])
    output = ours().decode(latent, True)
    assert isinstance(output, DecoderOutput)
    assert torch.equal(output["sample"], output.sample)
    assert torch.equal(output.commit_loss, torch.zeros(2))
    sample, loss = ours().decode(latent, True, False)
    assert torch.equal(sample, output.sample) and torch.equal(loss, torch.zeros(2))


def test_images_are_written_where_the_caller_says() -> None:
    latent, out = noise(2, 4, 4, 4), torch.empty(2, 3, 8, 8)
    assert ours().decode(latent, True, out=out).sample.data_ptr() == out.data_ptr()
    assert torch.equal(out, pixels(ours(), latent))


def test_a_run_can_be_stopped() -> None:
    with pytest.raises(RBLNCancelledError):
        ours().encode(noise(1, 3, 8, 8), should_stop=lambda: True)
    with pytest.raises(RBLNCancelledError):
        ours().decode(noise(1, 4, 4, 4), should_stop=lambda: True)


# The codebook


@pytest.mark.parametrize(("vae", "found", "channels"), [(MOVQ, ours, 4), (LOOKUP, lookup, 5)])
def test_latents_are_quantised_unless_told(
    vae: VQModel, found: Callable[[], RBLNVQModel], channels: int
) -> None:
    latent = noise(2, channels, 6, 5, seed=3)
    with torch.no_grad():
        sample, loss = vae.decode(latent, return_dict=False)
    given_sample, given_loss = found().decode(latent, return_dict=False)
    assert relative_l2(given_sample, sample) < EQUAL
    torch.testing.assert_close(given_loss, loss)
    assert relative_l2(pixels(MOVQ, noise(2, 4, 6, 5)), sample) > 0.1


def test_forward_quantises_between() -> None:
    image = noise(2, 3, 8, 12)
    with torch.no_grad():
        sample, loss = MOVQ(image, return_dict=False)
    given_sample, given_loss = ours()(image, return_dict=False)
    assert relative_l2(given_sample, sample) < EQUAL
    torch.testing.assert_close(given_loss, loss)
    assert torch.equal(ours()(image).sample, given_sample)


@pytest.mark.parametrize("flat", [False, True])
def test_indices_are_looked_up(flat: bool) -> None:
    indices = torch.randint(0, 16, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    given = indices.flatten() if flat else indices
    options = {"shape": (2, 6, 5, 5)}
    found = lookup().decode(given, force_not_quantize=True, **options)
    with torch.no_grad():
        expected = LOOKUP.decode(given, force_not_quantize=True, **options)
    assert relative_l2(found.sample, expected.sample) < EQUAL
    assert torch.equal(found.commit_loss, expected.commit_loss)
    assert found.commit_loss.dtype == expected.commit_loss.dtype


def test_indices_give_images_in_the_dtype_of_the_model() -> None:
    found = compiled(LOOKUP, dtype="bfloat16")
    indices = torch.zeros(1, 3, 3, dtype=torch.int64)
    assert pixels(found, indices, shape=(1, 3, 3, 5)).dtype == found.dtype == torch.float32


@pytest.mark.parametrize(
    ("indices", "shape", "error", "message"),
    [
        (torch.zeros(1, 2, 2), (1, 2, 2, 5), TypeError, "int64 or int32, and is torch.float32"),
        ([[0]], (1, 1, 1, 5), TypeError, "int64 or int32, and is list"),
        (torch.zeros(1, 2, 2, dtype=torch.long), None, ValueError, r"must be \(N, h, w, 5\)"),
        (torch.zeros(1, 2, 2, dtype=torch.long), (1, 2, 2, 6), ValueError, r"\(N, h, w, 5\)"),
        (torch.zeros(1, 2, 2, dtype=torch.long), (1, 2, 3, 5), ValueError, "h has 4 .* needs 6"),
        (torch.full((1, 2, 2), 16), (1, 2, 2, 5), ValueError, "0 to 15, and holds 16 to 16"),
        (torch.full((1, 2, 2), -1), (1, 2, 2, 5), ValueError, "0 to 15, and holds -1 to -1"),
        (torch.zeros(0, 2, 2, dtype=torch.long), (0, 2, 2, 5), ValueError, "no empty axis"),
    ],
)
def test_indices_that_stand_for_no_latents_are_refused(
    indices: Any, shape: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lookup().decode(indices, force_not_quantize=True, shape=shape)


def test_the_codebook_is_a_copy() -> None:
    vae, latent = make_vq(), noise(1, 4, 4, 4)
    found = compiled(vae)
    vae.quantize.embedding.weight.zero_()
    assert torch.equal(found.decode(latent).sample, ours().decode(latent).sample)


def test_making_the_codebook_draws_nothing_from_the_global_generator() -> None:
    found = compiled()
    state = torch.random.get_rng_state()
    found.decode(noise(1, 4, 4, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_quantiser_gives_indices_as_pipelines_read_them() -> None:
    latent = noise(2, 4, 6, 5)
    with torch.no_grad():
        assert torch.equal(ours().quantize(latent)[2][2], MOVQ.quantize(latent)[2][2])


# What pipelines read


def test_pipelines_find_the_configuration() -> None:
    assert list(ours().config.block_out_channels) == [32, 64]
    assert ours().config.latent_channels == ours().config["latent_channels"] == 4
    assert not hasattr(ours().config, "shift_factor")
    assert ours().dtype == torch.float32


def test_latents_are_not_scaled() -> None:
    latent = noise(1, 4, 4, 4)
    assert ours().config.scaling_factor == 0.18215
    assert torch.equal(ours().latent_scaling.scale(latent), latent)


def test_what_every_class_does_the_same_way() -> None:
    image, latent = noise(1, 3, 8, 8), noise(1, 4, 4, 4)
    assert torch.equal(ours().encode_images(image), latents(ours(), image))
    assert torch.equal(ours().decode_latents(latent), pixels(ours(), latent))


# Options


def test_the_options_are_those_of_optimum_rbln() -> None:
    config = RBLNVQModelConfig(2, (64, 32), False, 8, 3, 4)
    assert (config.batch_size, config.sample_size, config.uses_encoder) == (2, (64, 32), False)
    assert (config.vqmodel_scale_factor, config.in_channels, config.latent_channels) == (8, 3, 4)
    assert config.image_size == (64, 32)  # type: ignore[misc]
    assert config.latent_sample_size == (8, 4)  # type: ignore[misc]
    with pytest.raises(ValueError, match="multiples of 8"):
        RBLNVQModelConfig(sample_size=100, vqmodel_scale_factor=8)
    with pytest.raises(ValueError, match="needs sample_size and vqmodel_scale_factor"):
        _ = RBLNVQModelConfig(sample_size=64).latent_sample_size  # type: ignore[misc]


def test_a_compiled_model_has_every_option_filled_in() -> None:
    config = lookup().rbln_config
    assert (config.vqmodel_scale_factor, config.in_channels, config.latent_channels) == (2, 3, 5)
    assert config.sample_size == (512, 512) and config.uses_encoder is True


def test_a_size_that_is_not_diffusers_default_is_taken_from_the_model() -> None:
    assert compiled(make_vq(sample_size=64)).rbln_config.sample_size == (64, 64)


def test_options_in_conflict_with_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="vqmodel_scale_factor=4 is in conflict"):
        compiled(vqmodel_scale_factor=4)
    with pytest.raises(ValueError, match="latent_channels=6 is in conflict"):
        compiled(LOOKUP, latent_channels=6)


def test_a_model_without_an_encoder_says_so() -> None:
    found = compiled(uses_encoder=False)
    latent = noise(1, 4, 4, 4)
    assert torch.equal(pixels(found, latent), pixels(ours(), latent))
    with pytest.raises(RBLNRuntimeError, match="decoder only"):
        found.encode(noise(1, 3, 8, 8))


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        ours().encode(noise(1, 4, 8, 8))
    with pytest.raises(ValueError, match="2 or more"):
        ours().encode(noise(1, 3, 1, 8))
    for force in (True, False):
        with pytest.raises(ValueError, match=r"h must have the shape \(N, 4, H, W\)"):
            ours().decode(noise(1, 3, 4, 4), force)
        with pytest.raises(TypeError, match="floating"):
            ours().decode(torch.zeros(1, 4, 4, 4, dtype=torch.int64), force)


# Keeping one


def test_a_saved_model_is_the_same_when_loaded(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    loaded = RBLNVQModel.from_pretrained(tmp_path)
    latent, image = noise(1, 4, 5, 7), noise(1, 3, 10, 8)
    assert torch.equal(pixels(loaded, latent), pixels(ours(), latent))
    assert torch.equal(latents(loaded, image), latents(ours(), image))
    assert torch.equal(loaded.decode(latent).sample, ours().decode(latent).sample)
    assert loaded.resolved_config == ours().resolved_config
    assert isinstance(RBLNAutoConfig.load(tmp_path), RBLNVQModelConfig)
    assert isinstance(RBLNAutoencoder.from_pretrained(tmp_path), RBLNVQModel)


def test_a_codebook_of_another_size_is_refused(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    file = tmp_path / "buffers.safetensors"
    (name, codebook), *_ = load_file(file).items()
    save_file({name: codebook[:15].clone()}, file)
    with pytest.raises(RBLNArtifactError, match="doesn't hold the buffers"):
        RBLNVQModel.from_pretrained(tmp_path)


def test_a_diffusers_directory_is_compiled(tmp_path: Path) -> None:
    MOVQ.save_pretrained(tmp_path)
    found = RBLNAutoencoder.from_pretrained(
        tmp_path, export=True, rbln_target="cpu", rbln_dtype="float32"
    )
    assert isinstance(found, RBLNVQModel)
    latent = noise(1, 4, 5, 7)
    assert torch.equal(pixels(found, latent), pixels(ours(), latent))


def test_each_class_compiles_its_own_model() -> None:
    with pytest.raises(TypeError, match="compiles VQModel, and got AutoencoderKL"):
        RBLNVQModel.from_model(make_vae())
    assert isinstance(RBLNAutoencoder.from_model(MOVQ, rbln_target="cpu"), RBLNVQModel)
