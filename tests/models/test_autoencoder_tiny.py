"""TAESD and its like: latents without a distribution, any size, and rounding to bytes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_vaes
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from vaes import TOLERANCE, noise

from rbln_vae import RBLNAutoencoderTiny, RBLNCompileError
from rbln_vae.metrics import relative_l2

OPTIONS = {"target": "cpu", "dtype": "float32"}


def compile_tiny(vae: Any) -> RBLNAutoencoderTiny:
    return RBLNAutoencoderTiny.from_model(vae, rbln_config=OPTIONS)


ORIGINAL = tiny_vaes.make("AutoencoderTiny")


@functools.cache
def ours() -> RBLNAutoencoderTiny:
    return compile_tiny(ORIGINAL)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_images_of_any_size_are_encoded_as_diffusers_does(height: int, width: int) -> None:
    x = noise(1, 3, height, width)
    found, expected = ours().encode(x), ORIGINAL.encode(x)
    assert isinstance(found, AutoencoderTinyOutput)
    assert relative_l2(found.latents, expected.latents) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"latent_channels": 16},
        {"act_fn": "silu"},
        {"encoder_block_out_channels": (40,) * 4, "decoder_block_out_channels": (40,) * 4},
        {"num_encoder_blocks": (2, 1, 3, 1), "num_decoder_blocks": (1, 2, 1, 3)},
        {"in_channels": 4, "out_channels": 4},
    ],
    ids=str,
)
def test_every_option_of_the_network_is_compiled(options: dict[str, Any]) -> None:
    vae = tiny_vaes.make("AutoencoderTiny", **options)
    found = compile_tiny(vae)
    x = noise(1, vae.config.in_channels, 24, 32)
    z = noise(1, vae.config.latent_channels, 3, 5)
    assert relative_l2(found.encode(x).latents, vae.encode(x).latents) < TOLERANCE
    assert relative_l2(found.decode(z).sample, vae.decode(z).sample) < TOLERANCE


def test_sums_and_their_activations_need_no_operation_of_their_own() -> None:
    found = RBLNAutoencoderTiny.from_model(ORIGINAL, rbln_target="reference")
    graph: Any = found.compiled_models["decoder"]
    kinds = [operation.kind for operation in graph.graph.operations]
    # tanh limits the latent, with a factor before it and one after.
    assert kinds[:3] == ["Scale", "Activation", "Scale"]
    assert set(kinds[3:]) == {"Conv2d"}


def test_an_image_goes_through_bytes_as_in_diffusers() -> None:
    x = noise(1, 3, 32, 32)
    with torch.no_grad():
        expected = ORIGINAL(x).sample
    assert relative_l2(ours()(x).sample, expected) < TOLERANCE


def test_latents_are_shown_as_numbers_between_0_and_1() -> None:
    z = 4 * noise(1, 4, 5, 5)
    assert torch.equal(ours().scale_latents(z), ORIGINAL.scale_latents(z))
    assert torch.equal(ours().unscale_latents(z), ORIGINAL.unscale_latents(z))


def test_the_arguments_of_decode_have_the_order_of_diffusers() -> None:
    z = noise(1, 4, 2, 2)
    generator = torch.Generator()
    (found,) = ours().decode(z, generator, False)
    assert torch.equal(found, ours().decode(z).sample)


def test_pipelines_find_what_they_read() -> None:
    assert ours().config.block_out_channels == ORIGINAL.config.block_out_channels
    assert (ours().config.scaling_factor, ours().config.shift_factor) == (1.0, 0.0)


def test_enlarging_that_isnt_doubling_is_refused_by_name() -> None:
    vae = tiny_vaes.make("AutoencoderTiny", upsample_fn="bilinear")
    with pytest.raises(RBLNCompileError, match="bilinear"):
        compile_tiny(vae)
