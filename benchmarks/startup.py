"""What comes before the first run: loading the compiled model, and planning for a shape.

Or, in a pipeline, compiling at the first start and taking the result from the cache at later ones.

Each round is a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from .models import load, make_input, make_model
from .report import write


def measure(sizes: Sequence[int], rounds: int) -> str:
    """Load Stable Diffusion's VAE and plan for each size.

    Args:
        sizes: Pixels a side.
        rounds: Processes.

    Returns:
        A Markdown table of milliseconds.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as temporary:
        with context.Pool(1) as pool:
            pool.apply(_compile, (Path(temporary),))
        # A process for each call.
        with context.Pool(1, maxtasksperchild=1) as pool:
            runs = [pool.apply(_start, (Path(temporary), sizes)) for _ in range(rounds)]
        for number, run in enumerate(runs):
            run.update(starts_of_a_pipeline(Path(temporary), Path(temporary) / f"cache-{number}"))
    lines = ["| | median ms | min to max |", "| --- | ---: | ---: |"]
    for name in runs[0]:
        times = [run[name] * 1e3 for run in runs]
        lines.append(
            f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} |"
        )
    table = "\n".join(lines)
    write("startup", table, {"runs": runs})
    return table


def starts_of_a_pipeline(directory: Path, cache: Path) -> dict[str, float]:
    """Seconds of `compile_pipeline` in two processes, of which the second finds the result.

    Args:
        directory: With the model, in `original`.
        cache: An empty directory.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {
            f"compile_pipeline, {which} start": pool.apply(_start_pipeline, (directory, cache))
            for which in ("first", "second")
        }


def _start_pipeline(directory: Path, cache: Path) -> float:
    from diffusers import DiffusionPipeline

    from rbln_vae import compile_pipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, vae: object) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    os.environ["RBLN_VAE_CACHE"] = str(cache)
    pipe = Pipeline(load(directory / "original"))
    start = time.perf_counter()
    compile_pipeline(pipe, rbln_target="cpu")
    return time.perf_counter() - start


def _compile(directory: Path) -> None:
    from rbln_vae import RBLNAutoencoderKL

    make_model(directory / "original")
    RBLNAutoencoderKL.from_pretrained(
        directory / "original", export=True, rbln_target="cpu", rbln_create_runtimes=False
    ).save_pretrained(directory / "compiled")


def _start(directory: Path, sizes: Sequence[int]) -> dict[str, float]:
    """Seconds of each thing in this process."""
    from rbln_vae import RBLNAutoencoderKL
    from rbln_vae.artifact import read_artifact
    from rbln_vae.targets.cpu.lower import lower
    from rbln_vae.targets.cpu.runtime import CpuRuntime

    found: dict[str, float] = {}
    # The first imports what it needs.
    for name in ("from_pretrained, with imports", "from_pretrained"):
        start = time.perf_counter()
        RBLNAutoencoderKL.from_pretrained(directory / "compiled")
        found[name] = time.perf_counter() - start
    for part in ("decode", "encode"):
        artifact = read_artifact(directory / "compiled" / f"{part}r.rbln")
        runtime = CpuRuntime(artifact.graph, artifact.packed, dtype=artifact.dtype)
        for size in sizes:
            shape = make_input(directory / "compiled", part, size).shape
            start = time.perf_counter()
            search = runtime.images.search(tuple(shape))
            lower(search.keeping_all(shape[0]), search.rules(shape[0]))
            found[f"plan, {part}r {size}²"] = time.perf_counter() - start
    return found
