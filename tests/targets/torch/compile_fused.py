"""Compiles Triton's kernels for GPUs, without one: what its interpreter accepts may not compile.

Prints the name of each kernel that was compiled.
"""

from __future__ import annotations

import inspect
import itertools

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from rbln_vae.graph.ir import ACTIVATIONS
from rbln_vae.targets.torch import fused

IMAGES = ("image", "out", "result", "residual", "bias", "scores")
VECTORS = ("scale", "shift", "pixel_weight", "sums", "weight")
BLOCK = {"PIXELS": 32, "CHANNELS": 128}

VARIANTS: dict[str, list[dict[str, object]]] = {
    "_read_kernel": [
        *(
            {"AFFINE": affine, "PIXEL": pixel, "FUNCTION": "silu", **BLOCK}
            for affine, pixel in ((True, False), (False, True))
        ),
        *({"AFFINE": False, "PIXEL": False, "FUNCTION": f, **BLOCK} for f in ("", *ACTIVATIONS)),
    ],
    "_write_kernel": [
        {"BIAS": b, "RESIDUAL": r, "STORES": w, "SUMS": s, "FUNCTION": "", **BLOCK}
        for b, r, w, s in itertools.product((True, False), repeat=4)
    ],
    "_coefficients_kernel": [{"MEMBERS": 16, "CHUNKS": 256}],
    "_softmax_kernel": [{"BLOCK": 2048}],
}


def type_of(kernel: str, argument: str, dtype: str) -> str:
    """The type of an argument of a kernel for images of a dtype."""
    if argument == "counts":
        return "*fp64"
    if kernel == "_coefficients_kernel" and argument in (*VECTORS, "bias", "out"):
        return "*fp32"
    if kernel == "_softmax_kernel" and argument == "scores":
        return "*fp32"
    if argument == "eps" or (argument == "scale" and kernel == "_softmax_kernel"):
        return "fp32"
    if argument in VECTORS:
        return "*fp32"
    return f"*{dtype}" if argument in IMAGES else "i32"


def compile_all(capability: int, dtype: str, most: int) -> None:
    """Compile at most so many variants of each kernel."""
    for name, variants in VARIANTS.items():
        kernel = getattr(fused, name)
        for constants in variants[:most]:
            signature = {
                argument: "constexpr" if argument in constants else type_of(name, argument, dtype)
                for argument in inspect.signature(kernel.fn).parameters
            }
            source = ASTSource(kernel, signature, constants)
            compile_kernel(source, target=GPUTarget("cuda", capability, 32))
        print(name, capability, dtype)


if __name__ == "__main__":
    compile_all(90, "bf16", 16)
    compile_all(75, "fp16", 1)
