"""What each kernel takes over the table of shapes, and what cost constants would fit that."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rbln_vae._engine import ConvStep, Kernels
from rbln_vae.graph.ir import Conv2d
from rbln_vae.targets.cpu.kernels import usable_kernels
from rbln_vae.targets.cpu.packing import BLOCK, PANEL
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import Choices, Convolution

from .shapes import ATTENTIONS, CONVOLUTIONS, LAYERS, AttentionCase, ConvCase

Case = ConvCase | AttentionCase
TABLES: dict[str, tuple[Case, ...]] = {"cases": (*CONVOLUTIONS, *ATTENTIONS), "layers": LAYERS}

DIRECT = ("product", "norm", "copy", "weights")
"""The constants of `Costs`, in the order of `counts`."""
TRANSFORMED = ("product", "input", "output")
"""Those of `WinogradCosts` and `DoublingCosts` that a convolution tells, likewise."""


@dataclass(frozen=True)
class Timing:
    """What one step took.

    Attributes:
        case: The shape.
        kind: `"definition"`, `"Winograd"`, `"its kernels"`, `"doubling"`, or the kind of the step.
        seconds: Of the fastest run, on one thread.
        flops: Products and sums by the definition; two each.
        counts: How often it does what each constant stands for; empty where none does.
    """

    case: Case
    kind: str
    seconds: float
    flops: int
    counts: tuple[float, ...] = ()


def counts(conv: Convolution, tile: tuple[int, int], batch: int) -> tuple[float, ...]:
    """How often a convolution does what each constant stands for."""
    if conv.row_step > 1:
        pixels = math.prod(conv.grid)
        inputs = -(-conv.inputs // BLOCK) * BLOCK
        outputs = conv.panels * PANEL * (4 if conv.upsample else 1)
        return (
            batch * conv.product_cost(conv.grid),
            conv.values * batch * pixels * inputs,
            conv.values * batch * pixels * outputs,
        )
    tiles = batch * conv.tiles(tile)
    loaded = tiles * math.prod(conv.read(tile)) * conv.inputs
    return (
        tiles * conv.product_cost(tile),
        loaded if conv.normed else 0,
        0 if conv.normed else loaded,
        tiles * conv.weights,
    )


def fit(timings: Sequence[Timing]) -> list[float | None]:
    """Seconds of each count, by least squares of relative errors; None where nothing tells."""
    seconds = np.array([each.seconds for each in timings])
    table = np.array([each.counts for each in timings]) / seconds[:, None]
    told = [i for i in range(table.shape[1]) if table[:, i].any()]
    best: dict[int, float] = {}
    least = math.inf
    # A cost below zero is noise, so some may have to be left out.
    for count in range(1, len(told) + 1):
        for kept in itertools.combinations(told, count):
            found = np.linalg.lstsq(table[:, kept], np.ones(len(seconds)), rcond=None)[0]
            error = float(np.square(table[:, kept] @ found - 1).sum())
            if found.min() > 0 and error < least:
                best, least = dict(zip(kept, map(float, found), strict=True)), error
    return [best.get(i) for i in range(table.shape[1])]


def time_case(case: Case, kernels: Kernels, winograd: bool, rounds: int) -> Iterator[Timing]:
    """Run a shape and give the fastest time of each of its steps."""
    os.environ["RBLN_VAE_ISA"] = kernels.isa
    try:
        graph = case.graph()
        choices = Choices(winograd=math.inf if winograd else 0, kept_kernels=False)
        native = CpuRuntime(
            graph, dtype=kernels.dtype, num_threads=1, activate_profiler=True, choices=choices
        )
        image = torch.randn(case.shape, generator=torch.Generator().manual_seed(7))
        for _ in range(rounds + 1):  # the first warms up
            native.run(image)
        program, made = native.planned(case.shape).program, native.images.rules(case.shape)
        convolutions = {
            each.output: made.convolution(each)
            for each in graph.operations
            if isinstance(each, Conv2d)
        }
    finally:
        del os.environ["RBLN_VAE_ISA"]
    fastest: defaultdict[tuple[str, str], float] = defaultdict(float)
    flops: defaultdict[tuple[str, str], int] = defaultdict(int)
    runs = native.profiles[1:]
    tiles = {
        step.name: (step.native.tile_height, step.native.tile_width)
        for step in program.steps
        if isinstance(step.native, ConvStep)
    }
    for index, step in enumerate(program.steps):
        # Strips of one operation count together.
        fastest[step.kind, step.name] += min(run.steps[index].seconds for run in runs)
        flops[step.kind, step.name] += step.flops
    for (kind, name), seconds in fastest.items():
        conv = convolutions.get(name)
        if kind == "Conv2d" and conv is not None:
            how = "doubling" if conv.doubles else "Winograd" if conv.winograd else "definition"
            told = counts(conv, tiles[name], case.batch)
            yield Timing(case, how, seconds, flops[kind, name], told)
        elif kind == "Winograd" and conv is not None:
            yield Timing(case, "its kernels", seconds, 0, (conv.weights,))
        else:
            yield Timing(case, kind, seconds, flops[kind, name])


def measure(isas: Sequence[str] | None, tables: Iterable[str], rounds: int) -> str:
    """Time every kernel on every shape.

    Args:
        isas: Instruction sets; `None` is all that this machine has.
        tables: Names of `TABLES`.
        rounds: Runs of each, of which the fastest counts.

    Returns:
        Markdown: a table of times, and for each dtype of an instruction set one of constants.

    Raises:
        ValueError: An instruction set or a table isn't there, or there are no runs.
    """
    present = usable_kernels()
    if unknown := set(isas or ()) - {each.isa for each in present}:
        raise ValueError(f"this machine has no {', '.join(sorted(unknown))}")
    if unknown := set(tables := list(tables)) - TABLES.keys():
        raise ValueError(f"no table {', '.join(unknown)}, expected one of {', '.join(TABLES)}")
    if rounds < 1:
        raise ValueError(f"{rounds} rounds, expected at least 1")
    cases = [case for name in tables for case in TABLES[name]]
    lines = ["| kernels | shape | step | ms | GFLOP/s |", "| --- | --- | --- | ---: | ---: |"]
    constants: list[str] = []
    products: dict[str, float | None] = {}  # in float32, by instruction set, the best last
    for kernels in sorted(present, key=lambda each: each.dtype, reverse=True):  # float32 first
        if isas is not None and kernels.isa not in isas:
            continue
        timings: list[Timing] = []
        for case in cases:
            timings += time_case(case, kernels, False, rounds)
            if kernels.winograd and isinstance(case, ConvCase) and case.suits_winograd:
                timings += time_case(case, kernels, True, rounds)
        lines += (
            f"| {kernels.isa} {kernels.dtype} | {_short(each.case)} | {each.kind} | "
            f"{each.seconds * 1e3:.3f} | {each.flops / each.seconds / 1e9:.1f} |"
            for each in timings
            if each.seconds > 0
        )
        if kernels.dtype == "float32":
            definition = [each for each in timings if each.kind == "definition"]
            products[kernels.isa] = fit(definition)[0]
        best = next(reversed(products.values()), None)
        constants += _constants(kernels, timings, products.get(kernels.isa, best))
    return "\n".join([*lines, *constants])


def _constants(kernels: Kernels, timings: Sequence[Timing], float32: float | None) -> list[str]:
    """A table of what stands in the engine and what would fit.

    Args:
        kernels: Those that were timed.
        timings: Of their steps.
        float32: Seconds of a product in float32, by the instruction set itself or else the best
            that was timed; `None` if none was.
    """
    definition = fit([each for each in timings if each.kind == "definition"])
    rows = [("product", kernels.costs.product, _ratio(definition[0], float32))]
    for name, seconds in list(zip(DIRECT, definition, strict=True))[1:]:
        rows.append((name, getattr(kernels.costs, name), _ratio(seconds, definition[0])))
    doubling = [each for each in timings if each.kind == "doubling"]
    for name, seconds in zip(TRANSFORMED, fit(doubling), strict=True):
        value = getattr(kernels.doubling, name)
        rows.append((f"doubling's {name}", value, _ratio(seconds, definition[0])))
    if kernels.winograd is not None:
        winograd = fit([each for each in timings if each.kind == "Winograd"])
        (kernel,) = fit([each for each in timings if each.kind == "its kernels"])
        for name, seconds in (*zip(TRANSFORMED, winograd, strict=True), ("kernel", kernel)):
            value = getattr(kernels.winograd, name)
            rows.append((f"Winograd's {name}", value, _ratio(seconds, float32)))
    return [
        "",
        f"| {kernels.isa} {kernels.dtype} | in the table | fits |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {value:g} | {'–' if found is None else f'{found:.2g}'} |"
            for name, value, found in rows
        ),
    ]


def _ratio(seconds: float | None, unit: float | None) -> float | None:
    return None if seconds is None or unit is None else seconds / unit


def _short(case: Case) -> str:
    """A shape in a few words."""
    size = f"{case.batch}x{case.height}x{case.width}"
    if isinstance(case, AttentionCase):
        return f"attention {case.channels} {size}, {case.heads} heads"
    options = [
        f"{case.kernel[0]}x{case.kernel[1]}",
        *(["phases"] if case.upsample else ()),
        *(["doubling"] if case.doubles else ()),
        *([f"stride {case.stride}"] if case.stride > 1 else ()),
        *(["norm"] if case.groups else ()),
        *([case.activation] if case.activation else ()),
        *(["residual"] if case.residual else ()),
    ]
    return f"{case.inputs} to {case.outputs} {size}, {', '.join(options)}"
