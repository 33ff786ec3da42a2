"""Capture: every legal AutoencoderKL becomes a graph; what can't is an error with its place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    SlicedAttnProcessor,
)
from graphs import PARTS, captured, evaluate, kinds
from torch import Tensor, nn
from vaes import capture_part, make_vae, noise, part_of

from rbln_vae.errors import RBLNCompileError
from rbln_vae.graph.capture import capture, replica
from rbln_vae.graph.stored import store
from rbln_vae.metrics import relative_l2

FOUR = (4, 8, 8, 12)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one block": {"block_out_channels": (8,)},
    "four blocks": {"block_out_channels": FOUR},
    "channels that fall": {"block_out_channels": (16, 8)},
    "three layers a block": {"layers_per_block": 3, "block_out_channels": (8,)},
    "one group": {"norm_num_groups": 1},
    "a group for each channel": {"norm_num_groups": 8, "block_out_channels": (8, 8)},
    "16 latent channels": {"latent_channels": 16},
    "one latent channel": {"latent_channels": 1},
    "grey images": {"in_channels": 1, "out_channels": 1},
    "other channels out than in": {"in_channels": 5, "out_channels": 2},
    "gelu": {"act_fn": "gelu"},
    "mish": {"act_fn": "mish"},
    "relu": {"act_fn": "relu"},
    "swish": {"act_fn": "swish"},
    "no quant_conv": {"use_quant_conv": False},
    "no post_quant_conv": {"use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "attention in the blocks": {
        "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    },
    "attention in the last blocks alone": {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "mid_block_add_attention": False,
    },
}


# Each takes a second; those that differ from others by a number alone run with the slow tests.
ALIKE = ("one group", "16 latent channels", "channels that fall", "gelu", "mish", "swish")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in CONFIGURATIONS],
)
def test_every_legal_model_is_captured_as_diffusers_computes_it(name: str, part: str) -> None:
    vae = make_vae(**CONFIGURATIONS[name])
    graph = capture_part(vae, part)
    channels = vae.config.in_channels if part == "encoder" else vae.config.latent_channels
    image = noise(2, channels, 24, 16) if part == "encoder" else noise(2, channels, 3, 5)
    assert (graph.name, graph.input_channels) == (part, channels)
    assert relative_l2(evaluate(graph, image), part_of(vae, part, image)) < 2e-6


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("encoder", torch.float16), ("decoder", torch.bfloat16), ("decoder", torch.float64)],
)
def test_weights_of_any_precision_are_captured_as_float32(part: str, dtype: torch.dtype) -> None:
    vae = make_vae(block_out_channels=(8,)).to(dtype)
    graph = capture_part(vae, part)
    assert {weight.dtype for weight in graph.weights.values()} == {torch.float32}
    stored = vae.state_dict()
    for name, weight in graph.weights.items():  # a layer over channels is a 1x1 convolution
        assert torch.equal(weight.flatten(), stored[name].float().flatten())
    image = noise(1, graph.input_channels, 8, 8)
    expected = part_of(vae.float(), part, image)
    assert relative_l2(evaluate(graph, image), expected) < 2e-6


class ModuleProcessor(nn.Module):
    """The default of diffusers as a module, which attention then has as a submodule."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return AttnProcessor()(*arguments, **options)


def sliced(vae: Any) -> None:
    vae.set_attn_processor(SlicedAttnProcessor(slice_size=2))


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "AttnProcessor": lambda vae: vae.set_attn_processor(AttnProcessor()),
    "SlicedAttnProcessor": sliced,
    "a module": lambda vae: vae.set_attn_processor(ModuleProcessor()),
    "fused projections": lambda vae: vae.fuse_qkv_projections(),
    "the default of diffusers": lambda vae: vae.set_default_attn_processor(),
    "slices, tiles, channels last": lambda vae: (
        vae.enable_slicing(),
        vae.enable_tiling(),
        vae.to(memory_format=torch.channels_last),
        vae.requires_grad_(False),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_how_the_model_was_to_run_makes_no_difference(name: str) -> None:
    vae = make_vae()
    PROCESSORS[name](vae)
    graph = capture_part(vae, "decoder")
    assert store(graph) == store(captured("decoder"))
    for weight, expected in zip(
        graph.weights.values(), captured("decoder").weights.values(), strict=True
    ):
        assert torch.equal(weight, expected)


def test_fused_projections_are_captured_as_diffusers_runs_them() -> None:
    vae = make_vae(block_out_channels=(8,))
    vae.fuse_qkv_projections()
    assert vae.decoder.mid_block.attentions[0].fused_projections
    image = noise(1, 4, 5, 6)
    graph = capture_part(vae, "decoder")
    assert relative_l2(evaluate(graph, image), part_of(vae, "decoder", image)) < 2e-6


@pytest.mark.parametrize("part", PARTS)
def test_the_model_is_not_changed(part: str) -> None:
    vae = make_vae()
    vae.set_attn_processor(SlicedAttnProcessor(2))
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    processors, versions = dict(vae.attn_processors), [p._version for p in vae.parameters()]
    gradients = [p.requires_grad for p in vae.parameters()]
    capture_part(vae, part)
    after = vae.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert [p._version for p in vae.parameters()] == versions
    assert [p.requires_grad for p in vae.parameters()] == gradients
    assert vae.attn_processors.keys() == processors.keys()
    assert all(vae.attn_processors[name] is p for name, p in processors.items())
    assert all(p.grad is None for p in vae.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training: bool) -> None:
    vae = make_vae().train(training)
    graph = capture_part(vae, "decoder")  # its dropout has probability 0
    assert all(module.training is training for module in vae.modules())
    assert evaluate(graph, noise(1, 4, 4, 4)).isfinite().all()


def test_the_model_is_not_changed_when_capture_fails() -> None:
    vae = make_vae()
    processor = SlicedAttnProcessor(2)
    vae.set_attn_processor(processor)
    vae.decoder.conv_out = nn.Sequential(vae.decoder.conv_out, nn.Sigmoid())
    where = r"'sigmoid' in 'decoder\.conv_out\.1' of the decoder"
    with pytest.raises(RBLNCompileError, match=where):
        capture_part(vae, "decoder")
    assert all(p is processor for p in vae.attn_processors.values())


def test_the_graph_shares_no_memory_with_the_model() -> None:
    vae = make_vae()
    graph = capture_part(vae, "decoder")
    memory = {weight.untyped_storage().data_ptr() for weight in vae.state_dict().values()}
    assert not memory & {w.untyped_storage().data_ptr() for w in graph.weights.values()}
    image = noise(1, 4, 4, 4)
    before = evaluate(graph, image)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert torch.equal(evaluate(graph, image), before)


def test_weights_keep_their_names_and_are_contiguous() -> None:
    for part in PARTS:
        graph = captured(part)
        names = make_vae().state_dict().keys()
        assert graph.weights.keys() == {
            n
            for n in names
            if part in n or n.startswith("quant" if part == "encoder" else "post_quant")
        }
        assert all(w.is_contiguous() and not w.requires_grad for w in graph.weights.values())


def test_capture_draws_nothing_from_the_global_generator() -> None:
    vae = make_vae()
    state = torch.random.get_rng_state()
    capture_part(vae, "decoder")
    assert torch.equal(torch.random.get_rng_state(), state)


# Modules of one's own


def test_a_module_can_run_while_it_is_captured() -> None:
    module = Within(nn.Conv2d(4, 4, 3, padding=1))
    image, capturing, seen = noise(1, 4, 5, 6), threading.current_thread(), []
    expected = module(image)

    def look(*_: Any) -> None:
        if threading.current_thread() is capturing:
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(module, image).result())

    module.inside.register_forward_hook(look)
    graph = capture(module, "own", 4)
    assert seen
    assert all(torch.equal(found, expected) for found in seen)
    assert relative_l2(evaluate(graph, image), expected.detach()) < 2e-6


def test_a_replica_has_modules_of_its_own_and_shares_the_weights() -> None:
    module = Within(nn.BatchNorm2d(4))
    other = replica(module)
    assert not set(other.modules()) & set(module.modules())
    own, shared = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (other, module))
    assert own.keys() == shared.keys()
    assert all(own[name] is weight for name, weight in shared.items())


def test_a_module_that_cannot_be_copied_is_an_error_that_says_why() -> None:
    module = Within(nn.Conv2d(4, 4, 1))
    module.inside.busy = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(RBLNCompileError, match=r"Within can't be copied: .*lock.*Remove the hooks"):
        capture(module, "own", 4)


class Call(nn.Module):
    """A module that does what a function says."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)
        self.weight = nn.Parameter(noise(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


class Within(nn.Module):
    """A module inside another, under a name that errors must give."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, 4, 1)
        self.inside = module

    def forward(self, x: Tensor) -> Any:
        return self.inside(self.before(x))


class OverFrames(nn.Module):
    """What a module does with the images of a batch as the frames of a clip."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        clip = x[None, :].reshape(1, *x.shape).permute(0, 2, 1, 3, 4)
        found: Tensor = self.module(clip)
        return found.permute(0, 2, 1, 3, 4).reshape(len(x), -1, *found.shape[3:])


class PixelNorms(nn.Module):
    """An RMS norm over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        return F.rms_norm(pixels, self.weight.shape, self.weight, 1e-6).permute(0, 3, 1, 2)


class Ordered(nn.Module):
    """Channels in another order."""

    order: Tensor

    def __init__(self, order: tuple[int, ...], axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.order)


class Attends(nn.Module):
    """A fair copy of attention, with what a processor may ask of torch besides."""

    def __init__(self, heads: int = 1, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = heads, options

    def forward(self, x: Tensor) -> Tensor:
        split = (x.shape[0], -1, self.heads, 4 // self.heads)
        rows = x.flatten(2).transpose(1, 2).reshape(split).transpose(1, 2)
        result = F.scaled_dot_product_attention(rows, rows, rows, **self.options)
        return result.transpose(1, 2).reshape(x.shape[0], -1, 4).transpose(1, 2).reshape(x.shape)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "another activation": (nn.Sigmoid(), "'sigmoid'"),
    "an activation in place": (nn.SiLU(inplace=True), "'silu_'"),
    "gelu by an approximation": (nn.GELU("tanh"), "exact gelu"),
    "a transposed convolution": (nn.ConvTranspose2d(4, 4, 2), "conv_transpose2d"),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
    "dilation": (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
    "unequal strides": (nn.Conv2d(4, 4, 3, stride=(1, 2)), "stride"),
    "padding by name": (nn.Conv2d(4, 4, 3, padding="same"), "padding given by name"),
    "reflected borders": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "'reflect'"),
    "padding with ones": (nn.ConstantPad2d(1, 1.0), "only 0 is supported"),
    "cropping": (nn.ZeroPad2d(-1), "negative padding"),
    "padding of channels": (
        Call(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))),
        "only height and width",
    ),
    "batch norm": (nn.BatchNorm2d(4).eval(), "batch_norm"),
    "group norm without weights": (nn.GroupNorm(2, 4, affine=False), "expected a weight"),
    "dropout in training": (nn.Dropout(0.5).train(), "dropout of a model in training"),
    "tripling": (nn.Upsample(scale_factor=3.0), "only doubling"),
    "smooth enlarging": (nn.Upsample(scale_factor=2.0, mode="bilinear"), "bilinear"),
    "average pooling": (nn.AvgPool2d(2), "avg_pool2d"),
    "concatenation": (Call(lambda x: torch.cat([x, x], 1)), "'cat'"),
    "a slice": (Call(lambda x: x[:, :2]), "'slice'"),
    "addition of a weight": (
        Call(lambda x, norm: x + norm.weight.unsqueeze(1).unsqueeze(2), nn.GroupNorm(1, 4)),
        "'unsqueeze: an axis added at 1",
    ),
    "addition of infinity": (Call(lambda x: x + float("inf")), "addition of inf"),
    "subtraction of an image": (Call(lambda x: x - x), "only subtraction of a number"),
    "an RMS norm over columns": (
        Call(lambda x, norm: norm(x), nn.RMSNorm(64 * 251)),
        "over the last of axes (n, c, h, w)",
    ),
    "an RMS norm without weights": (
        Call(lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (4,), eps=1e-6).permute(0, 3, 1, 2)),
        "expected a weight",
    ),
    "a shuffle of cells of 4x4": (Call(lambda x: F.pixel_unshuffle(x, 4)), "a shuffle by 4"),
    "rows in another order": (Ordered((1, 0), axis=2), "along axis 2"),
    "a weighted addition": (
        Call(lambda x: torch.add(x, x, alpha=2)),
        "alpha 2",
    ),
    "a product with a weight": (
        Call(lambda x, m: x * m.bias, nn.Linear(1, 64 * 251)),
        "expected a computed tensor",
    ),
    "a product of images that lie otherwise": (
        Call(lambda x: F.pad(x, (0, 0, 0, 640)) * F.pad(x, (0, 0, 0, 640)).transpose(2, 3)),
        "axes (n, c, w, h)",
    ),
    "a product of images in rows": (Call(lambda x: x.flatten(2) * x.flatten(2)), "axes (n, c, hw)"),
    "a product of images of two sizes": (
        Call(lambda x, m: x * m(x), nn.Conv2d(4, 1, 1)),
        "a product of (2, 4, 15424, 16064) and (2, 1, 15424, 16064)",
    ),
    "enlarging in one direction": (nn.Upsample(scale_factor=(2.0, 4.0)), "only doubling"),
    "shrinking": (nn.Upsample(scale_factor=0.5), "only doubling"),
    "a quotient of images": (Call(lambda x: x / x), "division by a number"),
    "division by zero": (Call(lambda x: x / 0), "division by a number not zero"),
    "multiplication by infinity": (Call(lambda x: x * float("inf")), "inf"),
    "a broadcast": (Call(lambda x: x + x.mean((2, 3), keepdim=True)), "'mean'"),
    "rounding to whole numbers": (Call(lambda x: x.to(torch.int32).to(torch.float32)), "int32"),
    "a view that mixes channels and pixels": (
        Call(lambda x: x.permute(0, 2, 3, 1).reshape(x.shape)),
        "(n, h, w, c) viewed as",
    ),
    "height and width exchanged by a view": (
        Call(lambda x: x.view(*x.shape[:2], x.shape[3], x.shape[2])),
        "(n, c, h, w) viewed as",
    ),
    "images mixed over the batch": (Call(lambda x: x.reshape(1, -1, *x.shape[2:])), "viewed as"),
    "a convolution of an image that is turned": (
        Call(lambda x, conv: conv(x.transpose(2, 3)), nn.Conv2d(4, 4, 3)),
        "axes (n, c, w, h)",
    ),
    "a layer over columns": (
        Call(lambda x, layer: layer(x), nn.Linear(64 * 251, 4)),
        "axes (n, c, h, w)",
    ),
    "two arrangements in one sum": (
        Call(lambda x: F.pad(x, (0, 0, 0, 640)) + F.pad(x, (0, 0, 0, 640)).transpose(2, 3)),
        "a sum of",
    ),
    "attention over channels": (
        Call(lambda x: F.scaled_dot_product_attention(*[x.view(2, 2, 2, -1)] * 3).view(x.shape)),
        "viewed as",
    ),
    "random numbers": (Call(lambda x: x + torch.randn_like(x)), "'randn_like'"),
    "attention with a mask": (
        Attends(attn_mask=torch.zeros((1, 1, 1, 1))),
        "attention with a mask",
    ),
    "a kernel of two frames": (
        OverFrames(nn.Conv3d(4, 4, (2, 1, 1))),
        "a kernel of 2 frames with 0 of padding",
    ),
    "a stride over frames": (
        OverFrames(nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))),
        "only dilation and stride 1",
    ),
    "causal attention": (Attends(is_causal=True), "causal"),
    "attention with dropout": (Attends(dropout_p=0.5), "dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_named_with_its_place(name: str) -> None:
    module, what = REFUSED[name]
    with pytest.raises(RBLNCompileError) as caught:
        capture(Within(module), "decoder", 4)
    message = str(caught.value)
    assert what in message
    assert "'inside" in message and "of the decoder" in message
    assert "Supported are: " in message or "no valid graph" in message


def test_an_operation_at_the_top_is_in_the_module_itself() -> None:
    with pytest.raises(RBLNCompileError, match="'sigmoid' in 'the module itself' of the thing"):
        capture(Call(torch.sigmoid), "thing", 4)


WHOLE: dict[str, tuple[nn.Module, str]] = {
    "a choice that depends on values": (
        Call(lambda x: x if x.sum() > 0 else -x),
        "can't be exported as one graph",
    ),
    "a loop that depends on values": (
        Call(lambda x: next(x for _ in range(int(x.sum())))),
        "can't be exported",
    ),
    "an error of its own": (Call(lambda x: x.no_such_method()), "no_such_method"),
    "a kernel for other channels": (nn.Conv2d(3, 3, 1), "can't be exported"),
    "two images": (Call(lambda x: (F.silu(x), F.relu(x))), "gives 2 results"),
    "no image": (Call(lambda x: None), "one image"),
    "a number": (Call(lambda x: 3), "one image"),
    "a weight": (Call(lambda x, m: m.weight, nn.Conv2d(4, 4, 1)), "one image"),
    "pixels in a row": (Call(lambda x: x.flatten(2)), r"gives \(n, c, hw\)"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_module_that_gives_no_single_image_of_each_image_is_refused(name: str) -> None:
    module, message = WHOLE[name]
    with pytest.raises(RBLNCompileError, match=message):
        capture(module, "decoder", 4)


def test_an_error_of_export_is_the_cause() -> None:
    with pytest.raises(RBLNCompileError) as caught:
        capture(nn.Conv2d(3, 3, 1), "part", 4)
    assert caught.value.__cause__ is not None


def rows(x: Tensor) -> Tensor:
    """The pixels of an image in a row, channels last."""
    return x.flatten(2).transpose(1, 2)


def unrowed(rows: Tensor, like: Tensor) -> Tensor:
    return rows.transpose(1, 2).reshape(like.shape[0], -1, *like.shape[2:])


EXPRESSED: dict[str, tuple[nn.Module, list[str]]] = {
    "nothing": (Call(lambda x: x), []),
    "halving": (Call(lambda x: x / 2), ["Scale"]),
    "doubling of values": (Call(lambda x: x * 2), ["Scale"]),
    "a product of images": (Call(lambda x: F.silu(x) * x), ["Activation", "Modulate"]),
    "an image enlarged by one": (nn.Upsample(scale_factor=1.0), []),
    "an image enlarged by eight": (nn.Upsample(scale_factor=8.0), ["Upsample"] * 3),
    "a factor of one": (Call(lambda x: x * 1 / 1.0), []),
    "a factor that is nearly one": (Call(lambda x: x * (1 + 1e-7)), ["Scale"]),
    "a clone": (Call(lambda x: x.clone()), []),
    "a cast": (Call(lambda x: x.to(torch.float64).float()), []),
    "a permutation of two axes": (Call(lambda x: x.permute(0, 1, 3, 2).permute(0, 1, 3, 2)), []),
    "a permutation of none": (Call(lambda x: x.permute(0, 1, 2, 3)), []),
    "height and width exchanged for a while": (
        Call(lambda x: F.silu(x.transpose(2, 3)).transpose(2, 3)),
        ["Activation"],
    ),
    "channels last for a while": (
        Call(lambda x: F.silu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        ["Activation"],
    ),
    "pixels in a row for a while": (
        Call(lambda x: F.silu(x.flatten(2)).reshape(x.shape)),
        ["Activation"],
    ),
    "a norm of pixels in a row": (
        Call(lambda x, norm: norm(x.flatten(2)).view(x.shape), nn.GroupNorm(2, 4)),
        ["GroupNorm"],
    ),
    "a layer over channels": (
        Call(lambda x, layer: unrowed(layer(rows(x)), x), nn.Linear(4, 8)),
        ["Conv2d"],
    ),
    "a sum of pixels in a row": (
        Call(lambda x, layer: unrowed(rows(x) + layer(rows(x)), x), nn.Linear(4, 4)),
        ["Conv2d", "Add"],
    ),
    "dropout at rest": (nn.Dropout(0.5).eval(), []),
    "enlarging": (nn.Upsample(scale_factor=2.0), ["Upsample"]),
    "zeros around": (nn.ZeroPad2d((1, 2, 3, 4)), ["Pad"]),
    "a border on two sides": (Call(lambda x: F.pad(x, (0, 1, 0, 1))), ["Pad"]),
    "an oblong kernel": (nn.Conv2d(4, 6, (1, 3), padding=(2, 1), bias=False), ["Conv2d"]),
    "a stride": (nn.Conv2d(4, 6, 2, stride=2), ["Conv2d"]),
    "group norm": (nn.GroupNorm(2, 4, eps=1e-3), ["GroupNorm"]),
    "an affine function": (Call(lambda x: (x + 1) / 2 - 3), ["Scale", "Scale", "Scale"]),
    "tanh": (nn.Tanh(), ["Activation"]),
    "an RMS norm of pixels": (PixelNorms(4), ["PixelNorm"]),
    "cells to channels": (nn.PixelUnshuffle(2), ["Shuffle"]),
    "channels to cells": (nn.PixelShuffle(2), ["Shuffle"]),
    "channels in another order": (Ordered((2, 0, 0, 3, 1)), ["Shuffle"]),
    "attention scaled by hand": (Attends(scale=0.1), ["Attention"]),
    "attention with two heads": (Attends(heads=2), ["Attention"]),
    "a convolution over frames": (
        OverFrames(nn.Conv3d(4, 5, (3, 1, 1), padding=(1, 0, 0))),
        ["Conv2d"],
    ),
    "one over frames and pixels": (OverFrames(nn.Conv3d(4, 5, 3, padding=1)), ["Conv2d"]),
    "one of each frame": (OverFrames(nn.Conv3d(4, 5, (1, 3, 2))), ["Conv2d"]),
    "a norm over frames": (OverFrames(nn.GroupNorm(2, 4, eps=1e-3)), ["GroupNorm"]),
    "what is not used": (Call(lambda x: (torch.tanh, F.silu(x))[1]), ["Activation"]),
}


@pytest.mark.parametrize("name", EXPRESSED)
def test_modules_of_other_kinds_are_captured(name: str) -> None:
    module, expected = EXPRESSED[name]
    graph = capture(module, "part", 4)
    assert kinds(graph) == expected
    image = noise(2, 4, 6, 10)
    with torch.no_grad():
        assert relative_l2(evaluate(graph, image), module(image)) < 1e-6


def test_what_reaches_no_result_is_left_out() -> None:
    def idle(x: Tensor, one: nn.Module, two: nn.Module) -> Tensor:
        one(x)
        return two(x)

    graph = capture(Call(idle, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), "part", 4)
    assert kinds(graph) == ["Conv2d"]
    assert set(graph.weights) == {"parts.1.weight", "parts.1.bias"}


def test_a_module_used_twice_keeps_one_weight_and_two_values() -> None:
    graph = capture(Call(lambda x, m: m(m(x)), nn.Conv2d(4, 4, 1)), "part", 4)
    assert [o.output for o in graph.operations] == ["parts.0", "parts.0:2"]
    assert set(graph.weights) == {"parts.0.weight", "parts.0.bias"}


def test_a_weight_that_is_a_buffer_is_captured() -> None:
    module = nn.Conv2d(4, 4, 1)
    weight = module.weight.detach().clone()
    del module.weight
    module.register_buffer("weight", weight)
    assert torch.equal(capture(module, "part", 4).weights["weight"], weight)


def test_a_wide_channel_count_is_not_taken_for_a_size() -> None:
    """241 is the odd part of the height that modules are exported at."""
    vae = make_vae(block_out_channels=(241,), norm_num_groups=1, latent_channels=2)
    graph = capture_part(vae, "decoder")
    image = noise(1, 2, 2, 3)
    assert relative_l2(evaluate(graph, image), part_of(vae, "decoder", image)) < 5e-6
