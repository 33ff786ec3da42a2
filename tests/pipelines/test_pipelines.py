"""Every pipeline gives the same images with a compiled VAE as with the original, seed for seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import tiny
import tiny_vaes
import torch
from diffusers import DiffusionPipeline, FluxControlPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from tiny import Pipeline, picture
from torch import Tensor

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKL
from rbln_vae.metrics import psnr
from rbln_vae.models.autoencoder import RBLNAutoencoderModel

FLOAT32_DB, BFLOAT16_DB = 80, 42
"""The least PSNR of images in [0, 1] for a VAE compiled in each precision."""

CASES = tiny.PIPELINES
SD = CASES["sd"]

_COMPONENTS: dict[Callable[[], tiny.Components], tiny.Components] = {}
_VAES: dict[str, Any] = {}
_COMPILED: dict[str, RBLNAutoencoderModel] = {}


def components(case: Pipeline) -> tiny.Components:
    """The same for all pipelines that take the same, since making them takes longest."""
    if case.parts not in _COMPONENTS:
        _COMPONENTS[case.parts] = case.parts()
    return _COMPONENTS[case.parts]


def original(case: Pipeline) -> Any:
    """The VAE of diffusers."""
    key = f"{case.vae} {case.options}"
    if key not in _VAES:
        _VAES[key] = tiny_vaes.make(case.vae, **case.options)
    return _VAES[key]


def compiled(case: Pipeline, dtype: str = "float32") -> RBLNAutoencoderModel:
    """The same VAE, compiled."""
    key = f"{case.vae} {case.options} {dtype}"
    if key not in _COMPILED:
        _COMPILED[key] = RBLNAutoencoder.from_model(
            original(case), rbln_target="cpu", rbln_dtype=dtype
        )
    return _COMPILED[key]


def make(case: Pipeline, vae: Any) -> DiffusionPipeline:
    """The pipeline of a case with components that are shared."""
    return case.build(vae, components(case))


def run(pipe: DiffusionPipeline, case: Pipeline, **more: Any) -> Tensor:
    """Images, or what `output_type` says."""
    call = {
        "num_inference_steps": 1,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **case.prompt,
        **case.call,
        **more,
    }
    result: Tensor = pipe(**call, return_dict=False)[0]
    return result


def pair(name: str, dtype: str = "float32", **more: Any) -> tuple[Tensor, Tensor]:
    """Images by a compiled VAE, and by the original in float32."""
    case = CASES[name]
    found = run(make(case, compiled(case, dtype)), case, **more)
    return found, run(make(case, original(case)), case, **more)


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


def _of_wan_2_1_for_images() -> tiny.Components:
    parts = tiny.wan()
    config = {**parts["transformer"].config, "in_channels": 36}
    transformer = type(parts["transformer"]).from_config(config).eval()
    return {**parts, "transformer": transformer, "image_encoder": None, "image_processor": None}


_FROM_AN_IMAGE = {"image": tiny.photograph(), "height": 64, "width": 64}
VIDEOS = {
    "Wan 2.1": CASES["wan"],
    "Wan 2.2": CASES["wan-2.2"],
    "Wan 2.1 from an image": replace(
        CASES["wan"],
        name="WanImageToVideoPipeline",
        parts=_of_wan_2_1_for_images,
        call=_FROM_AN_IMAGE,
    ),
    "Wan 2.2 from an image": replace(
        CASES["wan-2.2"],
        name="WanImageToVideoPipeline",
        parts=lambda: {**tiny.wan_2_2(), "image_encoder": None, "image_processor": None},
        call=_FROM_AN_IMAGE,
    ),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_those_of_the_original(name: str) -> None:
    case = VIDEOS[name]
    found = run(make(case, compiled(case)), case, num_frames=9)
    expected = run(make(case, original(case)), case, num_frames=9)
    assert found.shape == expected.shape == (1, 9, 3, 64, 64)
    assert_same(found, expected)


class _Typed:
    """Stands for the text encoder, of which the pipeline reads the dtype for the image."""

    dtype = torch.float32


def _of_layers() -> tiny.Components:
    parts = tiny.qwen_image()
    config = {
        **parts["transformer"].config,
        "use_additional_t_cond": True,
        "use_layer3d_rope": True,
    }
    torch.manual_seed(0)
    transformer = type(parts["transformer"]).from_config(config).eval()
    return {**parts, "transformer": transformer, "text_encoder": _Typed(), "processor": None}


def _see_through() -> Image.Image:
    """A photograph whose opacity is as random as its colours."""
    image = tiny.photograph()
    image.putalpha(image.getchannel("R").rotate(90))
    return image


LAYERS = replace(
    CASES["qwen-image"],
    name="QwenImageLayeredPipeline",
    parts=_of_layers,
    options={"input_channels": 4},
    call={"image": _see_through(), "prompt": "a cat", "layers": 3},
)


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 64x64 pixels in a pipeline that else makes about 640x640 or 1024x1024."""
    monkeypatch.setattr(
        "diffusers.pipelines.qwenimage.pipeline_qwenimage_layered.calculate_dimensions",
        lambda area, ratio: (64, 64),
    )


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize(("dtype", "least"), [("float32", FLOAT32_DB), ("bfloat16", BFLOAT16_DB)])
def test_layers_are_those_of_the_original(dtype: str, least: float) -> None:
    vaes = (compiled(LAYERS, dtype), original(LAYERS))
    (found,), (expected,) = (run(make(LAYERS, vae), LAYERS) for vae in vaes)
    assert found.shape == expected.shape == (3, 4, 64, 64)
    assert_same(found, expected, least)


@pytest.mark.usefixtures("small_layers")
def test_layers_tell_when_the_opacity_of_the_image_is_missing() -> None:
    pipe = make(LAYERS, original(LAYERS))
    (opaque,) = run(pipe, LAYERS, image=tiny.photograph().convert("RGBA"))
    (expected,) = run(pipe, LAYERS)
    assert psnr(opaque, expected, 1.0) < FLOAT32_DB


class InBfloat16:
    """Diffusers' own `VQModel` in bfloat16, for a pipeline in float32."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.narrow = vae, copy.deepcopy(vae).to(torch.bfloat16)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, x: Tensor) -> Any:
        return {"latents": self.narrow.encode(x.bfloat16()).latents.float()}

    def decode(self, z: Tensor, force_not_quantize: bool) -> Any:
        return {"sample": self.narrow.decode(z.bfloat16(), force_not_quantize).sample.float()}


class ClipsInBfloat16(InBfloat16):
    """The same of diffusers' `AutoencoderKLTemporalDecoder`."""

    def encode(self, x: Tensor) -> Any:
        return self.narrow.encode(x.bfloat16())

    def decode(self, z: Tensor, num_frames: int) -> Any:
        return DecoderOutput(self.narrow.decode(z.bfloat16(), num_frames).sample.float())


NARROW = {"VQModel": InBfloat16, "AutoencoderKLTemporalDecoder": ClipsInBfloat16}
"""Decoders that enlarge the error of the latent: by multiplying by it, or by their many norms."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST)
def test_images_of_a_vae_compiled_in_bfloat16(name):
    case, least = CASES[name], float(BFLOAT16_DB)
    found, expected = pair(name, "bfloat16")
    if case.vae in NARROW:
        own = run(make(case, NARROW[case.vae](original(case))), case)
        least = min(least, psnr(own, expected, 1.0))
    assert_same(found, expected, least)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("sd-img2img", "encoder"),
        ("sd-img2img", "decoder"),
        ("flux2", "decoder"),
        ("qwen-image-img2img", "encoder"),
        ("qwen-image-img2img", "decoder"),
        ("qwen-image-2.1", "decoder"),
        ("wan", "decoder"),
        ("hunyuan-image", "decoder"),
        ("kandinsky", "decoder"),
    ],
)
def test_these_images_tell_when_the_attention_is_missing(name, dropped):
    case = CASES[name]
    broken = tiny_vaes.make(case.vae, **case.options)
    for layer, module in getattr(broken, dropped).mid_block.named_modules():
        if layer.endswith(("to_out.0", "proj")):
            for weight in module.parameters():
                weight.zero_()
    found = run(make(case, broken), case)
    assert psnr(found, run(make(case, original(case)), case), 1.0) < BFLOAT16_DB


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
        for vae in (compiled(SD), original(SD))
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
    pipe = make(SD, compiled(SD))
    first = run(pipe, SD)
    kept = first.clone()
    run(pipe, SD, generator=torch.Generator().manual_seed(9))
    assert torch.equal(first, kept)


# How a pipeline is set up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl-no-upcast"])
def test_a_pipeline_in_half_precision(name, dtype):
    case = CASES[name]
    parts = case.parts()  # its own, since they are converted
    images = []
    for vae in (compiled(case), tiny_vaes.make(case.vae, **case.options)):
        pipe = case.build(vae, parts)
        pipe.to(dtype, silence_dtype_warnings=True)
        assert pipe.dtype == dtype
        images.append(run(pipe, case))
    found, expected = images
    assert found.dtype == dtype
    assert_same(found, expected, BFLOAT16_DB)


def test_a_pipeline_whose_denoiser_takes_the_dtype_of_the_vae():
    """FLUX control gives it the latents of the control image as the VAE's dtype makes them."""
    case = CASES["flux"]
    parts = case.parts()
    transformer = parts["transformer"]
    options = {key: value for key, value in transformer.config.items() if key[0] != "_"}
    parts["transformer"] = type(transformer).from_config(
        {**options, "in_channels": 128, "out_channels": 64}
    )
    images = []
    for vae in (copy.copy(compiled(case)), tiny_vaes.make(case.vae, **case.options)):
        pipe = FluxControlPipeline(**parts, vae=vae).to(torch.bfloat16)
        pipe.vae.to(torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        call = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        found = pipe("a cat", control_image=tiny.photograph(), generator=generator, **call)
        images.append(found.images)
    assert_same(*images, BFLOAT16_DB)


@pytest.mark.parametrize(
    "name", ["flux2-klein-image", "qwen-image-img2img", "wan", "hunyuan-image"]
)
def test_a_pipeline_in_half_precision_normalises_latents_as_before(name):
    case = CASES[name]
    parts = case.parts()  # its own, since they are converted
    embeddings = {
        key: value.to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in case.prompt.items()
    }
    images = []
    for vae in (compiled(case), tiny_vaes.make(case.vae, **case.options)):
        pipe = case.build(vae, parts).to(torch.bfloat16)
        images.append(run(pipe, case, **embeddings))
    assert_same(*images, BFLOAT16_DB)


def test_an_asymmetric_vae_is_one_of_diffusers_but_no_module_to_be_moved():
    case = CASES["sd-inpaint-asymmetric"]
    vae = compiled(case)
    assert isinstance(vae, diffusers.AsymmetricAutoencoderKL)
    assert not isinstance(vae, (torch.nn.Module, diffusers.ModelMixin))
    pipe = case.build(vae)  # with components of its own, since hooks stay
    before = run(pipe, case)
    pipe.enable_model_cpu_offload(device="cpu")
    assert not hasattr(vae, "_hf_hook")
    assert torch.equal(run(pipe, case), before)
    pipe.remove_all_hooks()
    pipe.to("meta")


def test_images_tell_when_the_condition_of_an_asymmetric_vae_is_missing(monkeypatch):
    case = CASES["sd-inpaint-asymmetric"]
    vae = tiny_vaes.make(case.vae, **case.options)
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, image, mask, **options: decode(z, **options))
    found = run(make(case, vae), case)
    assert psnr(found, run(make(case, original(case)), case), 1.0) < BFLOAT16_DB


def test_moving_a_pipeline_leaves_the_vae():
    pipe = make(SD, compiled(SD))
    assert pipe.to("cpu", torch.float32) is pipe
    assert pipe.device == torch.device("cpu")
    assert pipe.components["vae"] is compiled(SD)


def test_tiling_and_slicing_are_allowed():
    pipe = make(SD, compiled(SD))
    before = run(pipe, SD)
    for what in ("tiling", "slicing"):
        # Pipelines of older versions of diffusers have methods that call those of the VAE.
        of_vae = getattr(pipe.vae, f"enable_{what}")
        getattr(pipe, f"enable_vae_{what}", of_vae)()  # type: ignore[misc]
    assert torch.equal(run(pipe, SD), before)


def test_offloading_leaves_the_vae_where_it_is():
    pipe = SD.build(compiled(SD))  # with components of its own, since hooks stay
    before = run(pipe, SD)
    pipe.enable_model_cpu_offload(device="cpu")
    assert not hasattr(pipe.vae, "_hf_hook")
    assert torch.equal(run(pipe, SD), before)


def test_exchanging_the_vae_of_a_pipeline():
    pipe = make(SD, original(SD))
    expected = run(pipe, SD)
    pipe.vae = compiled(SD)
    assert pipe.components["vae"] is compiled(SD)
    assert_same(run(pipe, SD), expected)


@pytest.mark.parametrize("task", ["StableDiffusionImg2ImgPipeline", "AutoPipelineForImage2Image"])
def test_one_pipeline_from_another(task):
    case = CASES["sd-img2img"]
    images = []
    for vae in (compiled(SD), original(SD)):
        pipe = make(SD, vae)
        other = getattr(diffusers, task).from_pipe(pipe)
        assert other.vae is vae
        assert isinstance(other, diffusers.StableDiffusionImg2ImgPipeline)
        other.set_progress_bar_config(disable=True)
        images.append(run(other, case))
    assert_same(*images)


def test_a_pipeline_from_the_components_of_another():
    pipe = make(SD, compiled(SD))
    other = diffusers.StableDiffusionInpaintPipeline(
        **pipe.components, requires_safety_checker=False
    )
    assert other.vae is compiled(SD)


@pytest.mark.parametrize(
    "task", ["AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting"]
)
def test_an_auto_pipeline_loads_a_saved_one(task, tmp_path):
    make(SD, compiled(SD)).save_pretrained(tmp_path)
    pipe = getattr(diffusers, task).from_pretrained(tmp_path)
    assert isinstance(pipe.vae, RBLNAutoencoderKL)


def test_the_image_processor_takes_a_round_trip():
    vae = compiled(SD)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=factor)
    sample = processor.preprocess(processor.pt_to_numpy(picture(1, 67, 50)))
    assert sample.shape == (1, 3, 64, 48)
    decoded = vae.decode(vae.encode(sample).latent_dist.mode()).sample
    (image,) = processor.postprocess(decoded, output_type="pil")
    assert image.size == (48, 64)
