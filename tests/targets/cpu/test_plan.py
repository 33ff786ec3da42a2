"""What the engine refuses to take into a plan, so that no step can leave its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rbln_vae import _engine

SHAPE = (1, 32, 8, 8)
IMAGE = (0, 32, 8, 8, 64, 64)
AFTER = 32 * 64 * 4
"""The first byte behind an image of float32."""


def kernels(dtype: str) -> _engine.Kernels:
    return next(each for each in _engine.all_kernels() if each.dtype == dtype)


def make_plan(dtype: str = "float32") -> _engine.Plan:
    return _engine.Plan(kernels(dtype), 2**20, SHAPE, SHAPE)


def norm(**changes: Any) -> dict[str, Any]:
    usual = {
        "batch": 1,
        "channels": 32,
        "groups": 4,
        "eps": 1e-6,
        "weight": torch.ones(32),
        "bias": torch.zeros(32),
        "partials": AFTER,
        "partial_channels": 32,
        "grid": (8, 8),
        "tile": (8, 8),
        "points": 1,
        "coefficients": 2 * AFTER,
    }
    return {**usual, **changes}


def convolution(**changes: Any) -> dict[str, Any]:
    usual = {
        "batch": 1,
        "input": IMAGE,
        "output": (AFTER, *IMAGE[1:]),
        "bias": torch.zeros(32),
        "weights": torch.zeros(2, 1, 1, 1, 512),
        "kernel": (1, 1),
        "stride": 1,
        "above": 0,
        "left": 0,
        "upsample": False,
        "coefficients": None,
        "activation": None,
        "residual": None,
        "partials": None,
        "tile": (8, 8),
        "splits": 1,
        "together": 1,
    }
    return {**usual, **changes}


def test_what_fits_is_taken() -> None:
    plan = make_plan()
    plan.convolution(**convolution())
    plan.norm(**norm())
    plan.statistics(batch=1, input=IMAGE, tile=(8, 8), partials=AFTER)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": (2**40, 2**40), "tile": (2**40, 2**40)},
        {"grid": (2**62, 8), "tile": (2**62, 8)},
        {"points": 2**62},
        {"grid": (2**31, 2**31), "tile": (2**31, 2**31), "points": 4},
        {"tile": (2**62, 8)},
        {"tile": (0, 8)},
        {"partials": 2**20},
    ],
)
def test_a_norm_whose_sizes_overflow_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"overflows|tiles|don't lie"):
        make_plan().norm(**norm(**changes))


@pytest.mark.parametrize("tile", [(2**62, 2**62), (8, 2**63 - 1), (9, 8), (0, 8), (-1, 8)])
def test_statistics_of_tiles_beyond_the_image_are_refused(tile: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="tiles"):
        make_plan().statistics(batch=1, input=IMAGE, tile=tile, partials=AFTER)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16])
def test_weights_of_a_norm_are_float32(name: str, dtype: torch.dtype) -> None:
    # As many bytes, so that their number tells nothing.
    wrong = torch.zeros(32 * 4 // dtype.itemsize, dtype=dtype)
    with pytest.raises(TypeError, match="another type"):
        make_plan().norm(**norm(**{name: wrong}))


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [("float32", torch.int32), ("float32", torch.bfloat16), ("bfloat16", torch.float16)],
)
def test_weights_of_a_convolution_have_the_type_of_its_kernels(
    dtype: str, wrong: torch.dtype
) -> None:
    width = 4 if dtype == "float32" else 2
    weights = torch.zeros(1024 * width // wrong.itemsize, dtype=wrong)
    with pytest.raises(TypeError, match="another type"):
        make_plan(dtype).convolution(**convolution(weights=weights))
    with pytest.raises(TypeError, match="another type"):
        make_plan().convolution(**convolution(bias=torch.zeros(32, dtype=torch.int32)))
