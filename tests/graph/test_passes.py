"""The passes: each computes what the graph before it computes, and does what its name says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graphs import PARTS, captured, evaluate, kinds, small_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from vaes import capture_part, make_vae, noise

from rbln_vae.graph.ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GroupNorm,
    Identity,
    Modulate,
    Norm,
    Operation,
    Pad,
    PixelNorm,
    RMSNorm,
    Scale,
    Shuffle,
    Upsample,
)
from rbln_vae.graph.passes import (
    PASSES,
    Pass,
    fold_pad,
    fold_scale,
    fold_shuffle,
    fold_upsample,
    fold_value_projection,
    fuse_modulation,
    fuse_norm,
    fuse_output_activation,
    fuse_residual,
    optimise,
)
from rbln_vae.graph.stored import store
from rbln_vae.metrics import relative_l2

EXACT = 5e-6
ONES = (1, 1, 1, 1)
NONE = (0, 0, 0, 0)
by_name = pytest.mark.parametrize("rewrite", PASSES, ids=lambda p: p.__name__)


def before(rewrite: Pass, part: str) -> Graph:
    """The graph of a part as that pass meets it."""
    graph = captured(part)
    for earlier in PASSES[: PASSES.index(rewrite)]:
        graph = earlier(graph)
    return graph


def assert_same(one: Graph, other: Graph, *, size: tuple[int, int] = (6, 10)) -> None:
    image = noise(2, one.input_channels, *size)
    assert relative_l2(evaluate(other, image), evaluate(one, image)) < EXACT


def conv(output: str, reads: str, weight: str = "w3", **changes: Any) -> Conv2d:
    padding = NONE if weight.startswith("w1") else ONES
    return dataclasses.replace(Conv2d(output, reads, weight, None, padding=padding), **changes)


def norm() -> Norm:
    return Norm(2, 1e-6, "scale", "shift")


SHAPES: dict[str, tuple[int, ...]] = {
    "w1": (4, 4, 1, 1),
    "w1_other": (4, 4, 1, 1),
    "w3": (4, 4, 3, 3),
    "bias": (4,),
    "scale": (4,),
    "shift": (4,),
}


def graph(*operations: Operation, **shapes: tuple[int, ...]) -> Graph:
    """A valid graph, with random weights for the names that its operations use."""
    used = {name for operation in operations for name in operation.weights}
    every = {**SHAPES, **shapes}
    return small_graph(*operations, **{name: every[name] for name in sorted(used)}).verify()


# Every pass

ABSENT: dict[Pass, tuple[str, ...]] = {
    fold_upsample: ("encoder",),
    fold_pad: ("decoder",),
    # Other families have these.
    fold_scale: PARTS,
    fold_shuffle: PARTS,
    fuse_modulation: PARTS,
    fuse_output_activation: PARTS,
}
"""The parts of an `AutoencoderKL` that have nothing for a pass."""


@by_name
@pytest.mark.parametrize("part", PARTS)
def test_a_pass_computes_the_same(rewrite: Pass, part: str) -> None:
    original = before(rewrite, part)
    assert_same(original, rewrite(original))


@by_name
@pytest.mark.parametrize("part", PARTS)
def test_a_pass_is_idempotent(rewrite: Pass, part: str) -> None:
    once = rewrite(before(rewrite, part))
    assert store(rewrite(once)) == store(once)


@by_name
@pytest.mark.parametrize("part", PARTS)
def test_a_pass_finds_something_to_do_and_never_adds_work(rewrite: Pass, part: str) -> None:
    original = before(rewrite, part)
    result = rewrite(original)
    assert (result == original) is (part in ABSENT.get(rewrite, ()))
    assert len(result.operations) <= len(original.operations)
    assert result.flops((1, original.input_channels, 16, 16)) <= original.flops(
        (1, original.input_channels, 16, 16)
    )


@by_name
def test_a_pass_does_not_change_its_argument(rewrite: Pass) -> None:
    original = before(rewrite, "decoder")
    text, weights = store(original), {k: v.clone() for k, v in original.weights.items()}
    rewrite(original)
    assert store(original) == text and original.weights.keys() == weights.keys()
    assert all(torch.equal(original.weights[name], weights[name]) for name in weights)


@by_name
def test_a_pass_gives_a_valid_graph_that_keeps_its_interface(rewrite: Pass) -> None:
    original = before(rewrite, "decoder")
    result = rewrite(original).verify()
    for name in ("name", "input", "input_channels", "output_channels"):
        assert getattr(result, name) == getattr(original, name)


@pytest.mark.parametrize("part", PARTS)
def test_the_test_model_would_show_a_missing_attention(part: str) -> None:
    """Else equality before and after would say nothing of the passes on attention."""
    original = optimise(captured(part))
    attention = next(o for o in original.operations if isinstance(o, Attention))
    assert attention.residual is not None
    without = dataclasses.replace(
        original,
        operations=tuple(
            Identity(o.output, attention.residual) if o is attention else o
            for o in original.operations
        ),
    )
    image = noise(1, original.input_channels, 8, 8)
    assert relative_l2(evaluate(without, image), evaluate(original, image)) > 0.05


@pytest.mark.parametrize("part", PARTS)
def test_the_queries_of_the_test_model_tell_pixels_apart(part: str) -> None:
    original = optimise(captured(part))
    flat = tuple(
        dataclasses.replace(o, scale=0.0) if isinstance(o, Attention) else o
        for o in original.operations
    )
    image = noise(1, original.input_channels, 8, 8)
    even = evaluate(dataclasses.replace(original, operations=flat), image)
    assert relative_l2(even, evaluate(original, image)) > 0.01


@pytest.mark.parametrize("part", PARTS)
def test_optimised_parts_are_convolutions_and_attention(part: str) -> None:
    result = optimise(captured(part))
    assert_same(captured(part), result, size=(8, 12))
    assert set(kinds(result)) == {"Attention", "Conv2d"}
    assert kinds(result).count("Attention") == 1


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_attention_in_every_block_is_optimised_too(part: str) -> None:
    vae = make_vae(
        down_block_types=("AttnDownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D",) * 2,
    )
    original = capture_part(vae, part)
    result = optimise(original)
    assert set(kinds(result)) == {"Attention", "Conv2d"}
    assert_same(original, result, size=(4, 6))


def test_the_graph_is_printed_after_each_pass_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = graph(Identity("y", "x"))
    for off in ("", "0"):
        monkeypatch.setenv("RBLN_VAE_DEBUG", off)
        optimise(small)
        assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RBLN_VAE_DEBUG", "1")
    optimise(small)
    printed = capsys.readouterr()
    assert printed.out == ""
    headings = [line for line in printed.err.splitlines() if line.startswith("after ")]
    assert headings == [f"after {rewrite.__name__}:" for rewrite in PASSES]
    assert printed.err.count("graph part(%x: 4 channels)\n  %y = Identity(%x)") == len(PASSES)


# Hand-made graphs that a pass must rewrite (expected kinds) or leave as they are (None)

LEFT = Identity("left", "x")

CASES: dict[str, tuple[Pass, Graph, list[str] | None]] = {
    "the value projection": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1", bias="bias"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other", bias="shift", residual="x"),
        ),
        ["Conv2d", "Attention"],
    ),
    "the value projection without biases": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1", norm=norm(), activation="silu"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other"),
        ),
        ["Conv2d", "Attention"],
    ),
    "several heads": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 2, 0.5),
            conv("y", "a", "w1_other"),
        ),
        None,
    ),
    "attention with a residual before its projection": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5, residual="x"),
            conv("y", "a", "w1_other"),
        ),
        None,
    ),
    "a value that is the query too": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "v", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other"),
        ),
        None,
    ),
    "a value that others read": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other", residual="v"),
        ),
        None,
    ),
    "attention that others read": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other"),
            Add("z", "a", "y"),
        ),
        None,
    ),
    "attention that is its projection's residual": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other", residual="a"),
        ),
        None,
    ),
    "a projection of 3x3": (
        fold_value_projection,
        graph(conv("v", "x", "w1"), Attention("a", "x", "x", "v", 1, 0.5), conv("y", "a", "w3")),
        None,
    ),
    "a projection of a norm": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other", norm=norm()),
        ),
        None,
    ),
    "a projection of an activation": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("y", "a", "w1_other", activation="silu"),
        ),
        None,
    ),
    "one value weight with two projections": (
        fold_value_projection,
        graph(
            conv("v", "x", "w1"),
            Attention("a", "x", "x", "v", 1, 0.5),
            conv("b", "a", "w1_other"),
            conv("v2", "b", "w1"),
            Attention("a2", "b", "b", "v2", 1, 0.5),
            conv("y", "a2", "w1_third"),
            w1_third=(4, 4, 1, 1),
        ),
        ["Conv2d", "Attention", "Conv2d", "Attention"],
    ),
    "enlarging": (fold_upsample, graph(Upsample("u", "x"), conv("y", "u")), ["Conv2d"]),
    "enlarging with bias and residual": (
        fold_upsample,
        graph(
            Upsample("u", "x"),
            conv("r", "u", "w1"),
            Upsample("u2", "x"),
            conv("y", "u2", bias="bias", residual="r"),
        ),
        ["Upsample", "Conv2d", "Conv2d"],
    ),
    "enlarging twice": (
        fold_upsample,
        graph(Upsample("u", "x"), Upsample("u2", "u"), conv("y", "u2")),
        ["Upsample", "Conv2d"],
    ),
    "enlarging that others read": (
        fold_upsample,
        graph(Upsample("u", "x"), conv("c", "u"), Add("y", "u", "c")),
        None,
    ),
    "enlarging before 1x1": (fold_upsample, graph(Upsample("u", "x"), conv("y", "u", "w1")), None),
    "enlarging without padding": (
        fold_upsample,
        graph(Upsample("u", "x"), conv("y", "u", padding=NONE)),
        None,
    ),
    "enlarging with padding on two sides": (
        fold_upsample,
        graph(Upsample("u", "x"), conv("y", "u", padding=(0, 2, 0, 2))),
        None,
    ),
    "enlarging before a stride": (
        fold_upsample,
        graph(Upsample("u", "x"), conv("y", "u", stride=2)),
        None,
    ),
    "enlarging before phases": (
        fold_upsample,
        graph(
            Upsample("u", "x"),
            conv("y", "u", "phases", upsample=True),
            phases=(2, 2, 4, 4, 3, 3),
        ),
        None,
    ),
    "enlarging before a norm": (
        fold_upsample,
        graph(Upsample("u", "x"), conv("y", "u", norm=norm())),
        None,
    ),
    "enlarging before an activation": (
        fold_upsample,
        graph(Upsample("u", "x"), conv("y", "u", activation="silu")),
        None,
    ),
    "a border": (
        fold_pad,
        graph(Pad("p", "x", (0, 1, 0, 1)), conv("y", "p", stride=2, padding=NONE)),
        ["Conv2d"],
    ),
    "a border and padding": (
        fold_pad,
        graph(Pad("p", "x", (0, 1, 2, 3)), conv("y", "p")),
        ["Conv2d"],
    ),
    "a border of a border": (
        fold_pad,
        graph(Pad("p", "x", (0, 1, 2, 3)), Pad("q", "p", ONES), conv("y", "q")),
        ["Conv2d"],
    ),
    "a border that two read": (
        fold_pad,
        graph(Pad("p", "x", ONES), conv("a", "p"), conv("b", "p"), Add("y", "a", "b")),
        ["Conv2d", "Conv2d", "Add"],
    ),
    "a border before a norm": (
        fold_pad,
        graph(Pad("p", "x", ONES), conv("y", "p", norm=norm())),
        None,
    ),
    "a border before an activation": (
        fold_pad,
        graph(Pad("p", "x", ONES), conv("y", "p", activation="silu")),
        None,
    ),
    "a border before enlarging": (
        fold_pad,
        graph(Pad("p", "x", ONES), conv("y", "p", upsample=True)),
        None,
    ),
    "a border that is the output": (fold_pad, graph(Pad("p", "x", ONES)), None),
    "a spatial norm": (
        fuse_modulation,
        graph(
            Upsample("u", "x"),
            Upsample("u2", "u"),
            GroupNorm("n", "u2", norm()),
            conv("scale", "u2", "w1", bias="bias"),
            conv("shift", "u2", "w1_other"),
            Modulate("m", "n", "scale"),
            Add("y", "m", "shift"),
        ),
        ["Upsample", "Upsample", "GroupNorm", "Conv2d", "Conv2d", "Modulate"],
    ),
    "a spatial norm the other way round": (
        fuse_modulation,
        graph(
            conv("scale", "x", "w1"),
            conv("shift", "x", "w1_other"),
            Modulate("m", "x", "scale"),
            Add("y", "shift", "m"),
        ),
        ["Conv2d", "Conv2d", "Modulate"],
    ),
    "a product plus its input": (
        fuse_modulation,
        graph(conv("c", "x"), Modulate("m", "x", "c"), Add("y", "m", "x")),
        ["Conv2d", "Modulate"],
    ),
    "a sum of products": (
        fuse_modulation,
        graph(Modulate("m", "x", "x"), Modulate("n", "m", "m"), Add("y", "m", "n")),
        ["Modulate", "Modulate"],
    ),
    "a product that is added to itself": (
        fuse_modulation,
        graph(Modulate("m", "x", "x"), Add("y", "m", "m")),
        None,
    ),
    "a product that others read": (
        fuse_modulation,
        graph(Modulate("m", "x", "x"), Add("s", "m", "x"), Add("y", "m", "s")),
        None,
    ),
    "a product with a shift": (
        fuse_modulation,
        graph(Modulate("m", "x", "x", "x"), Add("y", "m", "x")),
        None,
    ),
    "a product with a smaller image": (
        fuse_modulation,
        graph(Upsample("u", "x"), Modulate("m", "u", "x"), Add("y", "m", "u")),
        None,
    ),
    "norm before a product": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), Modulate("y", "n", "x")),
        ["Modulate"],
    ),
    "norm before a product with its own": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), Modulate("y", "n", "x", norm=norm())),
        None,
    ),
    "norm of what a product multiplies by": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), Modulate("y", "x", "n")),
        None,
    ),
    "norm of what a product adds": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), Modulate("y", "n", "x", "n")),
        None,
    ),
    "activation before a product": (
        fuse_norm,
        graph(Activation("a", "x", "silu"), Modulate("y", "a", "x")),
        None,
    ),
    "activation of a product": (
        fuse_norm,
        graph(Modulate("m", "x", "x"), Activation("a", "m", "silu"), conv("y", "a")),
        ["Modulate", "Conv2d"],
    ),
    "norm, activation, convolution": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), Activation("a", "n", "mish"), conv("y", "a")),
        ["Conv2d"],
    ),
    "norm before an enlarging convolution": (
        fuse_norm,
        graph(
            GroupNorm("n", "x", norm()),
            conv("y", "n", upsample=True),
        ),
        ["Conv2d"],
    ),
    "norm of three convolutions": (
        fuse_norm,
        graph(
            GroupNorm("n", "x", norm()),
            conv("q", "n", "w1"),
            conv("k", "n", "w1_other"),
            conv("v", "n", "w3"),
            Attention("y", "q", "k", "v", 1, 0.5),
        ),
        ["Conv2d", "Conv2d", "Conv2d", "Attention"],
    ),
    "norm and activation that is the output": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), Activation("a", "n", "relu")),
        None,
    ),
    "activation without a norm": (
        fuse_norm,
        graph(Activation("a", "x", "silu"), conv("y", "a")),
        ["Conv2d"],
    ),
    "activation of an enlarging convolution": (
        fuse_norm,
        graph(
            Activation("a", "x", "gelu"),
            conv("y", "a", upsample=True),
        ),
        ["Conv2d"],
    ),
    "activation of two convolutions": (
        fuse_norm,
        graph(
            Activation("a", "x", "relu"), conv("b", "a", "w1"), conv("c", "a"), Add("y", "b", "c")
        ),
        ["Conv2d", "Conv2d", "Add"],
    ),
    "norm before a convolution with an activation": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), conv("y", "n", activation="mish")),
        ["Conv2d"],
    ),
    "norm that a convolution and an activation of others read": (
        fuse_norm,
        graph(
            GroupNorm("n", "x", norm()),
            Activation("a", "n", "silu"),
            conv("b", "a"),
            conv("c", "n"),
            Add("y", "b", "c"),
        ),
        ["Conv2d", "Conv2d", "Add"],
    ),
    "two activations": (
        fuse_norm,
        graph(Activation("a", "x", "mish"), Activation("b", "a", "silu"), conv("y", "b")),
        ["Activation", "Conv2d"],
    ),
    "activation and then a norm": (
        fuse_norm,
        graph(Activation("a", "x", "mish"), GroupNorm("n", "a", norm()), conv("y", "n")),
        ["Activation", "Conv2d"],
    ),
    "activation that others read": (
        fuse_norm,
        graph(Activation("a", "x", "relu"), conv("c", "a"), Add("y", "a", "c")),
        None,
    ),
    "activation that is the convolution's residual": (
        fuse_norm,
        graph(Activation("a", "x", "relu"), conv("y", "a", residual="a")),
        None,
    ),
    "activation of another convolution's residual": (
        fuse_norm,
        graph(Activation("a", "x", "relu"), conv("b", "x"), conv("y", "b", residual="a")),
        None,
    ),
    "activation before a convolution with its own": (
        fuse_norm,
        graph(Activation("a", "x", "relu"), conv("y", "a", activation="silu")),
        None,
    ),
    "activation before a convolution with a norm": (
        fuse_norm,
        graph(Activation("a", "x", "relu"), conv("y", "a", norm=norm())),
        None,
    ),
    "norm that others read": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), conv("c", "n"), Add("y", "n", "c")),
        None,
    ),
    "norm that an activation and a convolution read": (
        fuse_norm,
        graph(
            GroupNorm("n", "x", norm()), Activation("a", "n", "silu"), conv("y", "a", residual="n")
        ),
        ["GroupNorm", "Conv2d"],
    ),
    "norm that is the convolution's residual": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), conv("y", "n", residual="n")),
        None,
    ),
    "norm before a convolution with its own": (
        fuse_norm,
        graph(GroupNorm("n", "x", norm()), conv("y", "n", norm=norm(), activation="relu")),
        None,
    ),
    "a sum with a convolution": (
        fuse_residual,
        graph(conv("c", "x"), Add("y", "x", "c")),
        ["Conv2d"],
    ),
    "a sum with attention": (
        fuse_residual,
        graph(Attention("a", "x", "x", "x", 2, 0.5), Add("y", "a", "x")),
        ["Attention"],
    ),
    "a sum of two convolutions": (
        fuse_residual,
        graph(conv("a", "x"), conv("b", "x", "w1"), Add("y", "a", "b")),
        ["Conv2d", "Conv2d"],
    ),
    "a sum of sums": (
        fuse_residual,
        graph(conv("a", "x"), Add("s", "a", "x"), conv("b", "s"), Add("y", "s", "b")),
        ["Conv2d", "Conv2d"],
    ),
    "three terms": (
        fuse_residual,
        graph(conv("a", "x"), Add("s", "a", "x"), Add("y", "s", "x")),
        ["Conv2d", "Add"],
    ),
    "a convolution twice": (fuse_residual, graph(conv("a", "x"), Add("y", "a", "a")), None),
    "a convolution that others read": (
        fuse_residual,
        graph(conv("a", "x"), Add("s", "a", "x"), Add("y", "a", "s")),
        None,
    ),
    "a convolution with a residual": (
        fuse_residual,
        graph(conv("a", "x", residual="x"), Add("y", "a", "x")),
        None,
    ),
    "a sum of no convolution": (
        fuse_residual,
        graph(Activation("a", "x", "silu"), Add("y", "a", "x")),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_hand_made(name: str) -> None:
    rewrite, original, expected = CASES[name]
    result = rewrite(original)
    if expected is None:
        assert result == original
    else:
        assert kinds(result) == expected
    assert_same(original, result)
    assert store(rewrite(result)) == store(result)


# What single passes do


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (7, 4)])
def test_folded_enlarging_is_right_at_every_border(size: tuple[int, int]) -> None:
    original = graph(Upsample("u", "x"), conv("y", "u", bias="bias"))
    assert_same(original, fold_upsample(original), size=size)


def test_folded_enlarging_saves_five_ninths() -> None:
    original = graph(Upsample("u", "x"), conv("y", "u"))
    shape = (1, 4, 10, 10)
    assert fold_upsample(original).flops(shape) * 9 == original.flops(shape) * 4


def test_a_folded_projection_saves_a_convolution() -> None:
    original = before(fold_value_projection, "decoder")
    result = fold_value_projection(original)
    assert kinds(original).count("Conv2d") - kinds(result).count("Conv2d") == 1
    shape = (1, 4, 8, 8)
    assert original.flops(shape) - result.flops(shape) == 2 * 16 * 16 * 64


def test_a_shortcut_is_made_before_the_convolution_that_adds_it() -> None:
    original = graph(conv("big", "x"), conv("shortcut", "x", "w1"), Add("y", "shortcut", "big"))
    first, second = fuse_residual(original).operations
    assert (first.output, second.output) == ("shortcut", "y")
    assert isinstance(second, Conv2d) and (second.weight, second.residual) == ("w3", "shortcut")


def test_unused_weights_are_let_go() -> None:
    folded = fold_scale(graph(conv("c", "x"), Scale("y", "c", 2.0)))
    assert set(folded.weights) == {"y.weight", "y.bias"}


def test_a_folded_spatial_norm_multiplies_small_images() -> None:
    original = CASES["a spatial norm"][1]
    result = fuse_modulation(original)
    assert result.flops((1, 4, 4, 4)) * 16 == original.flops((1, 4, 4, 4))


def test_images_doubled_unequally_stay_as_they_are() -> None:
    original = graph(
        Upsample("u", "x"),
        conv("scale", "u", "w1"),
        conv("c", "u"),
        conv("shift", "c", "w1_other"),
        Modulate("m", "c", "scale"),
        Add("y", "m", "shift"),
    )
    result = fuse_modulation(original)
    assert kinds(result) == ["Upsample", "Conv2d", "Conv2d", "Conv2d", "Modulate"]
    assert_same(original, result)


# Random graphs


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Images of four channels made from earlier ones, of one or of twice the size."""
    operations: list[Operation] = []
    sizes = {"x": 0}
    fused = st.fixed_dictionaries(
        {
            "norm": st.sampled_from([None, None, norm()]),
            "activation": st.sampled_from([None, None, "silu"]),
        }
    )

    def source(size: int | None = None) -> str:
        return draw(st.sampled_from([v for v, s in sizes.items() if size in (None, s)]))

    def residual(size: int) -> str | None:
        choices = [v for v, s in sizes.items() if s == size]
        return draw(st.sampled_from([None, *choices]))

    for index in range(draw(st.integers(1, 9))):
        output, reads = f"v{index}", draw(st.sampled_from([source(), list(sizes)[-1]]))
        size = sizes[reads]
        kind = draw(st.integers(0, 10))
        operation: Operation
        if kind == 0:
            operation = Identity(output, reads)
        elif kind == 1:
            operation = Scale(output, reads, draw(st.sampled_from([1.0, 0.5])))
        elif kind == 2:
            operation = Activation(output, reads, draw(st.sampled_from(["silu", "relu"])))
        elif kind == 3:
            operation = GroupNorm(output, reads, norm())
        elif kind == 4:
            operation = Add(output, reads, source(size))
        elif kind == 5 and size < 2:
            operation, size = Upsample(output, reads), size + 1
        elif kind == 6:
            value = source(size)
            heads = draw(st.sampled_from([1, 2]))
            operation = Attention(output, source(size), reads, value, heads, 0.5, residual(size))
        elif kind == 7:
            scale = draw(st.sampled_from([v for v, s in sizes.items() if s <= size]))
            shift = draw(st.sampled_from([None, source(sizes[scale])]))
            operation = Modulate(output, reads, scale, shift, draw(st.sampled_from([None, norm()])))
        elif kind == 8:
            weight = draw(st.sampled_from(["w1", "w1_other"]))
            operation = conv(output, reads, weight, residual=residual(size), **draw(fused))
        else:
            operation = conv(output, reads, residual=residual(size), **draw(fused))
        operations.append(operation)
        sizes[output] = size
    needed = {operations[-1].output}
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
    return graph(*(o for o in operations if o.output in needed))


@settings(max_examples=60)
@given(original=graphs())
def test_every_pass_on_any_graph_computes_the_same(original: Graph) -> None:
    image = noise(1, 4, 3, 4)
    expected = evaluate(original, image, torch.float64)
    rewritten = original
    for rewrite in PASSES:
        for start in (original, rewritten):
            result = rewrite(start)
            difference = (evaluate(result, image, torch.float64) - expected).norm()
            assert difference <= 1e-6 * expected.norm() + 1e-9
        rewritten = result


# Scales


def test_scales_become_one_and_then_a_part_of_the_convolution_before_them() -> None:
    original = graph(conv("c", "x", bias="bias"), Scale("s", "c", 2.0, 1.0), Scale("y", "s", 3.0))
    folded = fold_scale(original)
    assert kinds(folded) == ["Conv2d"]
    assert_same(original, folded)
    alone = fold_scale(graph(Scale("s", "x", 2.0, 1.0), Scale("y", "s", 3.0, -1.0)))
    assert alone.operations == (Scale("y", "x", 6.0, 2.0),)


@pytest.mark.parametrize(
    "operations",
    [
        (conv("c", "x", residual="x"), Scale("y", "c", 2.0)),
        (conv("c", "x", output_activation="relu"), Scale("y", "c", 2.0)),
        (conv("c", "x"), Scale("s", "c", 2.0), Add("y", "c", "s")),
        (Scale("s", "x", 2.0), conv("y", "s")),
    ],
    ids=["a sum", "an activation", "another reader", "before a convolution"],
)
def test_a_scale_of_what_is_no_mere_convolution_stays(operations: tuple[Operation, ...]) -> None:
    original = graph(*operations)
    assert fold_scale(original).operations == original.operations


# Shuffles

ORDER = (2, 0, 3, 1, 1, 1, 0, 2)
"""Of two channels of a doubled image, from four."""


def test_a_convolution_writes_the_pixels_of_a_shuffle() -> None:
    original = graph(conv("c", "x", bias="bias"), Shuffle("y", "c", "up", ORDER))
    folded = fold_shuffle(original)
    assert kinds(folded) == ["Conv2d"]
    assert_same(original, folded)


def test_an_order_of_channels_joins_the_shuffle_after_it() -> None:
    original = graph(
        conv("c", "x", bias="bias"),
        Shuffle("o", "c", "channels", (3, 1, 2, 0)),
        Shuffle("y", "o", "up", ORDER),
    )
    folded = fold_shuffle(original)
    assert kinds(folded) == ["Conv2d"]
    assert_same(original, folded)


def test_an_order_of_channels_joins_a_halving_shuffle_after_it() -> None:
    original = graph(
        Shuffle("o", "x", "channels", (3, 1)), Shuffle("y", "o", "down", (7, 0, 2, 5, 5))
    )
    folded = fold_shuffle(original)
    assert kinds(folded) == ["Shuffle"]
    assert_same(original, folded)


def test_a_convolution_reads_the_pixels_of_cells() -> None:
    original = graph(
        Shuffle("s", "x", "down", tuple(range(16))),
        Shuffle("o", "s", "channels", (5, 15, 0, 5)),
        conv("y", "o", bias="bias", padding=(1, 0, 2, 1)),
    )
    folded = fold_shuffle(original)
    assert kinds(folded) == ["Conv2d"]
    assert folded.operations[0].flops(folded.probe_shapes(), folded.weights) > 0
    assert_same(original, folded, size=(8, 12))


@pytest.mark.parametrize(
    "operations",
    [
        (conv("c", "x", weight="w1"), Shuffle("y", "c", "up", ORDER)),
        (conv("c", "x", stride=2), Shuffle("y", "c", "up", ORDER)),
        (conv("c", "x", residual="x"), Shuffle("y", "c", "up", ORDER)),
        (Shuffle("s", "x", "up", ORDER * 2), conv("y", "s")),
        (Shuffle("s", "x", "down", ORDER[:4]), conv("y", "s", norm=norm())),
    ],
    ids=["1x1", "a stride", "a sum", "doubled before", "a norm between"],
)
def test_a_shuffle_that_no_convolution_can_take_in_stays(
    operations: tuple[Operation, ...],
) -> None:
    original = graph(*operations)
    assert fold_shuffle(original).operations == original.operations


def test_cells_of_many_channels_are_not_read_by_one_kernel() -> None:
    original = graph(
        conv("c", "x", weight="wide"),
        Shuffle("s", "c", "down", tuple(range(36))),
        conv("y", "s", weight="w36"),
        wide=(9, 4, 3, 3),
        w36=(4, 36, 3, 3),
    )
    assert fold_shuffle(original).operations == original.operations


# Norms of pixels, and activations of outputs


def test_a_norm_of_pixels_is_fused_into_every_convolution_that_reads_it() -> None:
    original = graph(
        PixelNorm("n", "x", RMSNorm(1e-6, "scale")),
        conv("a", "n"),
        conv("b", "n"),
        Add("y", "a", "b"),
    )
    fused = fuse_norm(original)
    assert kinds(fused) == ["Conv2d", "Conv2d", "Add"]
    assert_same(original, fused)


def test_an_activation_after_a_sum_is_fused_into_the_convolution_that_adds() -> None:
    original = graph(
        conv("c", "x"), Add("s", "c", "x"), Activation("a", "s", "relu"), conv("d", "a"),
        Add("y", "d", "a"),
    )  # fmt: skip
    result = fuse_output_activation(fuse_residual(fuse_norm(original)))
    assert kinds(result) == ["Conv2d", "Conv2d"]
    first, second = result.operations
    assert isinstance(first, Conv2d) and first.output_activation == "relu"
    assert isinstance(second, Conv2d) and second.residual == "a"
    assert_same(original, result)


def test_an_activation_of_a_value_that_others_read_stays() -> None:
    original = graph(conv("c", "x"), Activation("a", "c", "relu"), Add("y", "a", "c"))
    assert fuse_output_activation(original).operations == original.operations
