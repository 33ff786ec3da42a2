"""The configuration of an autoencoder of diffusers, worked out from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import RBLNCompileError

Shape = tuple[int, ...]
Configs = dict[str, dict[str, Any]]
"""The configuration by the name of the class, for each class that the weights suit."""


class Shapes(dict[str, Shape]):
    """The shape of each weight by its name in diffusers."""

    def __missing__(self, name: str) -> Shape:
        raise RBLNCompileError(f"there is no weight {name}")

    def size(self, name: str, axis: int) -> int:
        """One side of a weight.

        Raises:
            RBLNCompileError: There is no such weight, or its shape is another one's.
        """
        shape = self[name]
        if axis >= len(shape) or shape[axis] == 0:
            raise RBLNCompileError(f"{name} has the shape {shape}")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """How many names there are like this one, where `{}` stands for 0, 1, and so on."""
        found = 0
        while pattern.format(found) in self:
            found += 1
        return found

    def widths(self, pattern: str) -> tuple[int, ...]:
        """Output channels of each weight with a name like this one, as of `count`."""
        return tuple(self.size(pattern.format(i), 0) for i in range(self.count(pattern)))


def find_configs(shapes: Mapping[str, Shape]) -> Configs:
    """Work out which class of diffusers has weights like these, and its configuration.

    What shapes don't tell is left out: constants of latents, the size of images, groups of
    norms. Other settings that leave no trace are taken to be those of the class by default.

    Args:
        shapes: The shape of each weight by its name in diffusers.

    Returns:
        The configuration for each class that the weights suit, the most general class first.

    Raises:
        RBLNCompileError: There is no such class; the message says why, as part of a sentence.
    """
    found = Shapes(shapes)
    if "encoder.layers.0.weight" in found:
        return _tiny(found)
    if "encoder.norm_out.gamma" in found:
        return _wan(found)
    if "encoder.norm_out.weight" in found:
        return _hunyuan(found)
    return _kl(found)


def _kl(shapes: Shapes) -> Configs:
    """`AutoencoderKL` and the classes that have its encoder."""
    down = shapes.widths("encoder.down_blocks.{}.resnets.0.conv1.weight")
    up = shapes.widths("decoder.up_blocks.{}.resnets.0.conv1.weight")
    layers = shapes.count("encoder.down_blocks.0.resnets.{}.conv1.weight")
    latent = shapes.size("decoder.conv_in.weight", 1)
    config: dict[str, Any] = {
        "in_channels": shapes.size("encoder.conv_in.weight", 1),
        "out_channels": shapes.size("decoder.conv_out.weight", 0),
        "down_block_types": _blocks(shapes, "encoder.down_blocks", len(down), "Down", "Encoder"),
        "up_block_types": _blocks(shapes, "decoder.up_blocks", len(up), "Up", "Decoder"),
        "latent_channels": latent,
    }
    if "decoder.condition_encoder.layers.0.weight" in shapes:
        config["down_block_out_channels"] = down
        config["layers_per_down_block"] = layers
        config["up_block_out_channels"] = up[::-1]
        config["layers_per_up_block"] = (
            shapes.count("decoder.up_blocks.0.resnets.{}.conv1.weight") - 1
        )
        return {"AsymmetricAutoencoderKL": config}
    config["block_out_channels"] = down
    config["layers_per_block"] = layers
    config["mid_block_add_attention"] = "encoder.mid_block.attentions.0.to_q.weight" in shapes
    if "quantize.embedding.weight" in shapes:
        spatial = "decoder.conv_norm_out.norm_layer.weight" in shapes
        config["num_vq_embeddings"] = shapes.size("quantize.embedding.weight", 0)
        config["vq_embed_dim"] = shapes.size("quantize.embedding.weight", 1)
        config["norm_type"] = "spatial" if spatial else "group"
        return {"VQModel": config}
    config["use_quant_conv"] = "quant_conv.weight" in shapes
    config["use_post_quant_conv"] = "post_quant_conv.weight" in shapes
    if "bn.running_mean" not in shapes:
        return {"AutoencoderKL": config}
    if up[::-1] != down:
        config["decoder_block_out_channels"] = up[::-1]
    cells = shapes.size("bn.running_mean", 0) // latent
    config["patch_size"] = (math.isqrt(cells),) * 2
    return {"AutoencoderKLFlux2": config}


def _blocks(
    shapes: Shapes, where: str, levels: int, direction: str, network: str
) -> tuple[str, ...]:
    """The class of the block of each level."""
    return tuple(
        f"{'Attn' if shapes.count(f'{where}.{i}.attentions.{{}}.to_q.weight') else ''}"
        f"{direction}{network}Block2D"
        for i in range(levels)
    )


def _wan(shapes: Shapes) -> Configs:
    """`AutoencoderKLWan` and Qwen's classes, which have its network."""
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    widths, blocks, temporal = (_residual_levels if residual else _flat_levels)(shapes)
    base = shapes.size("encoder.conv_in.weight", 0)
    multipliers = [width // base for width in widths]
    if [base * each for each in multipliers] != widths:
        raise RBLNCompileError(f"the levels of the encoder have {widths} channels, of {base}")
    last = f"decoder.up_blocks.{len(widths) - 1}.resnets.0.conv1.weight"
    decoder_base = shapes.size(last, 0) // multipliers[0]
    channels = shapes.size("encoder.conv_in.weight", 1)
    config: dict[str, Any] = {
        "base_dim": base,
        "z_dim": shapes.size("decoder.conv_in.weight", 1),
        "dim_mult": multipliers,
        "num_res_blocks": blocks,
        "temperal_downsample": temporal,
    }
    patch = math.isqrt(channels // 3)
    patch = patch if patch > 1 and 3 * patch**2 == channels else 1
    wide: dict[str, Any] = {
        **config,
        "decoder_base_dim": None if decoder_base == base else decoder_base,
        "is_residual": residual,
        "in_channels": channels,
        "out_channels": shapes.size("decoder.conv_out.weight", 0),
        "patch_size": None if patch == 1 else patch,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": patch * 2 ** (len(widths) - 1),
    }
    if len(shapes["encoder.conv_in.weight"]) == 4:
        return {"AutoencoderKLQwenImage21": wide}
    if residual or decoder_base != base or patch > 1:
        return {"AutoencoderKLWan": wide}
    return {
        "AutoencoderKLWan": wide,
        "AutoencoderKLQwenImage": {**config, "input_channels": channels},
    }


_Levels = tuple[list[int], int, list[bool]]
"""Channels of each level, blocks of a level, and whether each but the last halves the time."""


def _residual_levels(shapes: Shapes) -> _Levels:
    block = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    widths = list(shapes.widths(block))
    temporal = [
        f"encoder.down_blocks.{level}.downsampler.time_conv.weight" in shapes
        for level in range(len(widths) - 1)
    ]
    return widths, shapes.count("encoder.down_blocks.0.resnets.{}.conv1.weight"), temporal


def _flat_levels(shapes: Shapes) -> _Levels:
    """The same where the blocks of all levels are in one list, and a downsampling ends a level."""
    widths: list[int] = []
    temporal: list[bool] = []
    blocks = position = 0
    while True:
        where = f"encoder.down_blocks.{position}"
        if f"{where}.conv1.weight" in shapes:
            if len(widths) == len(temporal):
                widths.append(shapes.size(f"{where}.conv1.weight", 0))
            blocks += not temporal
        elif f"{where}.resample.1.weight" in shapes and len(widths) > len(temporal):
            temporal.append(f"{where}.time_conv.weight" in shapes)
        else:
            break
        position += 1
    if len(widths) != len(temporal) + 1:
        raise RBLNCompileError(f"there is no block {where}")
    return widths, blocks, temporal


def _hunyuan(shapes: Shapes) -> Configs:
    blocks = shapes.count("encoder.down_blocks.{}.conv1.weight")
    widths: list[int] = []
    position = 0
    while (name := f"encoder.down_blocks.{position}.conv1.weight") in shapes:
        widths.append(shapes.size(name, 0))
        position += blocks + 1
    return {
        "AutoencoderKLHunyuanImage": {
            "in_channels": shapes.size("encoder.conv_in.weight", 1),
            "out_channels": shapes.size("decoder.conv_out.weight", 0),
            "latent_channels": shapes.size("decoder.conv_in.weight", 1),
            "block_out_channels": tuple(widths),
            "layers_per_block": blocks,
            "spatial_compression_ratio": 2 ** (len(widths) - 1),
        }
    }


def _tiny(shapes: Shapes) -> Configs:
    encoder, decoder = _stages(shapes, "encoder"), _stages(shapes, "decoder")
    return {
        "AutoencoderTiny": {
            "in_channels": shapes.size("encoder.layers.0.weight", 1),
            "out_channels": shapes.size(decoder[-1][0], 0),
            "latent_channels": shapes.size("decoder.layers.0.weight", 1),
            "encoder_block_out_channels": tuple(shapes.size(n, 0) for n, _ in encoder[:-1]),
            "decoder_block_out_channels": tuple(shapes.size(n, 1) for n, _ in decoder[1:]),
            "num_encoder_blocks": tuple(blocks for _, blocks in encoder[:-1]),
            "num_decoder_blocks": tuple(blocks for _, blocks in decoder[:-1]),
        }
    }


def _stages(shapes: Shapes, part: str) -> list[tuple[str, int]]:
    """The convolutions of a part that stand between blocks, and how many blocks follow each."""
    stages: list[tuple[str, int]] = []
    positions = (int(name.split(".")[2]) for name in shapes if name.startswith(f"{part}.layers."))
    for position in sorted(set(positions)):
        name = f"{part}.layers.{position}.weight"
        if name in shapes:
            stages.append((name, 0))
        elif stages:
            stages[-1] = stages[-1][0], stages[-1][1] + 1
    if len(stages) < 2:
        raise RBLNCompileError(f"there is no {part}")
    return stages
