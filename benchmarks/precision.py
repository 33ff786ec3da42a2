"""How far results are from those of diffusers in float64, and how near bfloat16 can come.

Beside the errors of this package and of diffusers stand those of diffusers in float32 with some
of its numbers rounded to bfloat16. Products of bfloat16 round weights and what they are
multiplied with, their factors, whatever else is done: so the row of both says what error such
products have at least.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.metrics import relative_l2

from .models import make_input, make_model
from .report import write

ROUNDED: dict[str, tuple[bool, bool, bool]] = {
    "weights rounded": (True, False, False),
    "factors rounded": (False, True, False),
    "weights and factors rounded": (True, True, False),
    "and what is stored": (True, True, True),
}
"""By name: whether weights, what they are multiplied with, and results are rounded."""


def measure(parts: Iterable[str], size: int, images: int) -> str:
    """Compare each part with diffusers in float64, on random weights and images.

    Args:
        parts: `"decode"`, `"encode"` or both.
        size: Pixels a side.
        images: Over how many the error is taken.

    Returns:
        A Markdown table of relative L2 errors.
    """
    lines = ["| | | relative L2 error | of that of diffusers bf16 |", "| --- | --- | ---: | ---: |"]
    data: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as directory, torch.no_grad():
        make_model(Path(directory))
        original = AutoencoderKL.from_pretrained(directory).eval()
        exact = copy.deepcopy(original).to(torch.float64)
        models = {
            "diffusers bf16": copy.deepcopy(original).to(torch.bfloat16),
            "rbln-vae bf16": _compiled(original, "bfloat16"),
            "rbln-vae f16": _compiled(original, "float16"),
            "diffusers f32": original,
            "rbln-vae f32": _compiled(original, "float32"),
            **{name: _rounded(original, *which) for name, which in ROUNDED.items()},
        }
        for part in parts:
            inputs = make_input(Path(directory), part, size, images)
            expected = _run(exact, part, inputs)
            found = {
                name: relative_l2(_run(model, part, inputs), expected)
                for name, model in models.items()
            }
            data[part] = found
            lines += [
                f"| {part} {size}² | {name} | {error:.2e} | {error / found['diffusers bf16']:.2f} |"
                for name, error in found.items()
            ]
    table = "\n".join(lines)
    write("precision", table, {"errors": data})
    return table


def _compiled(model: AutoencoderKL, dtype: str) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_model(model, rbln_target="cpu", rbln_dtype=dtype)


def _run(model: AutoencoderKL | RBLNAutoencoderKL, part: str, images: torch.Tensor) -> torch.Tensor:
    images = images.to(model.dtype)
    if part == "encode":
        return model.encode(images).latent_dist.parameters.double()
    return model.decode(images).sample.double()


def _rounded(original: AutoencoderKL, weights: bool, factors: bool, results: bool) -> AutoencoderKL:
    """The model in float32, with some of its numbers rounded to bfloat16."""
    model = copy.deepcopy(original)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            if weights:
                module.weight.copy_(_round(module.weight))
            if factors:
                module.register_forward_pre_hook(lambda _, inputs: (_round(inputs[0]),))
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, ResnetBlock2D)) and results:
            module.register_forward_hook(lambda *call: _round(call[-1]))
    return model


def _round(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).float()
