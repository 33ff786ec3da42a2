"""Tiny pipelines with random weights, made on the spot: what `--tiny` and the tests run.

Each function gives the components of a pipeline but for its VAE, so that one set serves
the original VAE and a compiled one. The images mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

Components = dict[str, Any]

WIDTH = 16
"""Channels of the hidden states of each text encoder."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vae(channels: tuple[int, ...] = (4, 8, 8, 8), **options: Any) -> AutoencoderKL:
    """A VAE whose layers are scaled to give what trained ones do.

    Freshly made weights give flat images and attention that sees no difference between
    pixels, so that almost any mistake would go unseen.

    Args:
        channels: One for each block; the scale factor is `2 ** (len(channels) - 1)`.
        **options: Of `AutoencoderKL`.
    """
    defaults = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": 4,
        "sample_size": 8 * 2 ** (len(channels) - 1),
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoencoderKL(**{**defaults, **options}).eval().requires_grad_(False)
        _scale_to_natural_spread(model)
    return model


def _scale_to_natural_spread(model: AutoencoderKL) -> None:
    """Divide the weights of each layer by the spread of what it gives for noise."""

    def divide(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        spread = output.std().clamp(min=1e-6)
        for weight in module.parameters():
            weight.div_(spread)
        return output / spread

    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [layer.register_forward_hook(divide) for layer in layers]
    side = 4 * 2 ** (len(model.config.block_out_channels) - 1)
    model.encode(torch.randn(4, model.config.in_channels, side, side))
    model.decode(torch.randn(4, model.config.latent_channels, 8, 8))
    for hook in hooks:
        hook.remove()
    for name, module in model.named_modules():
        if name.endswith("to_q"):
            module.weight.mul_(2)  # attention then prefers some pixels to others
        if name == "decoder.conv_out":
            module.weight.mul_(0.3)  # within [-1, 1], so that nothing hides by being clipped
            module.bias.mul_(0.3)


def stable_diffusion(**unet: Any) -> Components:
    """Stable Diffusion 1.5 and 2, for every task; `in_channels=9` is one made for inpainting."""
    torch.manual_seed(0)
    return {
        "unet": _unet(**unet),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "text_encoder": CLIPTextModel(_clip_config()).eval(),
        "tokenizer": _clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


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
