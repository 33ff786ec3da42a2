"""The layouts of single files: from the names of diffusers to those of the authors."""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]


def plain(state: State) -> State:
    return dict(state)


def old(state: State) -> State:
    """As diffusers itself named attention before 0.17."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"to_(q|k|v|out\.0)", lambda found: names[found[0]], name): tensor
        for name, tensor in state.items()
    }


def ldm(state: State, *, matrices: bool = False, own_quant: bool = False) -> State:
    """CompVis's names; attention is made of convolutions there."""
    levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("decoder.up_blocks."))
    written = {}
    for name, tensor in state.items():
        words = name.split(".")
        if words[1] in ("down_blocks", "up_blocks"):
            down, level, what, number = words[1] == "down_blocks", int(words[2]), *words[3:5]
            level = level if down else levels - 1 - level
            what = {
                "resnets": f"block.{number}",
                "attentions": f"attn.{number}",
                "downsamplers": "downsample",
                "upsamplers": "upsample",
            }[what]
            words[1:5] = ["down" if down else "up", str(level), what]
        elif words[1] == "mid_block":
            what = f"block_{int(words[3]) + 1}" if words[2] == "resnets" else "attn_1"
            words[1:4] = ["mid", what]
        key = ".".join(words)
        for new, its in (
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
        ):
            key = key.replace(f".{new}.", f".{its}.")
        if own_quant:
            key = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(words[0], "") + key
        if ".attn" in key and tensor.ndim == 2 and not matrices:
            tensor = tensor[:, :, None, None]
        written[key] = tensor
    return written


def flux2s(state: State) -> State:
    return ldm(state, own_quant=True)


_WAN_NAMES = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "decoder.conv_in": "decoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "decoder.norm_out": "decoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_out": "decoder.head.2",
}
_WAN_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def wans(state: State) -> State:
    """Wan's names: 2.1's, in which the levels of the decoder are one list, and 2.2's."""
    written: State = {}
    lengths: dict[int, int] = {}  # blocks before the upsampling of each level
    for name in state:
        if found := re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            lengths[int(found[1])] = int(found[2]) + 1
    for name, tensor in state.items():
        module, _, weight = name.rpartition(".")
        words = module.split(".")
        if module in _WAN_NAMES:
            module = _WAN_NAMES[module]
        elif words[1] == "mid_block":
            position = 2 * int(words[3]) if words[2] == "resnets" else 1
            rest = ".".join(words[4:])
            module = f"{words[0]}.middle.{position}.{_WAN_BLOCK.get(rest, rest)}"
        elif words[1] == "down_blocks" and words[3] not in ("resnets", "downsampler"):
            rest = ".".join(words[3:])
            module = f"encoder.downsamples.{words[2]}.{_WAN_BLOCK.get(rest, rest)}"
        elif words[1] == "down_blocks":
            last = len({n.split(".")[4] for n in state if n.startswith(f"{'.'.join(words[:3])}.r")})
            number = words[4] if words[3] == "resnets" else str(last)
            rest = ".".join(words[5 if words[3] == "resnets" else 4 :])
            rest = _WAN_BLOCK.get(rest, rest)
            module = f"encoder.downsamples.{words[2]}.downsamples.{number}.{rest}"
        else:
            level = int(words[2])
            block = words[3] == "resnets"
            number = words[4] if block else str(lengths[level])
            if words[3] == "upsampler" or "decoder.up_blocks.0.upsampler.resample.1.bias" in state:
                where = f"decoder.upsamples.{level}.upsamples.{number}"
            else:
                before = sum(lengths[each] + 1 for each in range(level))
                where = f"decoder.upsamples.{before + int(number)}"
            rest = ".".join(words[4 if words[3] == "upsampler" else 5 :])
            module = f"{where}.{_WAN_BLOCK.get(rest, rest)}"
        written[f"{module}.{weight}"] = tensor
    return written


def taesd(state: State, encoder: str = "taesd_encoder.", decoder: str = "taesd_decoder.") -> State:
    written = {}
    for name, tensor in state.items():
        part, _, number, rest = name.split(".", 3)
        offset, prefix = (0, encoder) if part == "encoder" else (1, decoder)
        written[f"{prefix}{int(number) + offset}.{rest}"] = tensor
    return written


def taesds(state: State) -> State:
    return taesd(state, "encoder.", "decoder.")
