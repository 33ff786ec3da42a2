"""The networks of Wan 2.1, Wan 2.2 and Qwen-Image for videos, as graphs of frames.

What the layers do in time is built here, not traced: the Python code of diffusers runs through
caches of five axes that no export follows. `checked_graph` holds the result against the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RBLNCompileError
from ..graph.capture import replica
from ..graph.interpreter import run_video
from ..graph.ir import Graph, RMSNorm, Value
from .family import ENCODER
from .networks import means
from .unrolled import Layer, Unrolled, chain, reading_cells

FRAMES_ENCODED = 4
"""Frames that the encoder takes at once after the first, as diffusers does."""

TOLERANCE = 1e-4
"""The most by which a graph may differ from the model, relative to the norm of the result."""


class VideoPart(nn.Module):
    """A part of a model for videos, which builds its graphs.

    Args:
        vae: The diffusers model. It is not changed.
        part: `"encoder"` or `"decoder"`.
    """

    def __init__(self, vae: Any, part: str) -> None:
        super().__init__()
        self._made_of = (vae, part)  # a tuple, since a module takes in the modules it is given

    def graph(self) -> Graph:
        """The graphs, which have been compared with the model."""
        return checked_graph(*self._made_of)


def checked_graph(vae: Any, part: str) -> Graph:
    """The graphs of a part for videos, which have been compared with the model.

    Args:
        vae: The diffusers model. It is not changed.
        part: `"encoder"` or `"decoder"`.

    Raises:
        RBLNCompileError: A layer is not one of diffusers', or the results differ.
    """
    first = _Network(vae, part).build()
    graph = _Network(vae, part, first).build()
    found, expected = _compared(vae, part, graph)
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-6))
    if not error <= TOLERANCE:
        raise RBLNCompileError(
            f"The {part} of this {type(vae).__name__} computes something else than this version "
            f"of rbln-vae knows: on a small video their results differ by {error:.1e}. Check that "
            "the model is one of diffusers' own classes; with rbln_num_frames=1 it is compiled for "
            "images from its own code."
        )
    return graph


def _compared(vae: Any, part: str, graph: Graph) -> tuple[Tensor, Tensor]:
    """The results of the graph and of the model for a small random video."""
    model: Any = replica(vae).float().cpu()
    model.clear_cache()
    generator = torch.Generator().manual_seed(0)
    ratio = 2 ** (len(vae.config.dim_mult) - 1) * (getattr(vae.config, "patch_size", None) or 1)
    frames, side = (1 + 2 * FRAMES_ENCODED, ratio) if part == ENCODER else (3, 1)
    shape = (1, graph.input_channels, frames, 2 * side, 3 * side)
    video = torch.randn(shape, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        results = list(run_video(graph, list(video.unbind(2))))
        if part == ENCODER:
            expected = model.encode(video, return_dict=False)[0].parameters
        else:
            expected = model.decode(video, return_dict=False)[0]
            results = [frame.clamp(-1, 1) for frame in results]
    return torch.stack(results, 2), expected


class _Network(Unrolled):
    """The network of one part, for the first run or for those that follow."""

    def __init__(self, vae: Any, part: str, first: Graph | None = None) -> None:
        config = vae.config
        self.vae = vae
        self.patches = (config.get("patch_size") or 1) > 1
        name = "in_channels" if "in_channels" in config else "input_channels"
        channels = config[name] // (4 if self.patches else 1)
        super().__init__(part, channels if part == ENCODER else config.z_dim, first)

    def build(self) -> Graph:
        if self.part == ENCODER:
            return self.graph(self.encoder(), 1 if self.is_first else FRAMES_ENCODED)
        return self.graph(self.decoder(), 1)

    # The parts

    def encoder(self) -> Layer:
        encoder, path = self.vae.encoder, "encoder"
        first = self.reading_patches if self.patches else self.gathering
        layers = [first(f"{path}.conv_in", encoder.conv_in)]
        for index, block in enumerate(encoder.down_blocks):
            layers.append(self.layer(f"{path}.down_blocks.{index}", block))
        layers += self.middle(f"{path}.mid_block", encoder.mid_block)
        layers.append(self.causal(f"{path}.conv_out", encoder.conv_out, encoder.norm_out, encoder))
        layers.append(self.causal("quant_conv", self.vae.quant_conv))
        return chain(layers)

    def decoder(self) -> Layer:
        decoder, path = self.vae.decoder, "decoder"
        layers = [
            self.causal("post_quant_conv", self.vae.post_quant_conv),
            self.causal(f"{path}.conv_in", decoder.conv_in),
            *self.middle(f"{path}.mid_block", decoder.mid_block),
        ]
        for index, block in enumerate(decoder.up_blocks):
            layers += self.up_block(f"{path}.up_blocks.{index}", block)
        last = self.writing_patches if self.patches else self.adding
        layers.append(last(f"{path}.conv_out", decoder.conv_out, decoder.norm_out, decoder))
        return chain(layers)

    def middle(self, path: str, block: Any) -> list[Layer]:
        layers = [self.layer(f"{path}.resnets.0", block.resnets[0])]
        for index, attention in enumerate(block.attentions):
            layers.append(self.layer(f"{path}.attentions.{index}", attention))
            layers.append(self.layer(f"{path}.resnets.{index + 1}", block.resnets[index + 1]))
        return layers

    def layer(self, path: str, module: nn.Module) -> Layer:
        """Any layer between the first and the last convolution."""
        kinds = {
            "ResidualDownBlock": self.residual_down_block,
            "ResidualBlock": self.residual_block,
            "AttentionBlock": self.attention,
            "Resample": self.resample,
        }
        for name, make in kinds.items():
            if type(module).__name__.endswith(name):
                return make(path, module)
        raise RBLNCompileError(
            f"{path} is a {type(module).__name__}, which this version of rbln-vae doesn't know in "
            "videos. With rbln_num_frames=1 the model is compiled for images."
        )

    # Layers

    def causal(self, path: str, conv: Any, norm: Any = None, activated_by: Any = None) -> Layer:
        """A causal convolution, perhaps after a norm and the activation of a module."""
        before = self.before(path, norm, activated_by)
        return self.over_frames(path, conv.weight, conv.bias, padding=_padding(conv), **before)

    def gathering(self, path: str, conv: Any) -> Layer:
        """A causal convolution of few channels: those of all its frames become one image's.

        A target reads channels in blocks, which so hold all frames instead of one.
        """
        weight = conv.weight
        outputs, inputs, taps, *_ = weight.shape
        gather = torch.eye(taps * inputs).view(-1, taps, inputs).transpose(1, 2)
        gathered = weight.transpose(1, 2).reshape(outputs, taps * inputs, 1, *weight.shape[3:])
        return chain(
            [
                self.over_frames(f"{path}.frames", gather[..., None, None]),
                self.over_frames(path, gathered, conv.bias, padding=_padding(conv)),
            ]
        )

    def adding(self, path: str, conv: Any, norm: Any, activated_by: Any) -> Layer:
        """A causal convolution to few channels, after a norm and the activation of a module.

        Each frame is read once, for all those that it has a part in. The parts are added then,
        and remembered instead of the frame, which has more channels.
        """
        weight = conv.weight
        outputs, inputs, taps, *_ = weight.shape
        parts = weight.movedim(2, 0).reshape(taps * outputs, inputs, 1, *weight.shape[3:])
        add = torch.eye(taps * outputs).view(taps, outputs, -1).movedim(0, 2)
        before = self.before(path, norm, activated_by)
        return chain(
            [
                self.over_frames(path, parts, padding=_padding(conv), **before),
                self.over_frames(f"{path}.sum", add[..., None, None], conv.bias),
            ]
        )

    def reading_patches(self, path: str, conv: Any) -> Layer:
        """A causal convolution of 2x2 patches, which reads the pixels where they are."""
        channels = conv.weight.shape[1]
        if channels % 4:
            raise RBLNCompileError(
                f"{path} takes {channels} channels, which can't be those of patches of 2x2 pixels: "
                "this encoder runs in diffusers neither. Compile the decoder alone, with "
                "rbln_uses_encoder=False or --decoder-only."
            )
        weight = reading_cells(conv.weight, _patches(channels))
        padding = tuple(2 * each for each in _padding(conv))
        return self.over_frames(path, weight, conv.bias, padding=padding, stride=2)

    def writing_patches(self, path: str, conv: Any, norm: Any, activated_by: Any) -> Layer:
        """A causal convolution to 2x2 patches, which writes the pixels where they belong."""
        order = _patches(conv.weight.shape[0]).view(-1, 2, 2).permute(1, 2, 0)
        before = self.before(path, norm, activated_by)
        weight, bias = conv.weight[order], conv.bias[order]
        return self.over_frames(path, weight, bias, padding=_padding(conv), upsample=True, **before)

    def over_frames(
        self, path: str, weight: Tensor, bias: Tensor | None = None, **options: Any
    ) -> Layer:
        """A convolution over frames and those before them, which it remembers."""
        if weight.shape[-3] == 1:
            return lambda frames: self.convolution(path, frames, weight, bias, **options)
        past = self.past(path, weight.shape[-3] - 1)

        def run(frames: Value) -> Value:
            earlier = past.followed_by(self.last(frames, past.length))
            return self.convolution(path, frames, weight, bias, earlier=earlier, **options)

        return run

    def before(self, path: str, norm: Any, activated_by: Any) -> dict[str, Any]:
        """What a convolution does while it reads: a norm, and the activation of a module."""
        if norm is None:
            return {}
        _require_silu(path, activated_by)
        return {"norm": self.norm(f"{path}.norm", norm), "activation": "silu"}

    def norm(self, path: str, layer: Any) -> RMSNorm:
        if isinstance(layer.bias, Tensor):
            raise RBLNCompileError(
                f"{path} is a {type(layer).__name__} with a bias, and no model of diffusers has "
                "one. Check that the model is one of diffusers' own classes."
            )
        return self.pixel_norm(path, layer.gamma)

    def residual_block(self, path: str, block: Any) -> Layer:
        shortcut = chain([])
        if not isinstance(block.conv_shortcut, nn.Identity):
            shortcut = self.causal(f"{path}.conv_shortcut", block.conv_shortcut)
        main = chain(
            [
                self.causal(f"{path}.conv1", block.conv1, block.norm1, block),
                self.causal(f"{path}.conv2", block.conv2, block.norm2, block),
            ]
        )

        def run(frames: Value) -> Value:
            beside = shortcut(frames)
            return self.add(path, main(frames), beside)

        return run

    def attention(self, path: str, block: Any) -> Layer:
        norm = self.norm(f"{path}.norm", block.norm)
        parts = zip(
            ("to_q", "to_k", "to_v"),
            block.to_qkv.weight.chunk(3),
            block.to_qkv.bias.chunk(3),
            strict=True,
        )
        convolutions = [(f"{path}.{name}", w.unsqueeze(2), b) for name, w, b in parts]
        weight, bias = block.proj.weight.unsqueeze(2), block.proj.bias
        scale = weight.shape[0] ** -0.5

        def run(frames: Value) -> Value:
            query, key, value = (
                self.convolution(name, frames, w, b, norm=norm) for name, w, b in convolutions
            )
            mixed = self.mixed(path, query, key, value, scale)
            return self.add(path, self.convolution(f"{path}.proj", mixed, weight, bias), frames)

        return run

    def resample(self, path: str, module: Any) -> Layer:
        up = module.mode.startswith("upsample")
        conv = module.resample[1]
        name, weight = f"{path}.resample.1", conv.weight.unsqueeze(2)

        def in_space(frames: Value) -> Value:
            if up:
                frames = self.upsample(path, frames)
                return self.convolution(name, frames, weight, conv.bias, padding=(1, 1, 1, 1))
            return self.convolution(name, frames, weight, conv.bias, stride=2, padding=(0, 1, 0, 1))

        if module.mode in ("upsample2d", "downsample2d"):
            return in_space
        time_conv = module.time_conv
        time = f"{path}.time_conv"
        if up:
            # The first run leaves out the convolution over time, and doesn't remember the frame.
            past = self.past(time, 2, forgets=True)
            halves = list(zip(time_conv.weight.chunk(2), time_conv.bias.chunk(2), strict=True))

            def double(frames: Value) -> Value:
                earlier = past.followed_by(self.last(frames, past.length))
                if self.is_first:
                    return in_space(frames)
                doubled = [
                    self.convolution(f"{time}.{index}", frames, half, bias, earlier=earlier)
                    for index, (half, bias) in enumerate(halves)
                ]
                return in_space(self.in_turn(time, doubled))

            return double
        past = self.past(time, 1)

        def halve(frames: Value) -> Value:
            halved = in_space(frames)
            earlier = past.followed_by(self.last(halved, past.length))
            if self.is_first:
                return halved
            found = []
            for index in range(0, self.count(halved), 2):
                even, odd = self.unstack(halved, index), self.unstack(halved, index + 1)
                weight, bias = time_conv.weight, time_conv.bias
                window = [*earlier, even]
                found.append(self.convolution(time, odd, weight, bias, earlier=window))
                earlier = [odd]
            return self.stack(time, found)

        return halve

    # The blocks of Wan 2.2, which have a shortcut around all their layers

    def residual_down_block(self, path: str, block: Any) -> Layer:
        layers = [self.layer(f"{path}.resnets.{i}", each) for i, each in enumerate(block.resnets)]
        if block.downsampler is not None:
            layers.append(self.layer(f"{path}.downsampler", block.downsampler))
        main = chain(layers)
        average = block.avg_shortcut
        count, side = average.factor_t, average.factor_s
        matrix = means(average.out_channels, average.in_channels * average.factor)
        weight = matrix.view(-1, average.in_channels, count, side, side)
        name = f"{path}.avg_shortcut"

        def shortcut(frames: Value) -> Value:
            if count == 1:
                return self.convolution(name, frames, weight, stride=side)
            singles = self.last(frames, self.count(frames))
            # Zeros come before the first frame, which is alone.
            ends = range(min(count, len(singles)), len(singles) + 1, count)
            groups = [singles[max(0, end - count) : end] for end in ends]
            made = [
                self.convolution(name, last, weight, earlier=before, stride=side)
                for *before, last in groups
            ]
            return self.stack(name, made)

        def run(frames: Value) -> Value:
            found = main(frames)
            return self.add(path, found, shortcut(frames))

        return run

    def up_block(self, path: str, block: Any) -> list[Layer]:
        layers = [self.layer(f"{path}.resnets.{i}", each) for i, each in enumerate(block.resnets)]
        upsampler = getattr(block, "upsampler", None)
        if getattr(block, "upsamplers", None):
            layers.append(self.layer(f"{path}.upsamplers.0", block.upsamplers[0]))
        elif upsampler is not None:
            layers.append(self.layer(f"{path}.upsampler", upsampler))
        repeat = getattr(block, "avg_shortcut", None)
        if repeat is None:
            return layers
        main = chain(layers)
        elements = torch.arange(repeat.out_channels * repeat.factor) // repeat.repeats
        orders = elements.view(repeat.out_channels, repeat.factor_t, -1).unbind(1)
        copies = [(f"{path}.avg_shortcut.{i}", each.flatten()) for i, each in enumerate(orders)]

        def run(frames: Value) -> Value:
            # Of the copies of a frame, the first run makes the last one.
            own = copies[-1:] if self.is_first else copies
            made = main(frames)
            copied = [self.shuffle(name, frames, order) for name, order in own]
            return self.add(path, made, self.in_turn(f"{path}.avg_shortcut", copied))

        return [run]


def _padding(conv: Any) -> tuple[int, int, int, int]:
    """The padding in space of a causal convolution."""
    left, _, above, *_ = conv._padding
    return (above, above, left, left)


def _patches(channels: int) -> Tensor:
    """Which element of a 2x2 cell each channel of patches is, in the order channel, row, column.

    The channels have the order channel, column, row.
    """
    return torch.arange(channels).view(-1, 2, 2).transpose(1, 2).flatten()


def _require_silu(path: str, module: Any) -> None:
    found = type(module.nonlinearity).__name__
    if found != "SiLU":
        raise RBLNCompileError(
            f"The activation of {path} is {found}, and in videos only SiLU is known. With "
            "rbln_num_frames=1 the model is compiled for images."
        )
