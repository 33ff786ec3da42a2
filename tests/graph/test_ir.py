"""The representation: its rules, and what shapes follow from it."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from graphs import (
    PARTS,
    captured,
    evaluate,
    graph_of_every_kind,
    random_weights,
    small_graph,
)
from hypothesis import given
from hypothesis import strategies as st
from vaes import capture_part, make_vae, noise

from rbln_vae.graph import capture as capture_module
from rbln_vae.graph.ir import (
    ACTIVATIONS,
    KNOWN_SHAPES,
    OPERATIONS,
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GraphError,
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
from rbln_vae.graph.stored import store

NORM = Norm(2, 1e-6, "scale", "shift")
SHAPES = {"scale": (4,), "shift": (4,)}


def changed(item: Any, **changes: Any) -> Any:
    return dataclasses.replace(item, **changes)


# The rules


def test_the_graph_of_every_kind_holds_every_kind_and_is_valid() -> None:
    graph = graph_of_every_kind()
    assert {operation.kind for operation in graph.operations} == set(OPERATIONS)
    assert graph.verify() is graph


def test_an_empty_graph_returns_its_input() -> None:
    assert small_graph().verify().output_channels == 4


def conv(output: str = "y", reads: str = "x", **changes: Any) -> Conv2d:
    return changed(Conv2d(output, reads, "weight", None), **changes)


BROKEN: dict[str, tuple[Graph, str]] = {
    "a value made twice": (
        small_graph(Identity("y", "x"), Scale("y", "x", 2.0)),
        "'y' is made twice",
    ),
    "the input made again": (small_graph(Identity("x", "x")), "'x' is made twice"),
    "a value read before it is made": (
        small_graph(Identity("y", "z"), Identity("z", "x"), Add("s", "y", "z")),
        "Identity reads 'z' before it is made",
    ),
    "a residual read before it is made": (
        small_graph(conv(residual="z"), weight=(4, 4, 1, 1)),
        "Conv2d reads 'z' before it is made",
    ),
    "an operation that reads itself": (small_graph(Identity("y", "y")), "before it is made"),
    "an output that is never made": (
        changed(small_graph(Identity("y", "x")), outputs=("z",)),
        "output 'z' is never made",
    ),
    "a value made for nothing": (
        small_graph(Identity("idle", "x"), Identity("y", "x")),
        "made for nothing: ['idle']",
    ),
    "a value made after the output": (
        changed(small_graph(Identity("y", "x"), Identity("z", "y")), outputs=("y",)),
        "made for nothing: ['z']",
    ),
    "a weight that is missing": (small_graph(conv()), "weight 'weight' is missing"),
    "a bias that is missing": (
        small_graph(conv(bias="bias"), weight=(4, 4, 1, 1)),
        "weight 'bias' is missing",
    ),
    "a weight that nothing uses": (
        small_graph(Identity("y", "x"), spare=(1,)),
        "weights that no operation uses: ['spare']",
    ),
    "a kernel of three axes": (small_graph(conv(), weight=(4, 4, 1)), "not four axes"),
    "a kernel of no height": (small_graph(conv(), weight=(4, 4, 0, 1)), "empty"),
    "a kernel of no channels": (small_graph(conv(), weight=(0, 4, 1, 1)), "empty"),
    "a kernel for other channels": (
        small_graph(conv(), weight=(4, 5, 1, 1)),
        "4 channels meet a kernel for 5",
    ),
    "a kernel larger than any image": (
        small_graph(conv(), weight=(1, 4, 1, 5121)),
        "too small for a 1x5121 kernel",
    ),
    "a bias of another length": (
        small_graph(conv(bias="bias"), weight=(4, 4, 1, 1), bias=(5,)),
        "weight 'bias' has shape (5,), its operation needs (4,)",
    ),
    "a kernel for one frame of a clip": (
        small_graph(conv(over_clip=True), weight=(4, 4, 1, 1)),
        "4 channels of 3 frames meet a kernel for 4",
    ),
    "a clip of frames that are left out": (
        small_graph(conv(over_clip=True, left_out=1), weight=(4, 16, 1, 1)),
        "over a clip reads frames of other inputs",
    ),
    "a stride of 0": (small_graph(conv(stride=0), weight=(4, 4, 1, 1)), "stride 0"),
    "negative padding": (
        small_graph(conv(padding=(0, 0, -1, 0)), weight=(4, 4, 1, 1)),
        "padding (0, 0, -1, 0)",
    ),
    "two paddings": (small_graph(conv(padding=(1, 1)), weight=(4, 4, 1, 1)), "padding (1, 1)"),
    "a residual of another shape": (
        small_graph(conv(stride=2, residual="x"), weight=(4, 4, 1, 1)),
        "residual 'x' is (3, 4, 4096, 5120), not (3, 4, 2048, 2560)",
    ),
    "upsampling by 2x2": (
        small_graph(conv(upsample=True, padding=(1, 1, 1, 1)), weight=(2, 2, 4, 4, 2, 2)),
        "not one kernel of 3x3 or 2x2 of them",
    ),
    "three phases": (
        small_graph(conv(upsample=True, padding=(1, 1, 1, 1)), weight=(1, 3, 4, 4, 3, 3)),
        "not one kernel of 3x3 or 2x2 of them",
    ),
    "a bias for each phase of a doubled image": (
        small_graph(
            conv(bias="bias", upsample=True, padding=(1, 1, 1, 1)),
            weight=(4, 4, 3, 3),
            bias=(2, 2, 4),
        ),
        "weight 'bias' has shape (2, 2, 4), its operation needs (4,)",
    ),
    "phases of 3x3 with one bias": (
        small_graph(
            conv(bias="bias", upsample=True, padding=(1, 1, 1, 1)),
            weight=(2, 2, 4, 4, 3, 3),
            bias=(4,),
        ),
        "weight 'bias' has shape (4,), its operation needs (2, 2, 4)",
    ),
    "upsampling without padding": (
        small_graph(conv(upsample=True), weight=(4, 4, 3, 3)),
        "needs stride 1 and padding 1",
    ),
    "upsampling with a stride": (
        small_graph(conv(upsample=True, padding=(1, 1, 1, 1), stride=2), weight=(4, 4, 3, 3)),
        "needs stride 1 and padding 1",
    ),
    "groups that don't divide the channels": (
        small_graph(GroupNorm("y", "x", changed(NORM, groups=3)), **SHAPES),
        "4 channels don't make 3 groups",
    ),
    "no groups": (
        small_graph(GroupNorm("y", "x", changed(NORM, groups=0)), **SHAPES),
        "don't make 0 groups",
    ),
    "an eps that is no number": (
        small_graph(GroupNorm("y", "x", changed(NORM, eps=math.nan)), **SHAPES),
        "eps nan",
    ),
    "a negative eps": (
        small_graph(GroupNorm("y", "x", changed(NORM, eps=-1.0)), **SHAPES),
        "eps -1.0",
    ),
    "norm weights of another length": (
        small_graph(GroupNorm("y", "x", NORM), scale=(3,), shift=(4,)),
        "weight 'scale' has shape (3,)",
    ),
    "a fused activation that is unknown": (
        small_graph(conv(activation="sigmoid"), weight=(4, 4, 1, 1)),
        "unknown activation 'sigmoid'",
    ),
    "an output activation that is unknown": (
        small_graph(conv(output_activation="sigmoid"), weight=(4, 4, 1, 1)),
        "unknown activation 'sigmoid'",
    ),
    "an RMS norm without eps": (
        small_graph(PixelNorm("y", "x", RMSNorm(0.0, "scale")), scale=(4,)),
        "an RMS norm with eps 0.0",
    ),
    "RMS norm weights of another length": (
        small_graph(PixelNorm("y", "x", RMSNorm(1e-6, "scale")), scale=(3,)),
        "weight 'scale' has shape (3,)",
    ),
    "a shuffle that goes sideways": (small_graph(Shuffle("y", "x", "left", (0,))), "'left'"),
    "a shuffle of no channels": (small_graph(Shuffle("y", "x", "up", ())), "not among 4"),
    "a shuffle of channels that are not there": (
        small_graph(Shuffle("y", "x", "channels", (0, 4))),
        "not among 4",
    ),
    "a shuffle of a negative channel": (
        small_graph(Shuffle("y", "x", "down", (0, -1))),
        "not among 16",
    ),
    "a shuffle to incomplete cells": (
        small_graph(Shuffle("y", "x", "up", (0, 1, 2))),
        "3 channels don't make cells",
    ),
    "an unknown activation": (small_graph(Activation("y", "x", "")), "unknown activation ''"),
    "a sum of two shapes": (
        small_graph(Upsample("u", "x"), Add("y", "x", "u")),
        "can't be added",
    ),
    "a product with an image that is larger": (
        small_graph(Upsample("u", "x"), Modulate("y", "x", "u")),
        "(3, 4, 4096, 5120) can't be multiplied by (3, 4, 8192, 10240)",
    ),
    "a product with an image smaller by another factor each way": (
        small_graph(
            conv("c", stride=2),
            Pad("p", "c", (0, 0, 0, 1)),
            Modulate("y", "x", "p"),
            weight=(4, 4, 1, 1),
        ),
        "smaller by no whole factor",
    ),
    "a product with other channels": (
        small_graph(conv("c"), Modulate("y", "x", "c"), weight=(2, 4, 1, 1)),
        "can't be multiplied by (3, 2, 4096, 5120)",
    ),
    "a scale and a shift that differ": (
        small_graph(conv("c", stride=2), Modulate("y", "x", "c", "x"), weight=(4, 4, 1, 1)),
        "scale (3, 4, 2048, 2560) and shift (3, 4, 4096, 5120) differ",
    ),
    "a norm before a product that doesn't fit": (
        small_graph(Modulate("y", "x", "x", norm=changed(NORM, groups=3)), **SHAPES),
        "4 channels don't make 3 groups",
    ),
    "a factor that is no number": (small_graph(Scale("y", "x", math.nan)), "factor or offset nan"),
    "an infinite factor": (small_graph(Scale("y", "x", math.inf)), "factor or offset inf"),
    "an infinite offset": (small_graph(Scale("y", "x", 1.0, math.inf)), "factor or offset inf"),
    "negative pad": (small_graph(Pad("y", "x", (0, -1, 0, 0))), "padding (0, -1, 0, 0)"),
    "queries and keys that differ": (
        small_graph(Upsample("u", "x"), Attention("y", "x", "u", "x", 1, 1.0)),
        "differ",
    ),
    "values of other pixels": (
        small_graph(Upsample("u", "x"), Attention("y", "x", "x", "u", 1, 1.0)),
        "meets value",
    ),
    "heads that don't divide the channels": (
        small_graph(Attention("y", "x", "x", "x", 3, 1.0)),
        "don't make 3 heads",
    ),
    "an attention scale that is no number": (
        small_graph(Attention("y", "x", "x", "x", 1, math.nan)),
        "scale nan",
    ),
    "a residual of other channels": (
        small_graph(
            conv("c", bias=None), Attention("y", "c", "c", "c", 1, 1.0, "x"), weight=(8, 4, 1, 1)
        ),
        "residual 'x'",
    ),
    "an input without channels": (small_graph(channels=0), "an input of 0 channels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verify_refuses(name: str) -> None:
    graph, message = BROKEN[name]
    with pytest.raises(GraphError, match=re.escape(message)):
        graph.verify()


def test_a_rule_that_is_broken_names_the_operation() -> None:
    with pytest.raises(GraphError, match="Conv2d 'the one': 4 channels meet"):
        small_graph(conv("the one"), weight=(4, 5, 1, 1)).verify()


def test_an_input_that_nothing_reads_is_allowed_only_as_the_input() -> None:
    graph = small_graph(Identity("y", "x"))
    assert changed(graph, operations=(), outputs=("x",)).verify()


# Shapes and work

ATTENTION = Attention("y", "x", "x", "x", 2, 1.0)


@pytest.mark.parametrize(
    ("operation", "weights", "expected"),
    [
        (conv(), {"weight": (6, 4, 1, 1)}, (2, 6, 5, 8)),
        (conv(), {"weight": (6, 4, 3, 2)}, (2, 6, 3, 7)),
        (conv(padding=(1, 1, 1, 1)), {"weight": (6, 4, 3, 3)}, (2, 6, 5, 8)),
        (conv(padding=(0, 1, 0, 1), stride=2), {"weight": (6, 4, 3, 3)}, (2, 6, 2, 4)),
        (conv(stride=3, padding=(2, 0, 0, 1)), {"weight": (1, 4, 2, 2)}, (2, 1, 2, 3)),
        (
            conv(padding=(1, 1, 1, 1), upsample=True),
            {"weight": (6, 4, 3, 3)},
            (2, 6, 10, 16),
        ),
        (GroupNorm("y", "x", NORM), SHAPES, (2, 4, 5, 8)),
        (Activation("y", "x", "relu"), {}, (2, 4, 5, 8)),
        (Add("y", "x", "x"), {}, (2, 4, 5, 8)),
        (Modulate("y", "x", "x", "x", NORM), SHAPES, (2, 4, 5, 8)),
        (Scale("y", "x", 2.0), {}, (2, 4, 5, 8)),
        (Identity("y", "x"), {}, (2, 4, 5, 8)),
        (Upsample("y", "x"), {}, (2, 4, 10, 16)),
        (
            conv(bias="bias", padding=(1, 1, 1, 1), upsample=True),
            {"weight": (2, 2, 6, 4, 3, 3), "bias": (2, 2, 6)},
            (2, 6, 10, 16),
        ),
        (PixelNorm("y", "x", RMSNorm(1e-6, "scale")), {"scale": (4,)}, (2, 4, 5, 8)),
        (Shuffle("y", "x", "channels", (3, 3, 0)), {}, (2, 3, 5, 8)),
        (Shuffle("y", "x", "up", (0, 1, 2, 3, 3, 3, 3, 3)), {}, (2, 2, 10, 16)),
        (Pad("y", "x", (1, 2, 3, 4)), {}, (2, 4, 8, 15)),
        (ATTENTION, {}, (2, 4, 5, 8)),
    ],
    ids=lambda item: item.kind if isinstance(item, Operation) else "",
)
def test_shape_inference_agrees_with_what_is_computed(
    operation: Operation, weights: dict[str, tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    graph = small_graph(operation, **weights)
    assert graph.infer_shapes((2, 4, 5, 8)) == {"x": (2, 4, 5, 8), "y": expected}
    assert tuple(evaluate(graph, noise(2, 4, 5, 8)).shape) == expected


def test_attention_has_the_channels_of_its_value() -> None:
    graph = small_graph(conv("v"), Attention("y", "x", "x", "v", 2, 1.0), weight=(6, 4, 1, 1))
    assert graph.infer_shapes((1, 4, 3, 5))["y"] == (1, 6, 3, 5)


def test_the_shapes_of_the_last_inputs_are_kept() -> None:
    graph = small_graph(Activation("y", "x", "silu"))
    first = graph.infer_shapes((1, 4, 5, 5))
    assert graph.infer_shapes([1, 4, 5, 5]) is first
    for width in range(6, 6 + KNOWN_SHAPES):
        assert graph.infer_shapes((1, 4, 5, width))["x"] == (1, 4, 5, width)
    assert len(graph._inferred) <= KNOWN_SHAPES
    assert graph.infer_shapes((1, 4, 5, 5)) == first
    for _ in range(2):
        with pytest.raises(GraphError, match="the input has shape"):
            graph.infer_shapes((1, 3, 5, 5))


@pytest.mark.parametrize(
    "shape", [(1, 4, 8), (1, 4, 8, 8, 1), (1, 3, 8, 8), (0, 4, 8, 8), (1, 4, 0, 8), ()]
)
def test_an_input_that_is_no_image_of_those_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(GraphError, match="expected"):
        small_graph(Activation("y", "x", "silu")).infer_shapes(shape)


def test_an_image_smaller_than_a_kernel_is_refused() -> None:
    with pytest.raises(GraphError, match="2x9 is too small for a 3x3 kernel"):
        small_graph(conv(), weight=(4, 4, 3, 3)).infer_shapes((1, 4, 2, 9))


@pytest.mark.parametrize(
    ("operation", "weights", "expected"),
    [
        (conv(), {"weight": (6, 4, 1, 1)}, 2 * 2 * 6 * 5 * 8 * 4),
        (conv(padding=(1, 1, 1, 1)), {"weight": (6, 4, 3, 3)}, 2 * 2 * 6 * 5 * 8 * 4 * 9),
        (
            conv(padding=(1, 1, 1, 1), upsample=True),
            {"weight": (6, 4, 3, 3)},
            2 * 2 * 6 * 10 * 16 * 4 * 4,
        ),
        (
            conv(padding=(1, 1, 1, 1), upsample=True),
            {"weight": (2, 2, 6, 4, 3, 3)},
            2 * 2 * 6 * 10 * 16 * 4 * 9,
        ),
        (ATTENTION, {}, 2 * 2 * 40 * 40 * (4 + 4)),
        (Add("y", "x", "x"), {}, 0),
    ],
    ids=lambda item: item.kind if isinstance(item, Operation) else "",
)
def test_flops_count_products_of_matrices(
    operation: Operation, weights: dict[str, tuple[int, ...]], expected: int
) -> None:
    assert small_graph(operation, **weights).flops((2, 4, 5, 8)) == expected


def test_consumers_are_each_operation_that_reads_a_value_once() -> None:
    square, both = Add("s", "x", "x"), Add("y", "x", "s")
    assert small_graph(square, both).consumers() == {"x": [square, both], "s": [both], "y": []}


def test_each_operation_is_the_producer_of_its_output() -> None:
    square, both = Add("s", "x", "x"), Add("y", "x", "s")
    assert small_graph(square, both).producers() == {"s": square, "y": both}


def test_a_pruned_graph_has_what_its_output_needs_and_no_more() -> None:
    graph = small_graph(
        conv("a", "x"),
        conv("lost", "a", weight="other"),
        Add("lost too", "lost", "a"),
        Activation("y", "a", "silu"),
        weight=(4, 4, 1, 1),
        other=(4, 4, 1, 1),
    )
    pruned = graph.pruned().verify()
    assert [operation.output for operation in pruned.operations] == ["a", "y"]
    assert list(pruned.weights) == ["weight"]
    assert pruned.pruned() == pruned


def test_the_last_use_of_the_output_is_after_the_run() -> None:
    graph = small_graph(Add("s", "x", "x"), Add("y", "x", "s"))
    assert graph.last_uses() == {"x": 1, "s": 1, "y": 2}


# Independence of sizes


@pytest.mark.parametrize("part", PARTS)
def test_a_graph_is_the_same_whatever_size_it_was_exported_at(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "EXAMPLE_HEIGHT", 64 * 37)
    monkeypatch.setattr(capture_module, "EXAMPLE_WIDTH", 64 * 41)
    again = capture_part(make_vae(), part)
    assert store(again) == store(captured(part))
    assert again.weights.keys() == captured(part).weights.keys()


@given(batch=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9))
def test_one_graph_serves_every_size(batch: int, height: int, width: int) -> None:
    shapes = captured("decoder").infer_shapes((batch, 4, height, width))
    assert shapes[captured("decoder").output] == (batch, 3, 2 * height, 2 * width)


# Printing


def test_printing_shows_every_operation_on_a_line() -> None:
    graph = small_graph(
        Conv2d("y", "x", "weight", None, 2, (0, 1, 0, 1), norm=NORM, activation="silu"),
        Attention("z", "y", "y", "y", 1, 0.5),
        weight=(4, 4, 3, 3),
        **SHAPES,
    )
    assert str(graph) == (
        "graph part(%x: 4 channels)\n"
        "  %y = Conv2d(%x) weight, stride 2, padding (0, 1, 0, 1), norm 2 groups, silu\n"
        "  %z = Attention(%y, %y, %y)\n"
        "  return %z"
    )


def test_printing_every_kind_names_it_its_output_and_its_inputs() -> None:
    graph = graph_of_every_kind()
    for line, operation in zip(str(graph).splitlines()[1:], graph.operations, strict=False):
        assert line.startswith(f"  %{operation.output} = {operation.kind}(%{operation.inputs[0]}")
        assert len(line) < 120


@pytest.mark.parametrize(
    ("operation", "shown"),
    [
        (Scale("y", "x", 0.25), "by 0.25"),
        (Activation("y", "x", "gelu"), "gelu"),
        (Pad("y", "x", (0, 1, 0, 1)), "(0, 1, 0, 1)"),
        (conv(upsample=True), "upsample"),
        (conv(residual="r"), "%r"),
    ],
    ids=str,
)
def test_printing_shows_what_an_operation_does(operation: Operation, shown: str) -> None:
    assert shown in str(operation)


def test_the_activations_are_those_of_diffusers() -> None:
    from diffusers.models.activations import ACT2CLS

    # "swish" is another name of silu; tanh limits the latents of small autoencoders.
    assert set(ACTIVATIONS) == set(ACT2CLS) - {"swish"} | {"tanh"}
    assert ACT2CLS["swish"] is torch.nn.SiLU


def test_random_weights_are_those_of_their_seed() -> None:
    one, same, other = (random_weights(seed, a=(2, 3)) for seed in (0, 0, 1))
    assert torch.equal(one["a"], same["a"]) and not torch.equal(one["a"], other["a"])
