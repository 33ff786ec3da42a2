"""Every kernel of every instruction set that this machine has, over one table of shapes.

`make test-engine` runs them under sanitizers, and those of AMX on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from benchmarks.shapes import ATTENTIONS, CONVOLUTIONS, LAYERS, AttentionCase, ConvCase
from graphs import over_frames
from hypothesis import given, settings
from hypothesis import strategies as st

from rbln_vae import _engine
from rbln_vae.graph.interpreter import Interpreter
from rbln_vae.graph.ir import Conv2d, Graph
from rbln_vae.targets.cpu.rules import CpuRules
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import FASTEST, Choices, Convolution, Machine, gains_by_winograd

Case = ConvCase | AttentionCase
CASES: tuple[Case, ...] = (*CONVOLUTIONS, *ATTENTIONS)
OF_FLOAT32 = [k.isa for k in _engine.all_kernels() if k.dtype == "float32" and k.isa != "generic"]
WINOGRAD = [(k.isa, k.dtype) for k in _engine.all_kernels() if k.winograd]
BEST = {k.dtype: k.isa for k in _engine.all_kernels()}
BFLOAT16 = [k.isa for k in _engine.all_kernels() if k.dtype == "bfloat16" and k.isa != "generic"]
NARROW = [(k.isa, k.dtype) for k in _engine.all_kernels() if k.dtype != "float32"]
"""What stores images in two bytes."""
ROUNDING = {"float16": 0.002, "bfloat16": 0.015}
"""How far results in these types may be from those in float32."""

NEVER, WHEREVER_IT_CAN = Choices(winograd=0), Choices(winograd=math.inf)
"""Where Winograd's algorithm is taken."""


def image(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(case.shape, generator=generator)


def run(
    case: Case,
    isa: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    choices: Choices = FASTEST,
) -> torch.Tensor:
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    native = CpuRuntime(case.graph(), dtype=dtype, num_threads=2, choices=choices)
    assert native.machine.isa == isa
    return native.run(image(case))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the sense of L2."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable_float32_is_what_torch_computes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Interpreter(case.graph()).run(image(case))
    assert difference(run(case, "generic", "float32", monkeypatch), expected) < 2e-6


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_portable_kernels_of_two_bytes_are_near_float32(
    case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Interpreter(case.graph()).run(image(case))
    sharp = isinstance(case, AttentionCase) and case.sharp > 1
    limit = ROUNDING[dtype] * (3.5 if sharp else 1)
    assert difference(run(case, "generic", dtype, monkeypatch), expected) < limit


@pytest.mark.parametrize("isa", OF_FLOAT32)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_kernels_agree(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(case, "generic", "float32", monkeypatch)
    assert difference(run(case, isa, "float32", monkeypatch), expected) < 2e-6


@pytest.mark.parametrize(("isa", "dtype"), [each for each in NARROW if each[0] != "generic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_of_two_bytes_agree(
    case: Case, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(case, "generic", dtype, monkeypatch)
    # A value near the middle of two may be rounded to the other.
    sharp = isinstance(case, AttentionCase) and case.sharp > 1
    limit = ROUNDING[dtype] * (2 if sharp else 0.5)
    assert difference(run(case, isa, dtype, monkeypatch), expected) < limit


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize(("dtype", "isa"), BEST.items())
def test_layers_of_stable_diffusion_are_what_torch_computes(
    case: Case, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Interpreter(case.graph()).run(image(case))
    limit = {"float32": 3e-6, **ROUNDING}[dtype]
    assert difference(run(case, isa, dtype, monkeypatch), expected) < limit


@pytest.mark.parametrize(("isa", "dtype"), NARROW)
def test_what_is_stored_is_the_nearest_with_ties_to_even(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = 0x10000 if dtype == "bfloat16" else 0x2000
    words = 0x3F800000 + torch.arange(8).repeat_interleave(3) * dropped
    near = words + dropped // 2 + torch.tensor([-1, 0, 1]).repeat(8)
    # The largest of float32, infinity, and NaN with all bits that there are.
    odd = torch.tensor([0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF])
    bits = torch.cat([near, odd, *(random_words(8) for _ in range(4))]).to(torch.int32)
    # The bounds of float16 and of its normal numbers, and halves of its smallest one.
    bounds = [65504.0, 65519.9, 65520.0, 2**-14, 2**-14 - 2**-25, *(n * 2**-25 for n in range(9))]
    positive = torch.cat([bits.view(torch.float32), torch.tensor(bounds)])
    if dtype == "float16":  # what is beyond its range is another test's
        positive = positive[positive.isnan() | (positive < 65520)]
    values = torch.cat([positive, -positive])
    weights = {"w": torch.zeros(len(values), 1, 1, 1), "b": values}
    graph = Graph("case", ("x",), 1, ("y",), (Conv2d("y", "x", "w", "b"),), weights).verify()
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    native, shape = CpuRuntime(graph, dtype=dtype), (1, 1, 1, 5)
    found = native.execute(native.planned(shape).program, torch.zeros(shape))
    expected = values.to(getattr(torch, dtype)).float().view(1, -1, 1, 1).expand_as(found)
    assert torch.equal(found.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("isa", [isa for isa, dtype in NARROW if dtype == "float16"])
def test_every_float16_is_read_as_it_is(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(2**16).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    graph = ConvCase(64, 32, 31, 32, kernel=(1, 1), padding=(0, 0, 0, 0)).graph()
    weights = {"y.weight": torch.eye(32).repeat(1, 2)[..., None, None], "y.bias": torch.zeros(32)}
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    native = CpuRuntime(dataclasses.replace(graph, weights=weights), dtype="float16")
    image = torch.cat([values, torch.zeros(-len(values) % (64 * 31 * 32))]).view(-1, 64, 31, 32)
    halves = image.double().split(32, dim=1)
    assert torch.equal(native.run(image).double(), (halves[0] + halves[1]).half().double())


def random_words(count: int) -> torch.Tensor:
    """Bits of normal numbers of float32 above zero."""
    return torch.randint(0x00800000, 0x7F800000, (count,))


@pytest.mark.parametrize(
    "case", [c for c in CONVOLUTIONS if c.height * c.width > 60 and not c.doubles], ids=str
)
def test_tiles_of_one_item_follow_each_other(
    case: ConvCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    isa = BFLOAT16[-1] if BFLOAT16 else "generic"

    def small(conv: Convolution, cell: tuple[int, int], *_: object) -> tuple[tuple[int, int], int]:
        # Where nothing is summed, cells don't matter.
        least = (1, 1) if cell == conv.unit else cell
        sides = zip((4, 19), least, conv.grid, strict=True)
        height, width = (min(-(-wanted // n) * n, most) for wanted, n, most in sides)
        return (height, width), 1

    monkeypatch.setattr(Convolution, "partition", small)
    alone = run(case, isa, "bfloat16", monkeypatch, NEVER)
    monkeypatch.setattr(Convolution, "together", lambda *_: 3)
    assert torch.equal(run(case, isa, "bfloat16", monkeypatch, NEVER), alone)


SUMMED = [
    *(case for case in CONVOLUTIONS if case.normed_after and case.height * case.width > 60),
    # It may be written over its input, and its channels are not divided then.
    ConvCase(64, 64, 12, 32, kernel=(1, 1), padding=(0, 0, 0, 0), normed_after=32),
]


@pytest.mark.parametrize(("isa", "dtype"), WINOGRAD[-3:] + [(isa, "bfloat16") for isa in BFLOAT16])
@pytest.mark.parametrize("choices", [NEVER, WHEREVER_IT_CAN], ids=["definition", "winograd"])
@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_statistics_do_not_depend_on_how_work_is_divided(
    case: ConvCase, choices: Choices, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(case, isa, dtype, monkeypatch, choices)
    for threads in (1, 5, 8, 64):
        native = CpuRuntime(case.graph(), dtype=dtype, num_threads=threads, choices=choices)
        assert torch.equal(native.run(image(case)), expected)
    for times in ((1, 1, 2), (2, 1, 1), (1, 3, 1)):
        monkeypatch.setattr(Convolution, "partition", functools.partialmethod(divided, times))
        assert torch.equal(run(case, isa, dtype, monkeypatch, choices), expected)


def divided(
    conv: Convolution, times: tuple[int, int, int], cell: tuple[int, int], *_: object
) -> tuple[tuple[int, int], int]:
    """Tiles of some cells down and right, and some parts of the channels."""
    *sides, splits = (1, 1, times[2]) if conv.phases_apart else times
    height, width = (n * side for n, side in zip(sides, cell, strict=True))
    tile = min(height, conv.grid[0]), min(width, conv.grid[1])
    return tile, min(splits, -(-conv.outputs // 32))


SUITABLE = [case for case in CONVOLUTIONS if case.suits_winograd]
CLOSE = {"float32": 3e-6, "float16": 0.001, "bfloat16": 0.008}
"""How far apart two ways to convolve may be, by what the result is stored in."""
CLOSE_OVER_TIME = CLOSE | {"float32": 1e-5}
"""The same where one filters over time, too."""


def convolved(
    case: ConvCase, x: torch.Tensor, dtype: str = "float32", threads: int = 1
) -> torch.Tensor:
    """By Winograd's algorithm."""
    native = CpuRuntime(case.graph(), dtype=dtype, num_threads=threads, choices=WHEREVER_IT_CAN)
    steps = native.planned(tuple(x.shape)).program.steps
    assert ("Winograd", "y") in [(step.kind, step.name) for step in steps]
    return native.run(x)


@pytest.mark.parametrize(("isa", "dtype"), WINOGRAD)
@pytest.mark.parametrize("case", SUITABLE, ids=str)
def test_winograd_is_what_the_definition_gives(
    case: ConvCase,
    isa: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(case, "generic", dtype, monkeypatch, NEVER)
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    assert difference(convolved(case, image(case), dtype), expected) < CLOSE[dtype]


sizes = st.integers(1, 70)
dtypes = st.sampled_from(["float32", *ROUNDING])


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(1, 3), st.booleans(), dtypes, st.data())
def test_winograd_takes_any_shape_and_tiles(
    inputs: int,
    outputs: int,
    height: int,
    width: int,
    batch: int,
    upsample: bool,
    dtype: str,
    data: st.DataObject,
) -> None:
    case = ConvCase(
        inputs,
        outputs,
        height,
        width,
        batch=batch,
        stride=1 if upsample else data.draw(st.sampled_from([1, 2])),
        upsample=upsample,
        rms=data.draw(st.booleans()),
        residual=True,
    )
    if (BEST[dtype], dtype) not in WINOGRAD:
        dtype = "float32"
    expected = CpuRuntime(case.graph(), dtype=dtype, choices=NEVER).run(image(case))
    found = convolved(case, image(case), dtype)
    assert difference(found, expected) < CLOSE[dtype]
    # Neither the batch nor tiles and threads change a bit.
    assert torch.equal(convolved(case, image(case)[-1:], dtype), found[-1:])
    grid = (height, width) if upsample else found.shape[2:]
    tile = tuple(min(size, 4 * data.draw(st.integers(1, 6))) for size in grid)
    splits = min(data.draw(st.integers(1, 2)), -(-outputs // 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Convolution, "partition", lambda *_: (tile, splits))
        assert torch.equal(convolved(case, image(case), dtype, threads=2), found)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(WINOGRAD), st.sampled_from([2, 4, 6, 8]), sizes, sizes, sizes, sizes,
    st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_frames_made_at_once_are_those_made_one_by_one(
    kernels: tuple[str, str],
    frames: int,
    inputs: int,
    outputs: int,
    height: int,
    width: int,
    residual: bool,
    rms: bool,
    data: st.DataObject,
) -> None:
    isa, dtype = kernels
    generator = torch.Generator().manual_seed(7)
    video = torch.randn(1 + 2 * frames, 1, inputs, height, width, generator=generator)

    def made(stacked: bool, choices: Choices, threads: int = 1) -> torch.Tensor:
        graph = over_frames(frames, inputs, outputs, stacked=stacked, residual=residual, rms=rms)
        native = CpuRuntime(graph, dtype=dtype, num_threads=threads, choices=choices)
        if choices is WHEREVER_IT_CAN:
            rules = CpuRules(graph, tuple(video[0].shape), native.machine, choices)
            (conv,) = (o for o in graph.operations if isinstance(o, Conv2d) and o.earlier)
            assert rules.convolution(conv).at_once == (2 if frames % 4 else 4)
        stream = native.stream(tuple(video[0].shape))
        runs = [video[:1], *video[1:].split(frames)]
        return torch.cat([frame for run in runs for frame in stream.run(list(run))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBLN_VAE_ISA", isa)
        found = made(True, WHEREVER_IT_CAN)
        assert difference(found, made(False, NEVER)) < CLOSE_OVER_TIME[dtype]
        tile = tuple(min(size, 4 * data.draw(st.integers(1, 6))) for size in (height, width))
        splits = min(data.draw(st.integers(1, 2)), -(-outputs // 16))
        patch.setattr(Convolution, "partition", lambda *_: (tile, splits))
        assert torch.equal(made(True, WHEREVER_IT_CAN, threads=2), found)


@pytest.mark.parametrize(("isa", "dtype"), WINOGRAD)
@pytest.mark.parametrize(("stride", "upsample"), [(1, False), (1, True), (2, False)])
def test_bits_depend_on_the_place_in_four_rows_and_columns(
    stride: int,
    upsample: bool,
    isa: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    scale = 2 if upsample else 1
    case = ConvCase(40, 24, 36 * stride, 52 * stride, stride=stride, upsample=upsample)
    x = image(case)
    whole = convolved(case, x, dtype)
    for rows, columns in ((4, 0), (8, 16), (0, 32)):
        part = convolved(case, x[:, :, stride * rows :, stride * columns :], dtype)
        # The first row and column of a part have zeros beside them.
        inner = scale * 4
        expected = whole[:, :, scale * rows + inner :, scale * columns + inner :]
        assert torch.equal(part[:, :, inner:, inner:], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_winograd_spreads_nan_and_infinity_no_further_than_its_tiles(
    value: float,
) -> None:
    case = ConvCase(40, 24, 24, 24)
    x = image(case)
    x[0, 7, 10, 12] = value
    found = convolved(case, x).isfinite()
    assert not found[:, :, 9:12, 11:14].any()
    found[:, :, 8:12, 8:16] = True
    assert found.all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_halving_spreads_nan_and_infinity_no_further_than_its_tiles(value: float) -> None:
    case = ConvCase(40, 24, 48, 48, stride=2)
    x = image(case)
    x[0, 7, 23, 17] = value
    found = convolved(case, x).isfinite()
    # The kernel reads it for two rows of outputs, of two squares, and for one or two columns.
    assert not found[:, :, 11:13, 8:10].any()
    found[:, :, 8:16, 8:12] = True
    assert found.all()


USABLE = [(k.isa, k.dtype) for k in _engine.all_kernels()]


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(1, 3), dtypes, st.data())
def test_doubling_takes_any_shape_and_tiles(
    inputs: int,
    outputs: int,
    height: int,
    width: int,
    batch: int,
    dtype: str,
    data: st.DataObject,
) -> None:
    case = ConvCase(
        inputs,
        outputs,
        height,
        width,
        batch=batch,
        doubles=True,
        rms=data.draw(st.booleans()),
        residual=True,
    )

    def doubled(x: torch.Tensor, threads: int = 1) -> torch.Tensor:
        return CpuRuntime(case.graph(), dtype=dtype, num_threads=threads).run(x)

    found = doubled(image(case))
    expected = Interpreter(case.graph()).run(image(case))
    assert difference(found, expected) < {"float32": 3e-6, **ROUNDING}[dtype]
    # Neither the batch nor tiles and threads change a bit.
    assert torch.equal(doubled(image(case)[-1:]), found[-1:])
    tile = tuple(min(size, 2 * data.draw(st.integers(1, 12))) for size in (height, width))
    splits = min(data.draw(st.integers(1, 2)), -(-outputs // 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Convolution, "partition", lambda *_: (tile, splits))
        assert torch.equal(doubled(image(case), threads=2), found)


@pytest.mark.parametrize(("isa", "dtype"), USABLE)
def test_bits_of_a_doubled_image_depend_on_the_place_in_two_rows_and_columns(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    native = CpuRuntime(ConvCase(40, 24, 36, 52, doubles=True).graph(), dtype=dtype)
    x = torch.randn(1, 40, 36, 52, generator=torch.Generator().manual_seed(7))
    whole = native.run(x)
    for rows, columns in ((2, 0), (8, 14), (0, 32)):
        part = native.run(x[:, :, rows:, columns:])
        # The first row and column of a part have zeros beside them.
        expected = whole[:, :, 2 * rows + 4 :, 2 * columns + 4 :]
        assert torch.equal(part[:, :, 4:, 4:], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", BEST)
def test_doubling_spreads_nan_and_infinity_no_further_than_its_squares(
    dtype: str, value: float
) -> None:
    case = ConvCase(40, 24, 24, 24, doubles=True)
    x = image(case)
    x[0, 7, 10, 13] = value
    found = CpuRuntime(case.graph(), dtype=dtype).run(x).isfinite()
    # The kernel reaches those beside the four pixels that the value becomes.
    assert not found[:, :, 19:23, 25:29].any()
    found[:, :, 16:24, 24:32] = True
    assert found.all()


BUILT = {(k.isa, k.dtype): k for k in _engine.built_kernels()}
WITH_WINOGRAD = [k for k in BUILT.values() if k.winograd]
FLOAT32 = Machine(next(k for k in WITH_WINOGRAD[::-1] if k.dtype == "float32"), threads=2)
STORES_FLOAT16, STORES_BFLOAT16 = (
    Machine(BUILT[FLOAT32.isa, dtype], threads=2) for dtype in ROUNDING
)
# Elsewhere no instruction set of the build multiplies bfloat16.
MULTIPLIES_BFLOAT16 = Machine(
    next((k for k in WITH_WINOGRAD if k.multiplies_bfloat16), FLOAT32.kernels), threads=2
)
multiplies = pytest.mark.skipif(
    MULTIPLIES_BFLOAT16 == FLOAT32, reason="no kernels in this build multiply bfloat16"
)
MACHINES = st.sampled_from([FLOAT32, MULTIPLIES_BFLOAT16, STORES_FLOAT16, STORES_BFLOAT16])
WHOLE_TILES = st.integers(1, 64).map(lambda tiles: 4 * tiles)
WHOLE_BLOCKS = st.integers(1, 16).map(lambda blocks: 32 * blocks)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    """Some that Winograd's algorithm can do, without padding of pixels or channels."""
    upsample = draw(st.booleans())
    return Convolution(
        inputs=draw(WHOLE_BLOCKS),
        outputs=draw(WHOLE_BLOCKS),
        kernel=(3, 3),
        stride=1 if upsample else draw(st.sampled_from([1, 2])),
        upsample=upsample,
        grid=(draw(WHOLE_TILES), draw(WHOLE_TILES)),
        normed=draw(st.booleans()),
    )


@given(convolutions(), MACHINES, WHOLE_TILES, WHOLE_TILES)
def test_more_pixels_never_speak_against_winograd(
    conv: Convolution, machine: Machine, rows: int, columns: int
) -> None:
    larger = dataclasses.replace(conv, grid=(conv.grid[0] + rows, conv.grid[1] + columns))
    assert gains_by_winograd(larger, machine) or not gains_by_winograd(conv, machine)


@given(convolutions(), MACHINES, WHOLE_BLOCKS, WHOLE_BLOCKS)
def test_more_channels_never_speak_against_winograd(
    conv: Convolution, machine: Machine, inputs: int, outputs: int
) -> None:
    wider = dataclasses.replace(conv, inputs=conv.inputs + inputs, outputs=conv.outputs + outputs)
    assert gains_by_winograd(wider, machine) or not gains_by_winograd(conv, machine)


@given(convolutions())
def test_faster_products_speak_against_winograd_and_storage_does_not(conv: Convolution) -> None:
    chosen = gains_by_winograd(conv, FLOAT32)
    for stores in (STORES_FLOAT16, STORES_BFLOAT16):
        assert gains_by_winograd(conv, stores) is chosen
    assert chosen or not gains_by_winograd(conv, MULTIPLIES_BFLOAT16)


@multiplies
def test_winograd_needs_more_pixels_where_products_are_faster() -> None:
    def fewest(machine: Machine) -> int:
        conv = Convolution(256, 256, (3, 3), 1, False, (4, 4), normed=True)
        sizes = ((4 * tiles, 4 * tiles) for tiles in range(1, 1000))
        return next(
            math.prod(grid)
            for grid in sizes
            if gains_by_winograd(dataclasses.replace(conv, grid=grid), machine)
        )

    assert fewest(FLOAT32) < fewest(MULTIPLIES_BFLOAT16)


@given(convolutions(), MACHINES)
def test_winograd_never_transforms_kernels_for_a_single_tile(
    conv: Convolution, machine: Machine
) -> None:
    assert not gains_by_winograd(dataclasses.replace(conv, grid=(4, 4)), machine)


@given(convolutions(), MACHINES, st.integers(1, 7), st.integers(1, 4))
def test_winograd_is_for_kernels_of_3x3_and_where_there_is_one(
    conv: Convolution, machine: Machine, size: int, stride: int
) -> None:
    for kernels in BUILT.values():
        assert kernels.winograd or not gains_by_winograd(conv, Machine(kernels, threads=2))
    other = dataclasses.replace(conv, upsample=False, kernel=(size, size), stride=stride)
    assert (size == 3 and stride <= 2) or not gains_by_winograd(other, machine)


@pytest.mark.parametrize("machine", [FLOAT32, MULTIPLIES_BFLOAT16], ids=lambda m: m.dtype)
def test_winograd_is_chosen_for_the_widest_layers_of_large_images(machine: Machine) -> None:
    """It takes a quarter of the products, and bfloat16 saves but half of their time."""
    wide = Convolution(512, 512, (3, 3), 1, False, (512, 512), normed=True)
    assert gains_by_winograd(wide, machine)


@multiplies
def test_stride_2_saves_less_than_products_in_bfloat16() -> None:
    """It takes nine sixteenths of the products."""
    halving = Convolution(512, 512, (3, 3), 2, False, (512, 512), normed=False)
    assert gains_by_winograd(halving, FLOAT32)
    assert not gains_by_winograd(halving, MULTIPLIES_BFLOAT16)
    assert not gains_by_winograd(halving, FLOAT32, Choices(halving=False))


@multiplies
def test_tiles_are_those_of_float32_where_products_are() -> None:
    conv = Convolution(256, 512, (3, 3), 1, False, (96, 96), normed=True)
    stores, wide, multiplies = (
        conv.tile(conv.unit, machine) for machine in (STORES_BFLOAT16, FLOAT32, MULTIPLIES_BFLOAT16)
    )
    assert stores == wide
    assert math.prod(multiplies) > math.prod(stores)


@pytest.mark.parametrize(("isa", "dtype"), WINOGRAD)
def test_the_algorithm_does_not_depend_on_the_batch(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    native = CpuRuntime(ConvCase(64, 64, 64, 64).graph(), dtype=dtype)
    for batch in (1, 3):
        assert "Winograd" in {s.kind for s in native.planned((batch, 64, 64, 64)).program.steps}
