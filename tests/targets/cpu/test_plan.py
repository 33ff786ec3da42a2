"""What the engine refuses to take into a plan, so that no step can leave its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rbln_vae import _engine

SHAPE = (1, 32, 8, 8)
IMAGE = _engine.Image(channels=32, height=8, width=8, row=8, sample=64)
AFTER = 32 * 64 * 4
"""The first byte behind an image of float32."""
BEHIND = _engine.Image(offset=AFTER, channels=32, height=8, width=8, row=8, sample=64)
TILE = {"tile_height": 8, "tile_width": 8}
CELL = {"cell_height": 8, "cell_width": 8}
FLOATS, PACKED = torch.zeros(32), torch.zeros(2, 1, 1, 1, 512)


def kernels(dtype: str) -> _engine.Kernels:
    return next(each for each in _engine.all_kernels() if each.dtype == dtype)


def make_plan(dtype: str = "float32") -> _engine.Plan:
    return _engine.Plan(kernels(dtype), 2**20, SHAPE, SHAPE)


def norm(**changes: Any) -> _engine.NormStep:
    usual = {
        "channels": 32,
        "groups": 4,
        "eps": 1e-6,
        "partials": AFTER,
        "partial_channels": 32,
        "grid_height": 8,
        "grid_width": 8,
        "coefficients": 2 * AFTER,
        **CELL,
    }
    return _engine.NormStep(**{**usual, **changes})


def convolution(**changes: Any) -> _engine.ConvStep:
    return _engine.ConvStep(**{"input": IMAGE, "output": BEHIND, **TILE, **CELL, **changes})


def statistics(**changes: Any) -> _engine.StatisticsStep:
    return _engine.StatisticsStep(**{"input": IMAGE, "partials": AFTER, **CELL, **changes})


def modulation(**changes: Any) -> _engine.ModulateStep:
    small = _engine.Image(channels=32, height=4, width=4, row=4, sample=16)
    usual = {"input": BEHIND, "output": BEHIND, "scale": small, "shift": small, "factor": 2}
    return _engine.ModulateStep(**{**usual, **changes})


def test_what_fits_is_taken() -> None:
    plan = make_plan()
    plan.add(_engine.ImportStep(image=IMAGE))
    plan.add(convolution(), FLOATS, PACKED)
    plan.add(norm(), FLOATS, FLOATS)
    plan.add(statistics())
    plan.add(modulation(coefficients=2 * AFTER))
    plan.add(modulation(shift=_engine.Image()))
    plan.add(_engine.ExportStep(image=BEHIND))


def test_a_step_has_the_fields_that_it_was_made_with_and_defaults_for_others() -> None:
    step = convolution(reading=_engine.Reading(activation=_engine.Activation.silu))
    assert (step.output.offset, step.tile_height) == (AFTER, 8)
    assert step.reading.activation == _engine.Activation.silu
    assert step.partials == step.kernels == step.reading.coefficients == _engine.NONE
    assert step.residual.channels == 0
    with pytest.raises(TypeError):
        convolution(tiles=8)


def test_a_plan_keeps_a_step_as_it_was_when_it_was_checked() -> None:
    plan = _engine.Plan(kernels("float32"), 2**20, SHAPE, SHAPE)
    first, last = _engine.ImportStep(image=IMAGE), _engine.ExportStep(image=IMAGE)
    plan.add(first)
    plan.add(last)
    first.image.offset = last.image.offset = 2**40
    source, result = torch.randn(SHAPE), torch.empty(SHAPE)
    _engine.Executor(1).run(plan, [source], [result], 60.0, None, False)
    assert torch.equal(source, result)


@pytest.mark.parametrize("kind", [_engine.ImportStep, _engine.ExportStep])
@pytest.mark.parametrize(
    "changes", [{"batch": 2}, {"first_row": -1}, {"first_row": 1}, {"first_row": 2**62}]
)
def test_rows_that_a_tensor_does_not_have_are_refused(
    kind: type[_engine.ImportStep] | type[_engine.ExportStep], changes: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="shape of the plan"):
        make_plan().add(kind(image=IMAGE, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"grid_height": 2**40, "grid_width": 2**40, "cell_height": 2**40, "cell_width": 2**40},
        {"grid_height": 2**62, "cell_height": 2**62},
        {"points": 2**62},
        {
            "grid_height": 2**31,
            "grid_width": 2**31,
            "cell_height": 2**31,
            "cell_width": 2**31,
            "points": 4,
        },
        {"cell_height": 2**62},
        {"cell_height": 0},
        {"partials": 2**20},
    ],
)
def test_a_norm_whose_sizes_overflow_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"overflows|tiles|don't lie"):
        make_plan().add(norm(**changes), FLOATS, FLOATS)


@pytest.mark.parametrize("cell", [(2**62, 2**62), (8, 2**63 - 1), (9, 8), (0, 8), (-1, 8)])
def test_statistics_of_cells_beyond_the_image_are_refused(cell: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="tiles"):
        make_plan().add(statistics(cell_height=cell[0], cell_width=cell[1]))


SMALL = modulation().scale


def changed(image: _engine.Image, **changes: int) -> _engine.Image:
    names = ("offset", "channels", "height", "width", "row", "sample")
    return _engine.Image(**{**{name: getattr(image, name) for name in names}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 1}, "by the factor"),
        ({"factor": 0}, "by the factor"),
        ({"factor": -2}, "by the factor"),
        ({"factor": 2**62}, "by the factor"),
        ({"scale": changed(SMALL, width=3)}, "by the factor"),
        ({"scale": changed(SMALL, channels=31)}, "by the factor"),
        ({"scale": _engine.Image()}, "without pixels"),
        ({"scale": changed(SMALL, offset=2**20)}, "don't lie"),
        ({"scale": changed(SMALL, sample=2**60)}, "overflows"),
        ({"shift": changed(SMALL, height=3)}, "shift of another size"),
        ({"shift": changed(SMALL, offset=2**20)}, "don't lie"),
        ({"output": changed(BEHIND, width=7)}, "output of another size"),
        ({"output": changed(BEHIND, offset=2**20)}, "don't lie"),
        ({"input": changed(BEHIND, offset=-64)}, "don't lie"),
        ({"input": changed(BEHIND, row=7)}, "overlap"),
        ({"batch": 2}, "don't lie"),
        ({"batch": 0}, "without pixels"),
        ({"coefficients": 2**20}, "don't lie"),
    ],
)
def test_a_modulation_of_images_that_do_not_fit_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan = _engine.Plan(kernels("float32"), 2 * AFTER, SHAPE, SHAPE)
        plan.add(modulation(**changes))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16])
def test_weights_of_a_norm_are_float32(place: int, dtype: torch.dtype) -> None:
    weights = [FLOATS, FLOATS]
    # As many bytes, so that their number tells nothing.
    weights[place] = torch.zeros(32 * 4 // dtype.itemsize, dtype=dtype)
    with pytest.raises(TypeError, match="another type"):
        make_plan().add(norm(), *weights)


@pytest.mark.parametrize("doubles", [False, True])
def test_only_winograds_algorithm_takes_kept_kernels(doubles: bool) -> None:
    step, packed = (doubling(), KERNELS_OF_DOUBLING) if doubles else (convolution(), PACKED)
    make_plan().add(step, FLOATS, packed)
    with pytest.raises(ValueError, match="kept kernels of a convolution without"):
        make_plan().add(step, FLOATS, packed, kernels=_engine.allocate(1))


def test_a_convolution_has_weights_of_its_size_or_kernels_made_of_them() -> None:
    for weights in (None, PACKED[1:].clone()):
        with pytest.raises(ValueError, match="weights of another size"):
            make_plan().add(convolution(), FLOATS, weights)


DOUBLED = _engine.Image(offset=AFTER, channels=32, height=16, width=16, row=16, sample=256)
SIDES = ("tile_height", "tile_width", "cell_height", "cell_width")
KERNELS_OF_DOUBLING = torch.zeros(2, 25, 1, 512)


def doubling(**changes: Any) -> _engine.ConvStep:
    usual = {"output": DOUBLED, "kernel_height": 3, "kernel_width": 3, "above": 1, "left": 1}
    return convolution(**{**usual, "upsample": True, "doubles": True, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upsample": False}, "kind of upsampling"),
        ({"kernels": 4 * AFTER}, "algorithm of its own"),
        ({"kernel_height": 2, "kernel_width": 2}, "kernels of 3x3"),
        ({"stride": 2}, "stride 1"),
        ({"together": 2}, "one tile"),
        ({"cell_height": 3, "tile_height": 3}, "squares of outputs"),
        ({"cell_width": 5, "tile_width": 5}, "squares of outputs"),
        ({"output": BEHIND, **dict.fromkeys(SIDES, 4)}, "twice its input"),
        ({"doubles": False}, "weights of another size"),
    ],
)
def test_a_convolution_that_doubles_what_it_cannot_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    whole = doubling(tile_height=6, tile_width=4, cell_height=2, cell_width=4)
    make_plan().add(whole, FLOATS, KERNELS_OF_DOUBLING)
    with pytest.raises(ValueError, match=message):
        make_plan().add(doubling(**changes), FLOATS, KERNELS_OF_DOUBLING)


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        ("float32", torch.int32),
        ("float32", torch.bfloat16),
        ("float16", torch.bfloat16),
        ("bfloat16", torch.float16),
    ],
)
def test_weights_of_a_convolution_have_the_type_of_its_kernels(
    dtype: str, wrong: torch.dtype
) -> None:
    width = 4 if dtype == "float32" else 2
    weights = torch.zeros(1024 * width // wrong.itemsize, dtype=wrong)
    with pytest.raises(TypeError, match="another type"):
        make_plan(dtype).add(convolution(), FLOATS, weights)
    with pytest.raises(TypeError, match="another type"):
        make_plan().add(convolution(), torch.zeros(32, dtype=torch.int32), PACKED)


@pytest.mark.parametrize("cell", [{"cell_height": 3}, {"cell_width": 5}, {"cell_height": 0}])
def test_tiles_that_do_not_consist_of_whole_cells_are_refused(cell: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cells"):
        make_plan().add(convolution(**{"tile_height": 4, "tile_width": 4, **cell}), FLOATS, PACKED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stacked": 2}, "whole stacks of frames"),
        ({"stacked": 0}, "whole stacks of frames"),
        ({"batch": 2, "stacked": 2, "at_once": 0}, "whole stacks of frames"),
        ({"batch": 3, "stacked": 3, "at_once": 2}, "whole stacks of frames"),
        ({"batch": 2, "stacked": 2}, "without those before it"),
        ({"batch": 2, "stacked": 2, "earlier": [IMAGE] * 2, "left_out": 1}, "without those before"),
        ({"batch": 2, "stacked": 2, "at_once": 2, "earlier": [IMAGE] * 2}, "made at once"),
    ],
)
def test_a_stack_of_frames_has_those_before_it_and_is_made_in_whole_parts(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan().add(convolution(**changes), FLOATS, PACKED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over_clip": True, "left_out": 1}, "over a clip that takes other frames"),
        ({"over_clip": True, "earlier": [IMAGE, _engine.Image()]}, "takes other frames"),
        ({"over_clip": True}, "weights of another size"),
        ({"partials": 2 * AFTER, "image_cells": -1}, "statistics of images overlap"),
        ({"partials": 2 * AFTER, "image_cells": 2**62, "batch": 3}, "lie|overflow|overlap|another"),
    ],
)
def test_a_convolution_over_a_clip_takes_no_other_frames(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan().add(convolution(**changes), FLOATS, PACKED)
