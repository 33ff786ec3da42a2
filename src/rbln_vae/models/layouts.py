"""The layouts in which people keep autoencoders: what each calls the weights of diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ..errors import RBLNCompileError

Rules = tuple[tuple[str, str], ...]
"""Regular expressions and what replaces them, applied in turn."""

PREFIXES = ("", "first_stage_model.", "vae.", "model.")
"""What stands before the names of a VAE: nothing, or its name in a whole checkpoint."""

_NO_WEIGHTS = re.compile(r"(loss|model_ema)\.|vae_(scale|shift)$")
"""What LDM's training and ComfyUI save beside a VAE, and neither encoding nor decoding needs."""


@dataclass(frozen=True)
class Layout:
    """One way to name the weights of an autoencoder.

    Attributes:
        name: For messages.
        signs: Names of which each tells that a file has this layout.
        rename: From all names to the name in diffusers of each.
    """

    name: str
    signs: tuple[str, ...]
    rename: Callable[[Collection[str]], dict[str, str]]


def names_in_diffusers(keys: Iterable[str], what: str) -> dict[str, str]:
    """Recognise the layout of a file, and name its weights as diffusers does.

    Args:
        keys: The names in the file.
        what: The file, for messages.

    Returns:
        The name in diffusers of each weight of the VAE by its name in the file.

    Raises:
        RBLNCompileError: The file holds no VAE in a known layout.
    """
    keys = list(keys)
    for prefix in PREFIXES:
        names = {
            key[len(prefix) :]: key
            for key in keys
            if key.startswith(prefix) and not _NO_WEIGHTS.match(key[len(prefix) :])
        }
        for layout in LAYOUTS:
            if any(sign in names for sign in layout.signs):
                found = {names[name]: new for name, new in layout.rename(names).items()}
                _check_unique(found, what)
                return found
    some = ", ".join(sorted(keys)[:3]) or "nothing"
    raise RBLNCompileError(
        f"{what} holds no autoencoder in a known layout; it begins with {some}. These are known, "
        f"alone or under {', '.join(filter(None, PREFIXES))} in a checkpoint: "
        f"{', '.join(layout.name for layout in LAYOUTS)}."
    )


def _check_unique(found: dict[str, str], what: str) -> None:
    stored: dict[str, str] = {}
    for key, name in found.items():
        if name in stored:
            raise RBLNCompileError(
                f"{what} is ambiguous: {stored[name]} and {key} both stand for {name}."
            )
        stored[name] = key


def _renamed(keys: Iterable[str], rules: Rules) -> dict[str, str]:
    found = {}
    for key in keys:
        name = key
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[key] = name
    return found


_OLD_ATTENTION: Rules = (
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
"""What diffusers itself called these before version 0.17; the files are still in use."""


def _diffusers(keys: Collection[str]) -> dict[str, str]:
    return _renamed(keys, _OLD_ATTENTION)


_LDM: Rules = (
    (r"^encoder\.quant_conv\.", "quant_conv."),
    (r"^decoder\.post_quant_conv\.", "post_quant_conv."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


def _ldm(keys: Collection[str]) -> dict[str, str]:
    # The levels of the decoder are numbered from the image; those of diffusers from the latent.
    last = max(_numbers(keys, r"decoder\.up\.(\d+)\."), default=0)
    return {
        key: re.sub(
            r"\.up_blocks\.(\d+)\.", lambda found: f".up_blocks.{last - int(found[1])}.", name
        )
        for key, name in _renamed(keys, _LDM).items()
    }


_WAN: Rules = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
_RESAMPLE = r"(resample|time_conv)\."

_WAN_2_2: Rules = (
    (rf"\.downsamples\.(\d+)\.downsamples\.\d+\.{_RESAMPLE}", r".down_blocks.\1.downsampler.\2."),
    (r"\.downsamples\.(\d+)\.downsamples\.", r".down_blocks.\1.resnets."),
    (rf"\.upsamples\.(\d+)\.upsamples\.\d+\.{_RESAMPLE}", r".up_blocks.\1.upsampler.\2."),
    (r"\.upsamples\.(\d+)\.upsamples\.", r".up_blocks.\1.resnets."),
    *_WAN,
)


def _wan_2_2(keys: Collection[str]) -> dict[str, str]:
    return _renamed(keys, _WAN_2_2)


def _wan_2_1(keys: Collection[str]) -> dict[str, str]:
    # The blocks of all levels of the decoder are in one list; an upsampling ends each level.
    ends = sorted(_numbers(keys, rf"decoder\.upsamples\.(\d+)\.{_RESAMPLE}"))

    def level(found: re.Match[str]) -> str:
        position = int(found[1])
        before = [end for end in ends if end < position]
        block = f"decoder.up_blocks.{len(before)}"
        if position in ends:
            return f"{block}.upsamplers.0."
        return f"{block}.resnets.{position - (before[-1] + 1 if before else 0)}."

    rules = ((r"^encoder\.downsamples\.", "encoder.down_blocks."), *_WAN)
    return {
        key: re.sub(r"^decoder\.upsamples\.(\d+)\.", level, name)
        for key, name in _renamed(keys, rules).items()
    }


def _taesd(keys: Collection[str]) -> dict[str, str]:
    # Before the first layer of the decoder the file counts the clamp of the latents.
    return {
        key: re.sub(
            r"^decoder\.(\d+)\.", lambda found: f"decoder.layers.{int(found[1]) - 1}.", name
        )
        for key, name in _renamed(
            keys, ((r"^taesd_", ""), (r"^encoder\.(\d+)\.", r"encoder.layers.\1."))
        ).items()
    }


def _taesd_part(part: str) -> Callable[[Collection[str]], dict[str, str]]:
    def rename(keys: Collection[str]) -> dict[str, str]:
        found = _taesd([f"{part}.{key}" for key in keys])
        return {key.removeprefix(f"{part}."): name for key, name in found.items()}

    return rename


def _numbers(keys: Iterable[str], pattern: str) -> set[int]:
    matches = (re.match(pattern, key) for key in keys)
    return {int(found[1]) for found in matches if found}


LAYOUTS = (
    Layout("LDM (Stable Diffusion and FLUX)", ("encoder.down.0.block.0.conv1.weight",), _ldm),
    Layout(
        "diffusers",
        ("encoder.conv_in.weight", "encoder.layers.0.weight"),
        _diffusers,
    ),
    Layout("Wan 2.1 and Qwen-Image", ("encoder.downsamples.0.residual.2.weight",), _wan_2_1),
    Layout("Wan 2.2", ("encoder.downsamples.0.downsamples.0.residual.2.weight",), _wan_2_2),
    Layout("TAESD", ("taesd_encoder.0.weight", "encoder.0.weight"), _taesd),
    Layout("the encoder of TAESD", ("0.weight",), _taesd_part("encoder")),
    Layout("the decoder of TAESD", ("1.weight",), _taesd_part("decoder")),
)
"""Every layout that is known. A file has the first of which it has a sign."""
