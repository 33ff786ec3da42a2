"""HunyuanImage's autoencoder: shortcuts within convolutions, and its own arguments."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_vaes
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import (
    HunyuanImageDownsample,
    HunyuanImageUpsample,
)
from vaes import TOLERANCE, noise

from rbln_vae import RBLNAutoencoderKLHunyuanImage
from rbln_vae.metrics import relative_l2
from rbln_vae.models import autoencoder_kl_hunyuan_image as module

ORIGINAL = tiny_vaes.make("AutoencoderKLHunyuanImage")


@functools.cache
def ours() -> RBLNAutoencoderKLHunyuanImage:
    return RBLNAutoencoderKLHunyuanImage.from_model(
        ORIGINAL, rbln_target="cpu", rbln_dtype="float32"
    )


@pytest.mark.parametrize("channels", [(8, 8), (8, 16), (16, 16), (4, 16)])
def test_halving_with_its_shortcut_is_a_convolution_and_a_shuffle(
    channels: tuple[int, int],
) -> None:
    layer = HunyuanImageDownsample(*channels).eval()
    x = noise(2, channels[0], 6, 8)
    torch.testing.assert_close(module._halving(layer)(x), layer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("channels", [(8, 8), (16, 8), (16, 16), (16, 4)])
def test_doubling_with_its_shortcut_is_a_convolution_and_a_shuffle(
    channels: tuple[int, int],
) -> None:
    layer = HunyuanImageUpsample(*channels).eval()
    x = noise(2, channels[0], 3, 4)
    torch.testing.assert_close(module._doubling(layer)(x), layer(x), atol=1e-6, rtol=1e-5)


def test_no_shortcut_and_no_doubling_is_left_in_the_decoder() -> None:
    found = RBLNAutoencoderKLHunyuanImage.from_model(ORIGINAL, rbln_target="reference")
    graph: Any = found.compiled_models["decoder"]
    assert {operation.kind for operation in graph.graph.operations} == {"Conv2d", "Attention"}


def test_wider_levels_are_compiled() -> None:
    vae = tiny_vaes.make(
        "AutoencoderKLHunyuanImage", block_out_channels=(32, 64, 128), layers_per_block=2
    )
    found = RBLNAutoencoderKLHunyuanImage.from_model(vae, rbln_target="cpu", rbln_dtype="float32")
    z = noise(1, 16, 3, 4)
    assert relative_l2(found.decode(z).sample, vae.decode(z).sample) < TOLERANCE


def test_pipelines_find_what_they_read() -> None:
    assert ours().config.spatial_compression_ratio == 4
    assert ours().config.scaling_factor == 0.75
    assert ours().resolved_config.vae_scale_factor == 4


def test_tiles_have_the_arguments_of_diffusers_and_change_nothing() -> None:
    z = noise(1, 16, 8, 8)
    expected = ours().decode(z).sample
    ours().enable_tiling(tile_sample_min_size=16, tile_overlap_factor=0.5)
    try:
        assert torch.equal(ours().decode(z).sample, expected)
    finally:
        ours().disable_tiling()


@pytest.mark.parametrize("name", ["downsample_match_channel", "upsample_match_channel"])
def test_a_model_that_diffusers_cant_run_is_refused_by_name(name: str) -> None:
    vae = tiny_vaes.make("AutoencoderKLHunyuanImage")
    vae.register_to_config(**{name: False})
    with pytest.raises(ValueError, match=f"{name}=False"):
        RBLNAutoencoderKLHunyuanImage.from_model(vae)
