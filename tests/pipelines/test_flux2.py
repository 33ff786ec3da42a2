"""FLUX.2's pipeline gives the same images with a compiled VAE as with the original."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from torch import Tensor
from vaes import make_flux2, noise

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKLFlux2
from rbln_vae.metrics import psnr

FLOAT32_DB, BFLOAT16_DB = 80, 42
"""The least PSNR of images in [0, 1] for a VAE compiled in each precision."""

Vae = AutoencoderKLFlux2 | RBLNAutoencoderKLFlux2


@functools.cache
def original() -> AutoencoderKLFlux2:
    vae = make_flux2(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )
    vae.decoder.conv_out.weight.mul_(0.3)  # within [-1, 1], so that nothing hides by being clipped
    return vae


@functools.cache
def compiled(dtype: str = "float32") -> RBLNAutoencoderKLFlux2:
    found = RBLNAutoencoder.from_model(original(), rbln_target="cpu", rbln_dtype=dtype)
    assert isinstance(found, RBLNAutoencoderKLFlux2)
    return found


def pipeline(vae: Vae) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()
    pipe = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer, is_distilled=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(vae: Vae, **more: Any) -> Tensor:
    images: Tensor = pipeline(vae)(
        prompt_embeds=noise(1, 7, 16),
        num_inference_steps=2,
        height=64,
        width=64,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **more,
    ).images
    return images


def picture() -> Image.Image:
    pixels = (255 * torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(1))).byte()
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("given", [{}, {"image": picture()}], ids=["text", "image"])
@pytest.mark.parametrize(("dtype", "least"), [("float32", FLOAT32_DB), ("bfloat16", BFLOAT16_DB)])
def test_images_are_those_of_the_original(given: dict[str, Any], dtype: str, least: float) -> None:
    expected = run(original(), **given)
    assert expected.std() > 0.1, "a flat image shows nothing"
    assert psnr(run(compiled(dtype), **given), expected, 1.0) >= least


def test_a_pipeline_is_saved_and_loaded_with_a_compiled_vae(tmp_path: Path) -> None:
    pipe = pipeline(compiled())
    pipe.save_pretrained(tmp_path)
    loaded = Flux2KleinPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert isinstance(loaded.vae, RBLNAutoencoderKLFlux2)
    assert torch.equal(run(loaded.vae), run(compiled()))
