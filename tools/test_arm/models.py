"""Runs small whole models on another processor than the one that compiled them.

`models.py write DIRECTORY` compiles them here and keeps what the interpreter makes of them;
`models.py run DIRECTORY` runs them there, and compares.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from rbln_vae import _engine
from rbln_vae.graph.interpreter import Interpreter
from rbln_vae.targets.base import CompileOptions
from rbln_vae.targets.cpu import TARGET
from rbln_vae.targets.cpu.runtime import CpuRuntime

LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
"""The largest relative L2 error of a dtype."""


def write(directory: Path) -> None:
    """Compile both parts of a model in every dtype, and keep what the interpreter makes of them."""
    from vaes import capture_part, make_vae

    torch.manual_seed(0)
    vae = make_vae(block_out_channels=(32, 64), norm_num_groups=8)
    shapes = {"encoder": (2, 3, 36, 44), "decoder": (2, 4, 18, 22)}
    for part, shape in shapes.items():
        graph = capture_part(vae, part)
        image = torch.randn(shape)
        torch.save((image, Interpreter(graph).run(image)), directory / f"{part}.pt")
        for dtype in LIMITS:
            artifact = TARGET.compile(graph, CompileOptions(shape, dtype))
            artifact.save(directory / f"{part}-{dtype}.rbln")


def run(directory: Path) -> int:
    """Run them with every instruction set, and return how many are too far off."""
    counts = {True: 0, False: 0}
    for kernels in _engine.all_kernels():
        os.environ["RBLN_VAE_ISA"] = kernels.isa
        for path in sorted(directory.glob(f"*-{kernels.dtype}.rbln")):
            image, expected = torch.load(directory / f"{path.stem.split('-')[0]}.pt")
            artifact = TARGET.load(path)
            runtime = CpuRuntime(artifact.graph, artifact.packed, dtype=kernels.dtype)
            assert runtime.machine.isa == kernels.isa
            error = float((runtime.run(image) - expected).norm() / expected.norm())
            counts[error <= LIMITS[kernels.dtype]] += 1
            print(f"{path.stem} with {kernels.isa}: an error of {error:.1e}")
    print(f"{counts[True]} passed, {counts[False]} failed")
    return counts[False] + (not counts[True])


if __name__ == "__main__":
    command, directory = sys.argv[1], Path(sys.argv[2])
    sys.exit(write(directory) if command == "write" else run(directory))
