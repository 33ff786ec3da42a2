"""Tiny pipelines with random weights, made on the spot: what `--tiny` and the tests run.

Each function gives the components of a pipeline but for its VAE, so that one set serves
the original VAE and a compiled one. Where a text encoder would be large, it is left out, and
the pipeline is called with random embeddings. The images mean nothing.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tiny_vaes
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    LCMScheduler,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

Components = dict[str, Any]

WIDTH = 16
"""Channels of the hidden states of each text encoder."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def stable_diffusion(**unet: Any) -> Components:
    """Stable Diffusion 1.5 and 2, for every task; the options are of its UNet."""
    torch.manual_seed(0)
    return {
        "unet": _unet(**unet),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "text_encoder": CLIPTextModel(_clip_config()).eval(),
        "tokenizer": _clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def inpainting() -> Components:
    """Stable Diffusion made for inpainting, whose UNet gets the mask and the rest of the image."""
    return stable_diffusion(in_channels=9)


def latent_consistency() -> Components:
    """A latent-consistency model on Stable Diffusion."""
    return {
        **stable_diffusion(time_cond_proj_dim=8),
        "scheduler": LCMScheduler(),
    }


def controlnet() -> Components:
    """Stable Diffusion with a ControlNet."""
    parts = stable_diffusion()
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    return {**parts, "controlnet": net.eval()}


def upscaler() -> Components:
    """The ×4 upscaler; its VAE has three blocks."""
    parts = stable_diffusion(in_channels=7, num_class_embeds=1000)
    return {**parts, "low_res_scheduler": DDPMScheduler()}


def stable_diffusion_xl() -> Components:
    """Stable Diffusion XL, for every task."""
    torch.manual_seed(0)
    return {
        "unet": _unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        ),
        "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        "text_encoder": CLIPTextModel(_clip_config()).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(_clip_config()).eval(),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _clip_tokenizer(),
    }


def stable_diffusion_3() -> Components:
    """Stable Diffusion 3 without T5, which is optional there; its latents have 16 channels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": CLIPTextModelWithProjection(_clip_config()).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(_clip_config()).eval(),
        "text_encoder_3": None,
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _clip_tokenizer(),
        "tokenizer_3": None,
    }


def flux() -> Components:
    """FLUX.1, whose transformer takes 2x2 latent cells of 16 channels as one."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    t5 = T5Config(vocab_size=200, d_model=WIDTH, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": CLIPTextModel(_clip_config()).eval(),
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _t5_tokenizer(),
    }


def flux2() -> Components:
    """FLUX.2, whose transformer takes 2x2 latent cells of 4 channels as one."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }


def flux2_klein() -> Components:
    """FLUX.2 [klein], distilled."""
    return {**flux2(), "is_distilled": True}


def qwen_image() -> Components:
    """Qwen-Image, whose transformer takes 2x2 latent cells of 16 channels as one."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }


def qwen_image_edit() -> Components:
    """Qwen-Image-Edit."""
    return {**qwen_image(), "processor": None}


def qwen_image_2_1() -> Components:
    """Qwen-Image 2.1, whose latents have 64 channels."""
    torch.manual_seed(0)
    # Not imported above, since older versions of diffusers don't have it.
    transformer = diffusers.QwenImage21Transformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "processor": _Processor(),
    }


class _Processor:
    """Stands for the processor of prompts, of which the pipeline counts the system's tokens."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *args: Any, **options: Any) -> list[list[int]]:
        return [[1, 2, 3]]

    def encode(self, text: str) -> list[int]:
        return [4]


def wan() -> Components:
    """Wan 2.1, which makes an image as a video of one frame."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3),
        "text_encoder": None,
        "tokenizer": None,
    }


def wan_2_2() -> Components:
    """Wan 2.2's small model, which has a time step for each token."""
    return {**wan(), "expand_timesteps": True}


def stable_video_diffusion() -> Components:
    """Stable Video Diffusion, which makes the frames of a video from a picture."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        addition_time_embed_dim=WIDTH,
        projection_class_embeddings_input_dim=3 * WIDTH,
        sample_size=8,
        num_frames=3,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        image_size=224,
        patch_size=56,
    )
    return {
        "unet": unet.eval(),
        "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "feature_extractor": CLIPImageProcessor(),
    }


def hunyuan_image() -> Components:
    """HunyuanImage 2.1, distilled; its second text encoder reads what stands in the image."""
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }


def kandinsky() -> Components:
    """The decoder of Kandinsky 2.2, which turns the embedding of an image into the image."""
    torch.manual_seed(0)
    unet = _unet(
        out_channels=8,
        block_out_channels=(16, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
    )
    return {"unet": unet, "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1)}


def _unet(**options: Any) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**defaults, **options}).eval()


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def _clip_vocabulary() -> dict[str, int]:
    letters = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    tokens = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    return T5TokenizerFast(vocab=[(token, -1.0) for token in tokens], model_max_length=64)


def picture(batch: int = 1, height: int = 64, width: int = 64) -> Tensor:
    """Random pixels in [0, 1]."""
    shape = (batch, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(7))


def mask() -> Tensor:
    """The right half of a picture."""
    half = torch.zeros(1, 1, 64, 64)
    half[..., 32:] = 1
    return half


def photograph(height: int = 64, width: int = 64) -> Image.Image:
    """The same pixels, for pipelines that take no tensor."""
    pixels = (255 * picture(1, height, width)[0]).byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def _embeddings(*names: str, tokens: int = 7) -> dict[str, Tensor]:
    """Random embeddings of a prompt, and masks of its tokens, by their names in a call."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.ones(1, tokens, dtype=torch.bool)
        if "mask" in name
        else torch.randn(1, tokens, WIDTH, generator=generator)
        for name in names
    }


_TEXT: dict[str, Any] = {"prompt": "a cat"}
_EMBEDDED = _embeddings("prompt_embeds")
_MASKED = _embeddings("prompt_embeds", "prompt_embeds_mask")
_GUIDED = _embeddings("prompt_embeds", "negative_prompt_embeds")
_GLYPHS = _embeddings(
    "prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"
)
_OF_IMAGES = {
    name: embedding[:, 0]
    for name, embedding in _embeddings("image_embeds", "negative_image_embeds").items()
}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, its VAE, and what it is called with.

    Attributes:
        name: Its class, of diffusers.
        parts: Makes its components but for the VAE.
        vae: The class of the VAE, of diffusers.
        options: Of the VAE, beside the defaults of `tiny_vaes`.
        call: Arguments of a call, beside the prompt.
        prompt: The prompt, or embeddings in its place.
        vae_name: The name of the VAE among the components.
    """

    name: str
    parts: Callable[[], Components]
    vae: str = "AutoencoderKL"
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    prompt: Mapping[str, Any] = field(default_factory=lambda: _TEXT)
    vae_name: str = "vae"

    def build(self, vae: Any = None, parts: Components | None = None) -> DiffusionPipeline:
        """The pipeline, ready to be called with `prompt` and `call`.

        Args:
            vae: The VAE, original or compiled. By default one of `tiny_vaes`.
            parts: The other components. By default those of `parts`; a scheduler is copied,
                since it has a state.
        """
        if vae is None:
            vae = tiny_vaes.make(self.vae, **self.options)
        components = {
            name: type(part).from_config(part.config) if "scheduler" in name else part
            for name, part in (parts or self.parts()).items()
        }
        found = getattr(diffusers, self.name)
        if "requires_safety_checker" in inspect.signature(found).parameters:
            components["requires_safety_checker"] = False
        pipe: DiffusionPipeline = found(**components, **{self.vae_name: vae})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def task(self) -> str:
        """`"text-to-image"`, `"image-to-image"` or `"inpainting"`."""
        if "mask_image" in self.call:
            return "inpainting"
        return "image-to-image" if "image" in self.call else "text-to-image"


_SIZE: dict[str, Any] = {"height": 64, "width": 64}
_PAINTED = {"mask_image": mask()}
_CHANGED = {"image": picture(), "strength": 0.6, "num_inference_steps": 3}
_SDXL_MEANS = {
    "latents_mean": (-1.6, 1.1, 0.3, -0.8),
    "latents_std": (8.4, 6.4, 4.8, 5.2),
    "scaling_factor": 0.5,
}
_SD3_VAE = {
    "latent_channels": 16,
    "shift_factor": 0.06,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_UPSCALER_VAE = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "sample_size": 32,
    "scaling_factor": 0.08333,
}

PIPELINES: dict[str, Pipeline] = {
    "sd": Pipeline("StableDiffusionPipeline", stable_diffusion),
    "sd-img2img": Pipeline("StableDiffusionImg2ImgPipeline", stable_diffusion, call=_CHANGED),
    "sd-inpaint": Pipeline(
        "StableDiffusionInpaintPipeline", stable_diffusion, call={**_CHANGED, **_PAINTED}
    ),
    "sd-inpaint-9": Pipeline(
        "StableDiffusionInpaintPipeline",
        inpainting,
        call={"image": picture(), **_PAINTED, **_SIZE},
    ),
    "sdxl": Pipeline("StableDiffusionXLPipeline", stable_diffusion_xl),
    "sdxl-no-upcast": Pipeline(
        "StableDiffusionXLPipeline", stable_diffusion_xl, options={"force_upcast": False}
    ),
    "sdxl-mean-std": Pipeline(
        "StableDiffusionXLPipeline", stable_diffusion_xl, options=_SDXL_MEANS
    ),
    "sdxl-img2img": Pipeline(
        "StableDiffusionXLImg2ImgPipeline", stable_diffusion_xl, call=_CHANGED
    ),
    "sdxl-img2img-mean-std": Pipeline(
        "StableDiffusionXLImg2ImgPipeline", stable_diffusion_xl, options=_SDXL_MEANS, call=_CHANGED
    ),
    "sdxl-inpaint": Pipeline(
        "StableDiffusionXLInpaintPipeline",
        stable_diffusion_xl,
        call={**_CHANGED, **_PAINTED, **_SIZE},
    ),
    "upscale": Pipeline(
        "StableDiffusionUpscalePipeline",
        upscaler,
        options=_UPSCALER_VAE,
        call={"image": picture(1, 16, 16)},
    ),
    "sd3": Pipeline("StableDiffusion3Pipeline", stable_diffusion_3, options=_SD3_VAE),
    "sd3-img2img": Pipeline(
        "StableDiffusion3Img2ImgPipeline",
        stable_diffusion_3,
        options=_SD3_VAE,
        call={**_CHANGED, **_SIZE},
    ),
    "sd3-inpaint": Pipeline(
        "StableDiffusion3InpaintPipeline",
        stable_diffusion_3,
        options=_SD3_VAE,
        call={**_CHANGED, **_PAINTED, **_SIZE},
    ),
    "flux": Pipeline("FluxPipeline", flux, options=_SD3_VAE, call=_SIZE),
    "flux-img2img": Pipeline(
        "FluxImg2ImgPipeline", flux, options=_SD3_VAE, call={**_CHANGED, **_SIZE}
    ),
    "flux-inpaint": Pipeline(
        "FluxInpaintPipeline", flux, options=_SD3_VAE, call={**_CHANGED, **_PAINTED, **_SIZE}
    ),
    "controlnet": Pipeline(
        "StableDiffusionControlNetPipeline", controlnet, call={"image": picture()}
    ),
    "controlnet-img2img": Pipeline(
        "StableDiffusionControlNetImg2ImgPipeline",
        controlnet,
        call={**_CHANGED, "control_image": picture()},
    ),
    "lcm": Pipeline("LatentConsistencyModelPipeline", latent_consistency),
    "lcm-img2img": Pipeline(
        "LatentConsistencyModelImg2ImgPipeline", latent_consistency, call=_CHANGED
    ),
    "sd-taesd": Pipeline("StableDiffusionPipeline", stable_diffusion, "AutoencoderTiny"),
    "sd-taesd-img2img": Pipeline(
        "StableDiffusionImg2ImgPipeline", stable_diffusion, "AutoencoderTiny", call=_CHANGED
    ),
    "flux-taef1": Pipeline("FluxPipeline", flux, "AutoencoderTiny", {"latent_channels": 16}, _SIZE),
    "sd-inpaint-asymmetric": Pipeline(
        "StableDiffusionInpaintPipeline",
        inpainting,
        "AsymmetricAutoencoderKL",
        call={"image": picture(), **_PAINTED, **_SIZE},
    ),
    "flux2": Pipeline("Flux2Pipeline", flux2, "AutoencoderKLFlux2", call=_SIZE, prompt=_EMBEDDED),
    "flux2-image": Pipeline(
        "Flux2Pipeline",
        flux2,
        "AutoencoderKLFlux2",
        call={"image": photograph(), **_SIZE},
        prompt=_EMBEDDED,
    ),
    "flux2-klein": Pipeline(
        "Flux2KleinPipeline", flux2_klein, "AutoencoderKLFlux2", call=_SIZE, prompt=_EMBEDDED
    ),
    "flux2-klein-image": Pipeline(
        "Flux2KleinPipeline",
        flux2_klein,
        "AutoencoderKLFlux2",
        call={"image": photograph(), **_SIZE},
        prompt=_EMBEDDED,
    ),
    "qwen-image": Pipeline(
        "QwenImagePipeline", qwen_image, "AutoencoderKLQwenImage", call=_SIZE, prompt=_MASKED
    ),
    "qwen-image-img2img": Pipeline(
        "QwenImageImg2ImgPipeline",
        qwen_image,
        "AutoencoderKLQwenImage",
        call={**_CHANGED, **_SIZE},
        prompt=_MASKED,
    ),
    "qwen-image-inpaint": Pipeline(
        "QwenImageInpaintPipeline",
        qwen_image,
        "AutoencoderKLQwenImage",
        call={**_CHANGED, **_PAINTED, **_SIZE},
        prompt=_MASKED,
    ),
    "qwen-image-edit": Pipeline(
        "QwenImageEditPipeline",
        qwen_image_edit,
        "AutoencoderKLQwenImage",
        call={"image": photograph(), **_SIZE},
        prompt=_MASKED,
    ),
    "qwen-image-2.1": Pipeline(
        "QwenImage21Pipeline",
        qwen_image_2_1,
        "AutoencoderKLQwenImage21",
        call=_SIZE,
        prompt=_MASKED,
    ),
    "wan": Pipeline(
        "WanPipeline", wan, "AutoencoderKLWan", call={"num_frames": 1, **_SIZE}, prompt=_GUIDED
    ),
    "wan-2.2": Pipeline(
        "WanPipeline",
        wan_2_2,
        "AutoencoderKLWan",
        tiny_vaes.WAN_2_2,
        {"num_frames": 1, **_SIZE},
        _GUIDED,
    ),
    "svd": Pipeline(
        "StableVideoDiffusionPipeline",
        stable_video_diffusion,
        "AutoencoderKLTemporalDecoder",
        call={"image": photograph(), "decode_chunk_size": 2, **_SIZE},
        prompt={},
    ),
    "hunyuan-image": Pipeline(
        "HunyuanImagePipeline",
        hunyuan_image,
        "AutoencoderKLHunyuanImage",
        call=_SIZE,
        prompt=_GLYPHS,
    ),
    "kandinsky": Pipeline(
        "KandinskyV22Pipeline",
        kandinsky,
        "VQModel",
        call=_SIZE,
        prompt=_OF_IMAGES,
        vae_name="movq",
    ),
    "kandinsky-img2img": Pipeline(
        "KandinskyV22Img2ImgPipeline",
        kandinsky,
        "VQModel",
        call={**_CHANGED, **_SIZE},
        prompt=_OF_IMAGES,
        vae_name="movq",
    ),
}
"""By a name for what it is and does; the sizes are 64x64 pixels, but for the upscaler's."""


def add_argument(parser: argparse.ArgumentParser, task: str, default: str) -> None:
    """Add `--tiny [PIPELINE]` to the arguments of an example.

    Args:
        parser: Of the example.
        task: What its pipelines do.
        default: The key of `PIPELINES` that `--tiny` alone means.
    """
    names = [
        name for name, case in PIPELINES.items() if case.task == task and case.vae_name == "vae"
    ]
    parser.add_argument(
        "--tiny",
        nargs="?",
        const=default,
        choices=names,
        metavar="PIPELINE",
        help=f"random weights, no downloads: {', '.join(names)} (default: {default})",
    )


def pipeline(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline of `PIPELINES`, and the arguments of a call."""
    case = PIPELINES[name]
    return case.build(), {**case.prompt, **case.call}
