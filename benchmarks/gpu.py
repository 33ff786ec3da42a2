"""Decoding on a GPU: this package, diffusers, its tiles, and torch.compile, in one process.

Time is that of whole calls, after which the device has nothing left to do. Memory is what
PyTorch's allocator had given out at most, weights included. The error is that against a float32
decode by this package, which needs the least memory of all.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rbln_vae import RBLNAutoencoder
from rbln_vae.metrics import relative_l2

from . import models
from .report import write

COMPILED_UP_TO = 1024
"""Larger images than this are not run by torch.compile, which takes long to compile; on a CPU none
is, where it takes minutes."""
BUDGET = 20.0
"""Seconds after which no further run of a contender is counted."""

Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Decoded:
    """What a contender did.

    Attributes:
        contender: Its name.
        size: Pixels a side.
        dtype: In what it computed.
        prepare: Seconds until its first result.
        seconds: The median of the counted runs.
        memory: The peak of the allocator in bytes; 0 on a CPU.
        error: The relative L2 error against float32.
        failure: Why it has no result; empty if it has.
    """

    contender: str
    size: int
    dtype: str
    prepare: float = 0.0
    seconds: float = 0.0
    memory: int = 0
    error: float = 0.0
    failure: str = ""


def measure(
    sizes: Sequence[int],
    device: str = "cuda",
    model: models.Model = models.MODELS["sd"],
    rounds: int = 5,
    memory_limit: str | None = None,
) -> list[Decoded]:
    """Measure every contender.

    Args:
        sizes: Pixels a side.
        device: `"cuda"`, or `"cpu"` for the target `reference`, to try the benchmark out.
        model: What to decode with.
        rounds: The most counted runs.
        memory_limit: What this package may take in a second measurement; by default there is
            none.
    """
    found: list[Decoded] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        models.make_model(directory, model)
        for size in sizes:
            latent = models.make_input(directory, "decode", size)
            exact = _ours(directory, device, "float32", None)(latent.to(device)).cpu()
            _release(device)
            for contender, dtype, prepare in _contenders(directory, device, size, memory_limit):
                found.append(_time(contender, dtype, prepare, latent, exact, device, rounds))
                print(row(found[-1]), flush=True)
                _release(device)
    return found


def _contenders(
    directory: Path, device: str, size: int, memory_limit: str | None
) -> list[tuple[str, str, Callable[[], Decode]]]:
    """The name and dtype of each contender for a size, and what makes it ready."""

    def ours(dtype: str, limit: str | None = None) -> Callable[[], Decode]:
        return lambda: _ours(directory, device, dtype, limit)

    def diffusers(dtype: str, how: str = "") -> Callable[[], Decode]:
        return lambda: _diffusers(directory, device, dtype, how)

    result = [("rbln-vae", "bfloat16", ours("bfloat16"))]
    if memory_limit is not None:
        name = f"rbln-vae within {memory_limit}"
        result.append((name, "bfloat16", ours("bfloat16", memory_limit)))
    result += [
        ("diffusers", "bfloat16", diffusers("bfloat16")),
        ("diffusers tiled", "bfloat16", diffusers("bfloat16", "tiled")),
    ]
    if size <= COMPILED_UP_TO and device != "cpu":
        result.append(("torch.compile", "bfloat16", diffusers("bfloat16", "compiled")))
    if size == 1024:
        result += [
            ("rbln-vae", "float16", ours("float16")),
            ("diffusers", "float16", diffusers("float16")),
        ]
    return result


def _ours(directory: Path, device: str, dtype: str, memory_limit: str | None) -> Decode:
    model = RBLNAutoencoder.from_pretrained(
        directory,
        export=True,
        rbln_target="reference" if device == "cpu" else "cuda",
        rbln_device=device,
        rbln_dtype=dtype,
        rbln_uses_encoder=False,
        rbln_memory_limit=memory_limit,
    )
    return lambda latent: models.run(model, "decode", latent)


def _diffusers(directory: Path, device: str, dtype: str, how: str) -> Decode:
    model = models.load(directory, torch_dtype=getattr(torch, dtype)).eval().to(device)
    model = model.to(memory_format=torch.channels_last)
    if how == "tiled":
        model.enable_tiling()
    if how == "compiled":
        model.decoder.forward = torch.compile(model.decoder.forward)
    return lambda latent: models.run(model, "decode", latent)


@torch.no_grad()
def _time(
    contender: str,
    dtype: str,
    prepare: Callable[[], Decode],
    latent: torch.Tensor,
    exact: torch.Tensor,
    device: str,
    rounds: int,
) -> Decoded:
    size = exact.shape[-1]
    given = latent.to(device, getattr(torch, dtype))
    try:
        begin = time.perf_counter()
        decode = prepare()
        result = decode(given)
        _finish(device)
        prepared = time.perf_counter() - begin
        error = relative_l2(result.float().cpu(), exact)
        del result
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        while len(times) < rounds and sum(times) < BUDGET:
            begin = time.perf_counter()
            decode(given)
            _finish(device)
            times.append(time.perf_counter() - begin)
    except (MemoryError, torch.OutOfMemoryError) as failure:
        return Decoded(contender, size, dtype, failure=f"no memory: {failure}".splitlines()[0])
    memory = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
    return Decoded(contender, size, dtype, prepared, statistics.median(times), memory, error)


def _finish(device: str) -> None:
    """Wait until the device has done everything."""
    if device != "cpu":
        torch.cuda.synchronize()


def _release(device: str) -> None:
    """Free what the last contender took."""
    torch.compiler.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def row(found: Decoded) -> str:
    """A line of the table."""
    head = f"| {found.size}² | {found.contender} | {found.dtype} |"
    if found.failure:
        return f"{head} {found.failure} | | | |"
    memory = f"{found.memory / 2**20:,.0f} MiB" if found.memory else "not counted"
    return (
        f"{head} {1000 * found.seconds:,.1f} ms | {memory} | {found.error:.1e} | "
        f"{found.prepare:.1f} s |"
    )


def table(found: Sequence[Decoded]) -> str:
    """All that was measured."""
    return "\n".join(
        [
            "| size | contender | dtype | time | peak memory | error | first result after |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
            *map(row, found),
        ]
    )


def save(name: str, device: str, found: Sequence[Decoded]) -> Path:
    """Write the table to `benchmarks/results`, with the name of the device."""
    said = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    return write(name, f"Device: {said}, torch {torch.__version__}\n\n{table(found)}")
