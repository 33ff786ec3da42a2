"""Wan's and Qwen-Image's autoencoders for one frame: the arithmetic, sizes, and members.

Videos have `test_video.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_vaes
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, DupUp3D, WanRMS_norm
from torch import Tensor
from vaes import TOLERANCE, noise

from rbln_vae import (
    RBLNAutoencoder,
    RBLNAutoencoderKLQwenImage,
    RBLNAutoencoderKLQwenImage21,
    RBLNAutoencoderKLWan,
    RBLNAutoencoderKLWanConfig,
    RBLNCompileError,
)
from rbln_vae.metrics import relative_l2
from rbln_vae.models import autoencoder_kl_wan as module

OPTIONS = {"target": "cpu", "dtype": "float32"}


def compile_wan(vae: Any, **options: Any) -> RBLNAutoencoderKLWan:
    found = RBLNAutoencoder.from_model(vae, rbln_config={**OPTIONS, **options})
    assert isinstance(found, RBLNAutoencoderKLWan)
    return found


def assert_same(found: Any, vae: Any, height: int, width: int, side: int = 3) -> None:
    x = noise(*tiny_vaes.image_shape(vae, 1, height, width))
    z = noise(1, vae.config.z_dim, 1, side, side, seed=1)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.parameters
        assert relative_l2(found.encode(x).latent_dist.parameters, expected) < TOLERANCE
        assert relative_l2(found.decode(z).sample, vae.decode(z).sample) < TOLERANCE


# Layers


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-12, 0.0])
def test_the_norm_of_pixels_is_that_of_wan_down_to_zero(scale: float) -> None:
    layer = WanRMS_norm(6, images=False)
    layer.gamma.data.uniform_(0.5, 2)
    x = noise(2, 6, 3, 4) * scale
    x[0, :, 0, 0] = 0
    expected = layer(x.unsqueeze(2)).squeeze(2)
    assert expected.isfinite().all()
    # Norms near diffusers' least of 1e-12 differ: they mean nothing.
    limit = 1e-6 if scale != 1e-12 else 0.5
    assert (module._RMSNorm(layer)(x) - expected).abs().max() <= limit * 2 * 6**0.5


def test_a_norm_with_a_bias_is_refused() -> None:
    with pytest.raises(RBLNCompileError, match="has a bias"):
        module._RMSNorm(WanRMS_norm(6, images=False, bias=True))


@pytest.mark.parametrize(
    ("channels", "frames", "side"),
    [
        ((8, 8), 1, 1),
        ((4, 8), 1, 2),
        ((8, 8), 1, 2),
        ((4, 8), 2, 2),
        ((8, 8), 2, 2),
        ((8, 16), 2, 2),
    ],
)
def test_the_averaging_shortcut_is_one_convolution(
    channels: tuple[int, int], frames: int, side: int
) -> None:
    layer = AvgDown3D(*channels, frames, side)
    x = noise(2, channels[0], 6, 4)
    torch.testing.assert_close(module._average(layer)(x), layer(x.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("channels", [(8, 4), (8, 8), (16, 8)])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_repeating_shortcut_is_one_shuffle(channels: tuple[int, int], frames: int) -> None:
    layer = DupUp3D(*channels, frames, 2)
    x = noise(2, channels[0], 3, 4)
    expected = layer(x.unsqueeze(2), first_chunk=True).squeeze(2)
    assert torch.equal(module._Repeat(layer)(x), expected)


# Networks


@pytest.mark.parametrize(
    "options",
    [
        {"base_dim": 40},
        {"dim_mult": [1, 2], "temperal_downsample": [True]},
        {"dim_mult": [1, 2, 2], "temperal_downsample": [False, False], "num_res_blocks": 2},
        {"z_dim": 5, "latents_mean": [0.0] * 5, "latents_std": [1.0] * 5},
        {"decoder_base_dim": 8},
    ],
    ids=str,
)
def test_every_option_of_the_network_is_compiled(options: dict[str, Any]) -> None:
    vae = tiny_vaes.make("AutoencoderKLWan", **options)
    assert_same(compile_wan(vae), vae, 32, 48)


def test_layered_images_have_four_channels() -> None:
    vae = tiny_vaes.make("AutoencoderKLQwenImage", input_channels=4)
    found = compile_wan(vae)
    assert (found.resolved_config.in_channels, found.resolved_config.out_channels) == (4, 4)
    x = noise(1, 4, 1, 16, 16)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mode()
    assert relative_l2(found.encode(x).latent_dist.mode(), expected) < TOLERANCE


def test_pixels_are_limited_as_those_of_diffusers() -> None:
    vae = tiny_vaes.make("AutoencoderKLWan")
    for weight in vae.decoder.conv_out.parameters():
        weight.mul_(5)
    for dtype in ("float32", "bfloat16"):
        z = noise(1, 16, 1, 4, 4)
        found = compile_wan(vae, dtype=dtype).decode(z).sample
        assert found.abs().max() == 1
        assert relative_l2(found, vae.decode(z).sample) < 0.05


# Sizes


WAN_ORIGINAL = tiny_vaes.make("AutoencoderKLWan")


@functools.cache
def ours() -> RBLNAutoencoderKLWan:
    return compile_wan(WAN_ORIGINAL)


WAN_2_2_ORIGINAL = tiny_vaes.make("AutoencoderKLWan", **tiny_vaes.WAN_2_2)
WAN_2_2 = compile_wan(WAN_2_2_ORIGINAL)


def test_sizes_that_diffusers_cant_encode_are_refused() -> None:
    with pytest.raises(ValueError, match="8 or more"):
        ours().encode(noise(1, 3, 1, 7, 16))
    with pytest.raises(ValueError, match="multiples of 16"):
        WAN_2_2.encode(noise(1, 3, 1, 24, 32))


def frames_of(vae: RBLNAutoencoderKLWan, frames: int) -> tuple[Tensor, Tensor]:
    return noise(1, 3, frames, 32, 32), noise(1, vae.z_dim, frames, 2, 2)


def test_several_frames_are_refused_by_models_for_images() -> None:
    vae = compile_wan(WAN_ORIGINAL, num_frames=1)
    assert_same(vae, WAN_ORIGINAL, 16, 24)
    x, z = frames_of(vae, 5)
    with pytest.raises(ValueError, match="x has 5 frames"):
        vae.encode(x)
    with pytest.raises(ValueError, match="z has 5 frames"):
        vae.decode(z)
    with pytest.raises(ValueError, match="z has 2 frames"):
        vae.decode_frames(z)
    with pytest.raises(ValueError, match="num_frames=5: AutoencoderKLQwenImage21 runs images"):
        compile_wan(tiny_vaes.make("AutoencoderKLQwenImage21"), num_frames=5)


# Members and options


def test_pipelines_find_what_they_read() -> None:
    assert ours().temperal_downsample == WAN_ORIGINAL.temperal_downsample
    assert ours().config.scale_factor_spatial == 8 and ours().config.scale_factor_temporal == 4
    assert ours().config.latents_mean == WAN_ORIGINAL.config.latents_mean
    assert ours().spatial_compression_ratio == 8 and WAN_2_2.spatial_compression_ratio == 16
    assert ours().z_dim == 16
    assert not hasattr(ours(), "_reset_stateful_cache")
    assert not hasattr(ours(), "bn")


def test_options_have_the_names_of_optimum_rbln() -> None:
    config = WAN_2_2.rbln_config
    assert isinstance(config, RBLNAutoencoderKLWanConfig)
    assert (config.height, config.width) == config.image_size == (704, 1280)
    assert config.vae_scale_factor_spatial == 16
    assert config.vae_scale_factor_temporal == 4
    assert config.num_channels_latents == 16
    assert config.num_frames is None
    found = compile_wan(WAN_ORIGINAL, height=64, width=96)
    assert found.resolved_config.sample_size == (64, 96)
    assert compile_wan(WAN_ORIGINAL, sample_size=64).resolved_config.sample_size == (64, 64)
    one_side = compile_wan(WAN_ORIGINAL, height=64, create_runtimes=False)
    assert one_side.resolved_config.sample_size == one_side.rbln_config.image_size == (64, 832)
    with pytest.raises(ValueError, match="differ"):
        compile_wan(WAN_ORIGINAL, sample_size=64, height=32)
    with pytest.raises(ValueError, match="vae_scale_factor_spatial=16 is in conflict"):
        compile_wan(WAN_ORIGINAL, vae_scale_factor_spatial=16)


@pytest.mark.parametrize(
    ("name", "cls", "size"),
    [
        ("AutoencoderKLQwenImage", RBLNAutoencoderKLQwenImage, (1024, 1024)),
        ("AutoencoderKLQwenImage21", RBLNAutoencoderKLQwenImage21, (1024, 1024)),
        ("AutoencoderKLWan", RBLNAutoencoderKLWan, (480, 832)),
    ],
)
def test_a_model_is_compiled_for_the_images_of_its_pipeline(
    name: str, cls: type[RBLNAutoencoderKLWan], size: tuple[int, int]
) -> None:
    found = compile_wan(tiny_vaes.make(name), create_runtimes=False)
    assert type(found) is cls
    assert found.resolved_config.sample_size == size


def test_latents_are_normalised_as_pipelines_do() -> None:
    z = noise(2, 16, 3, 4)
    mean = torch.tensor(WAN_ORIGINAL.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(WAN_ORIGINAL.config.latents_std).view(1, -1, 1, 1)
    torch.testing.assert_close(ours().latent_scaling.scale(z), (z - mean) / std)


def test_tiles_have_the_arguments_of_diffusers_and_change_nothing() -> None:
    z = noise(1, 16, 1, 8, 8)
    expected = ours().decode(z).sample
    ours().enable_tiling(tile_sample_min_height=16, tile_sample_stride_width=8)
    try:
        assert torch.equal(ours().decode(z).sample, expected)
    finally:
        ours().disable_tiling()


def test_an_image_is_encoded_and_decoded_again() -> None:
    x = noise(1, 3, 1, 16, 16)
    with torch.no_grad():
        expected = WAN_ORIGINAL(x).sample
    assert relative_l2(ours()(x).sample, expected) < TOLERANCE


# What diffusers itself can't run


@pytest.mark.parametrize(
    ("options", "message"),
    [({"attn_scales": [1.0]}, "attn_scales"), ({"patch_size": 4}, "patch_size=4")],
)
def test_configurations_that_diffusers_cant_run_are_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    vae = tiny_vaes.make("AutoencoderKLWan")
    vae.register_to_config(**options)
    with pytest.raises(ValueError, match=message):
        compile_wan(vae)
