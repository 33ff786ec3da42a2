"""Every pipeline gives the same images with a compiled VAE as with the original, seed for seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.metrics import psnr

Vae = AutoencoderKL | RBLNAutoencoderKL

FLOAT32_DB, BFLOAT16_DB = 80, 42
"""The least PSNR of images in [0, 1] for a VAE compiled in each precision."""

SDXL_MEAN, SDXL_STD = (-1.6, 1.1, 0.3, -0.8), (8.4, 6.4, 4.8, 5.2)
SD3_VAE = {
    "latent_channels": 16,
    "shift_factor": 0.06,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def picture(batch: int = 1, height: int = 64, width: int = 64) -> Tensor:
    """Random pixels in [0, 1]."""
    shape = (batch, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(7))


def mask() -> Tensor:
    """The right half."""
    half = torch.zeros(1, 1, 64, 64)
    half[..., 32:] = 1
    return half


@dataclass(frozen=True)
class Case:
    """A pipeline, the options of its VAE, and what it is called with."""

    pipeline: str
    parts: Callable[[], tiny.Components]
    vae: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


def image_to_image(**more: Any) -> dict[str, Any]:
    return {"image": picture(), "strength": 0.7, "num_inference_steps": 3, **more}


def cases() -> dict[str, Case]:
    sd, sdxl, sd3, flux = (
        tiny.stable_diffusion,
        tiny.stable_diffusion_xl,
        tiny.stable_diffusion_3,
        tiny.flux,
    )
    size = {"height": 64, "width": 64}
    painted = {"mask_image": mask()}
    upscaled = {"channels": (4, 8, 8), "scaling_factor": 0.08333}
    means = {"latents_mean": SDXL_MEAN, "latents_std": SDXL_STD, "scaling_factor": 0.5}
    return {
        "sd": Case("StableDiffusionPipeline", sd),
        "sd-img2img": Case("StableDiffusionImg2ImgPipeline", sd, {}, image_to_image()),
        "sd-inpaint": Case("StableDiffusionInpaintPipeline", sd, {}, image_to_image(**painted)),
        "sd-inpaint-9": Case(
            "StableDiffusionInpaintPipeline",
            functools.partial(sd, in_channels=9),
            {},
            {"image": picture(), **painted, **size},
        ),
        "sdxl": Case("StableDiffusionXLPipeline", sdxl),
        "sdxl-no-upcast": Case("StableDiffusionXLPipeline", sdxl, {"force_upcast": False}),
        "sdxl-mean-std": Case("StableDiffusionXLPipeline", sdxl, means),
        "sdxl-img2img": Case("StableDiffusionXLImg2ImgPipeline", sdxl, {}, image_to_image()),
        "sdxl-img2img-mean-std": Case(
            "StableDiffusionXLImg2ImgPipeline", sdxl, means, image_to_image()
        ),
        "sdxl-inpaint": Case(
            "StableDiffusionXLInpaintPipeline", sdxl, {}, image_to_image(**painted, **size)
        ),
        "upscale": Case(
            "StableDiffusionUpscalePipeline", tiny.upscaler, upscaled, {"image": picture(1, 16, 16)}
        ),
        "sd3": Case("StableDiffusion3Pipeline", sd3, SD3_VAE),
        "sd3-img2img": Case(
            "StableDiffusion3Img2ImgPipeline", sd3, SD3_VAE, image_to_image(**size)
        ),
        "sd3-inpaint": Case(
            "StableDiffusion3InpaintPipeline", sd3, SD3_VAE, image_to_image(**painted, **size)
        ),
        "flux": Case("FluxPipeline", flux, SD3_VAE, size),
        "flux-img2img": Case("FluxImg2ImgPipeline", flux, SD3_VAE, image_to_image(**size)),
        "flux-inpaint": Case(
            "FluxInpaintPipeline", flux, SD3_VAE, image_to_image(**painted, **size)
        ),
        "controlnet": Case(
            "StableDiffusionControlNetPipeline", tiny.controlnet, {}, {"image": picture()}
        ),
        "controlnet-img2img": Case(
            "StableDiffusionControlNetImg2ImgPipeline",
            tiny.controlnet,
            {},
            image_to_image(control_image=picture()),
        ),
        "lcm": Case("LatentConsistencyModelPipeline", tiny.latent_consistency),
        "lcm-img2img": Case(
            "LatentConsistencyModelImg2ImgPipeline", tiny.latent_consistency, {}, image_to_image()
        ),
    }


CASES = cases()


@functools.cache
def components(parts: Callable[[], tiny.Components]) -> tiny.Components:
    return parts()


_VAES: dict[str, AutoencoderKL] = {}
_COMPILED: dict[str, RBLNAutoencoderKL] = {}


def original(options: dict[str, Any]) -> AutoencoderKL:
    key = repr(options)
    if key not in _VAES:
        _VAES[key] = tiny.vae(**options)
    return _VAES[key]


def compiled(options: dict[str, Any], dtype: str = "float32") -> RBLNAutoencoderKL:
    key = dtype + repr(options)
    if key not in _COMPILED:
        _COMPILED[key] = RBLNAutoencoderKL.from_model(
            original(options), rbln_target="cpu", rbln_dtype=dtype
        )
    return _COMPILED[key]


def make(case: Case, vae: Vae) -> DiffusionPipeline:
    """The pipeline of a case; components are shared, but for schedulers, which have a state."""
    parts = {
        name: type(part).from_config(part.config) if "scheduler" in name else part
        for name, part in components(case.parts).items()
    }
    checked = "safety_checker" in parts and "Upscale" not in case.pipeline
    if checked:
        parts["requires_safety_checker"] = False
    pipe = getattr(diffusers, case.pipeline)(**parts, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: DiffusionPipeline, case: Case, **more: Any) -> Tensor:
    """Images in [0, 1], or what `output_type` says."""
    call = {
        "prompt": "a cat",
        "num_inference_steps": 1,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **case.call,
        **more,
    }
    result: Tensor = pipe(**call).images
    return result


def pair(name: str, dtype: str = "float32", **more: Any) -> tuple[Tensor, Tensor]:
    """Images by a compiled VAE, and by the original in float32."""
    case = CASES[name]
    found = run(make(case, compiled(case.vae, dtype)), case, **more)
    return found, run(make(case, original(case.vae)), case, **more)


def assert_same(found: Tensor, expected: Tensor, least: float = FLOAT32_DB) -> None:
    assert expected.float().std() > 0.1, "a flat image shows nothing"
    assert psnr(found, expected, 1.0) >= least


SLOW = {"sd3-inpaint", "flux-inpaint", "controlnet-img2img", "lcm-img2img", "sdxl-no-upcast"}
MOST = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.mark.parametrize("name", MOST)
def test_images_are_those_of_the_original(name):
    found, expected = pair(name)
    assert found.dtype == expected.dtype
    assert_same(found, expected)


@pytest.mark.parametrize("name", MOST)
def test_images_of_a_vae_compiled_in_bfloat16(name):
    assert_same(*pair(name, "bfloat16"), BFLOAT16_DB)


@pytest.mark.parametrize("dropped", ["encoder", "decoder"])
def test_these_images_tell_when_the_attention_is_missing(dropped):
    broken = tiny.vae()
    attention = getattr(broken, dropped).mid_block.attentions[0]
    for weight in attention.to_out[0].parameters():
        weight.zero_()
    model = RBLNAutoencoderKL.from_model(broken, rbln_target="cpu", rbln_dtype="float32")
    case = CASES["sd-img2img"]
    found = run(make(case, model), case)
    assert psnr(found, run(make(case, original({})), case), 1.0) < BFLOAT16_DB


# What a pipeline is called with


@pytest.mark.parametrize("name", ["sd", "sd-img2img", "sd-inpaint"])
def test_several_images_for_a_prompt(name):
    found, expected = pair(name, num_images_per_prompt=2)
    assert len(found) == 2
    assert_same(found, expected)


def test_a_batch_of_prompts_with_a_generator_each():
    found, expected = (
        run(
            make(CASES["sd-img2img"], vae),
            CASES["sd-img2img"],
            prompt=["a cat", "a dog"],
            image=picture(2),
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        )
        for vae in (compiled({}), original({}))
    )
    assert_same(found, expected)


@pytest.mark.parametrize("size", [(40, 72), (88, 24), (64, 8)], ids=str)
def test_any_height_and_width(size):
    height, width = size
    found, expected = pair("sd", height=height, width=width)
    assert found.shape == (1, 3, height, width)
    assert_same(found, expected)


def test_a_picture_of_any_size_is_encoded():
    found, expected = pair("sd-img2img", image=picture(1, 40, 24))
    assert found.shape == (1, 3, 40, 24)
    assert_same(found, expected)


def test_latents_come_out_undecoded():
    found, expected = pair("sd", output_type="latent")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_pictures_come_out_in_every_form(output_type):
    found, expected = (
        torch.stack(
            [torch.tensor(list(image.getdata())) / 255 for image in images]
            if output_type == "pil"
            else [torch.from_numpy(image) for image in images]
        )
        for images in pair("sd", output_type=output_type)
    )
    assert psnr(found, expected, 1.0) >= 60  # a byte may be rounded to the other side


def test_a_callback_may_decode_latents():
    seen: list[Tensor] = []

    def decode(pipe: Any, step: int, time: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = values["latents"] / pipe.vae.config.scaling_factor
        seen.append(pipe.vae.decode(latents, return_dict=False)[0])
        return values

    found, expected = pair("sd", num_inference_steps=2, callback_on_step_end=decode)
    assert_same(found, expected)
    assert len(seen) == 4
    assert psnr(seen[0], seen[2]) >= FLOAT32_DB


def test_an_image_is_kept_while_others_are_made():
    case = CASES["sd"]
    pipe = make(case, compiled({}))
    first = run(pipe, case)
    kept = first.clone()
    run(pipe, case, generator=torch.Generator().manual_seed(9))
    assert torch.equal(first, kept)


# How a pipeline is set up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl-no-upcast"])
def test_a_pipeline_in_half_precision(name, dtype):
    case = CASES[name]
    parts = case.parts()  # its own, since they are converted
    images = []
    for vae in (compiled(case.vae), tiny.vae(**case.vae)):
        pipe = getattr(diffusers, case.pipeline)(
            **parts, vae=vae, **({"requires_safety_checker": False} if name == "sd" else {})
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.to(dtype, silence_dtype_warnings=True)
        assert pipe.dtype == dtype
        images.append(run(pipe, case))
    found, expected = images
    assert found.dtype == dtype
    assert_same(found, expected, BFLOAT16_DB)


def test_moving_a_pipeline_leaves_the_vae():
    case = CASES["sd"]
    pipe = make(case, compiled({}))
    assert pipe.to("cpu", torch.float32) is pipe
    assert pipe.device == torch.device("cpu")
    assert pipe.components["vae"] is compiled({})


def test_tiling_and_slicing_are_allowed():
    case = CASES["sd"]
    pipe = make(case, compiled({}))
    before = run(pipe, case)
    for what in ("tiling", "slicing"):
        # Pipelines of older versions of diffusers have methods that call those of the VAE.
        getattr(pipe, f"enable_vae_{what}", getattr(pipe.vae, f"enable_{what}"))()
    assert torch.equal(run(pipe, case), before)


def test_offloading_leaves_the_vae_where_it_is():
    parts = tiny.stable_diffusion()  # its own, since hooks stay
    pipe = diffusers.StableDiffusionPipeline(
        **parts, vae=compiled({}), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    case = CASES["sd"]
    before = run(pipe, case)
    pipe.enable_model_cpu_offload(device="cpu")
    assert not hasattr(pipe.vae, "_hf_hook")
    assert torch.equal(run(pipe, case), before)


def test_exchanging_the_vae_of_a_pipeline():
    case = CASES["sd"]
    pipe = make(case, original({}))
    expected = run(pipe, case)
    pipe.vae = compiled({})
    assert pipe.components["vae"] is compiled({})
    assert_same(run(pipe, case), expected)


@pytest.mark.parametrize("task", ["StableDiffusionImg2ImgPipeline", "AutoPipelineForImage2Image"])
def test_one_pipeline_from_another(task):
    case = CASES["sd-img2img"]
    images = []
    for vae in (compiled({}), original({})):
        pipe = make(CASES["sd"], vae)
        other = getattr(diffusers, task).from_pipe(pipe)
        assert other.vae is vae
        assert isinstance(other, diffusers.StableDiffusionImg2ImgPipeline)
        other.set_progress_bar_config(disable=True)
        images.append(run(other, case))
    assert_same(*images)


def test_a_pipeline_from_the_components_of_another():
    pipe = make(CASES["sd"], compiled({}))
    other = diffusers.StableDiffusionInpaintPipeline(
        **pipe.components, requires_safety_checker=False
    )
    assert other.vae is compiled({})


@pytest.mark.parametrize(
    "task", ["AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting"]
)
def test_an_auto_pipeline_loads_a_saved_one(task, tmp_path):
    make(CASES["sd"], compiled({})).save_pretrained(tmp_path)
    pipe = getattr(diffusers, task).from_pretrained(tmp_path)
    assert isinstance(pipe.vae, RBLNAutoencoderKL)


def test_the_image_processor_takes_a_round_trip():
    vae = compiled({})
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=factor)
    sample = processor.preprocess(processor.pt_to_numpy(picture(1, 67, 50)))
    assert sample.shape == (1, 3, 64, 48)
    decoded = vae.decode(vae.encode(sample).latent_dist.mode()).sample
    (image,) = processor.postprocess(decoded, output_type="pil")
    assert image.size == (48, 64)
