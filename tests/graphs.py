"""Small graphs and tools that the tests of the compiler share."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from vaes import capture_part, default_vae

from rbln_vae.graph.interpreter import Interpreter
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
    Slot,
    Stack,
    Unstack,
    Upsample,
)

PARTS = ("encoder", "decoder")


@functools.cache
def captured(part: str) -> Graph:
    """A part of `default_vae()` as captured."""
    return capture_part(default_vae(), part)


def evaluate(graph: Graph, image: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return Interpreter(graph, dtype).run(image)


def random_weights(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A tensor for each name; the `_` of a keyword stands as it is."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[-1] if len(shape) == 2 else 4
        weights[name] = torch.randn(shape, generator=generator) * max(fan_in, 1) ** -0.5
    return weights


def small_graph(
    *operations: Operation, channels: int = 4, seed: int = 0, **shapes: tuple[int, ...]
) -> Graph:
    """A graph from `x` to what the last operation makes, with random weights of those shapes."""
    output = operations[-1].output if operations else "x"
    return Graph("part", ("x",), channels, (output,), operations, random_weights(seed, **shapes))


def graph_of_every_kind() -> Graph:
    """A graph that holds every operation, and every attribute at a value not its default."""
    norm = Norm(2, 1e-6, "scale", "shift")
    return small_graph(
        Pad("pad", "x", (1, 0, 2, 0)),
        Conv2d("conv", "pad", "first", "shift", padding=(0, 1, 0, 0)),
        GroupNorm("norm", "conv", Norm(4, 1e-5, "scale", "shift")),
        Activation("mish", "norm", "mish"),
        Conv2d(
            "residual",
            "mish",
            "second",
            None,
            padding=(1, 1, 1, 1),
            norm=norm,
            activation="gelu",
            residual="conv",
        ),
        Scale("half", "residual", 0.5, -0.1),
        Identity("same", "half"),
        Stack("both", ("same", "residual")),
        Unstack("again", "both", 0, 2),
        Add("sum", "again", "residual"),
        Attention("attention", "residual", "half", "sum", 2, 0.4, residual="sum"),
        Upsample("double", "attention"),
        Modulate("modulated", "double", "half", "attention", Norm(1, 1e-4, "scale", "shift")),
        Conv2d("down", "modulated", "second", "shift", stride=2, padding=(1, 0, 1, 0)),
        Shuffle("cells", "down", "up", tuple(range(7, -1, -1)) * 4),
        PixelNorm("pixels", "cells", RMSNorm(1e-6, "scale")),
        Conv2d(
            "result",
            "pixels",
            "doubled",
            None,
            padding=(1, 1, 1, 1),
            upsample=True,
            norm=RMSNorm(1e-5, "shift"),
            output_activation="tanh",
        ),
        first=(8, 4, 2, 3),
        shift=(8,),
        scale=(8,),
        second=(8, 8, 3, 3),
        doubled=(3, 8, 3, 3),
    )


def over_frames(
    frames: int,
    inputs: int = 5,
    outputs: int = 5,
    *,
    stacked: bool = True,
    residual: bool = False,
    rms: bool = True,
) -> Graph:
    """A convolution over three frames, so many in a run after the first: stacked, or one by one."""
    conv: dict[str, Any] = {
        "padding": (1, 1, 1, 1),
        "norm": RMSNorm(1e-6, "gamma") if rms else None,
        "activation": "silu",
    }
    names = tuple(f"x{index}" for index in range(frames))
    results = tuple(f"y{index}" for index in range(frames))
    later: list[Operation] = []
    window = ["a", "b", *names]
    given = {result: window[index : index + 3] for index, result in enumerate(results)}
    if stacked and frames > 1:
        later.append(Stack("stack", names))
        given = {"made": ["a", "b", "stack"]}
    for made, (*earlier, last) in given.items():
        added = None
        if residual:
            added = f"{made} residual"
            later.append(Conv2d(added, last, "beside", None))
        later.append(
            Conv2d(made, last, "kernel", "bias", residual=added, earlier=tuple(earlier), **conv)
        )
    if stacked and frames > 1:
        later += [Unstack(each, "made", index, frames) for index, each in enumerate(results)]
    shapes = {"kernel": (outputs, 3 * inputs, 3, 3), "bias": (outputs,)}
    shapes |= {"gamma": (inputs,)} if rms else {}
    weights = random_weights(**shapes)
    first = Graph(
        "decoder",
        ("x0",),
        inputs,
        ("y0",),
        (Conv2d("y0", "x0", "kernel", "bias", left_out=2, **conv),),
        weights,
        (Slot("a", None, "x0", zeros=True), Slot("b", None, "x0")),
    )
    beside = random_weights(beside=(outputs, inputs, 1, 1)) if residual else {}
    left = window[-2:]
    return Graph(
        "decoder",
        names,
        inputs,
        results,
        tuple(later),
        {**weights, **beside},
        (Slot("a", "a", left[0]), Slot("b", "b", left[1])),
        first,
    ).verify()


def kinds(graph: Graph) -> list[str]:
    return [operation.kind for operation in graph.operations]


def paths(item: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a JSON document stands, the whole of it first."""
    yield path
    if isinstance(item, (dict, list)):
        for key, child in item.items() if isinstance(item, dict) else enumerate(item):
            yield from paths(child, (*path, key))
