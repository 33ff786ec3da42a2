"""The engine's kernels that this machine runs, and how fast they can be."""

from __future__ import annotations

import functools
import os
import warnings

from ... import _engine
from ...errors import RBLNTargetUnavailableError


def left_out_warning() -> str | None:
    """What a user should know of instruction sets that this build lacks; `None` if it has all."""
    left_out = _engine.left_out()
    if not left_out:
        return None
    return (
        f"This build of rbln-vae has no kernels for {', '.join(left_out)}, which this processor "
        "has, so runs may be several times slower. Install a wheel of rbln-vae, or build it with "
        "another compiler: pip install --verbose prints what the build leaves out, and why."
    )


@functools.cache
def warn_of_left_out() -> None:
    """Warn of instruction sets that this build lacks, once in a process."""
    if (warning := left_out_warning()) is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)


def usable_kernels() -> list[_engine.Kernels]:
    """The kernels that this machine can run and `RBLN_VAE_ISA` allows, the best last.

    If an instruction set has kernels for both dtypes, both multiply in float32, and those of
    float32 come last.

    Raises:
        ValueError: `RBLN_VAE_ISA` does not name an instruction set.
        RBLNTargetUnavailableError: This machine or this build lacks that instruction set.
    """
    kernels = _engine.all_kernels()
    forced = os.environ.get("RBLN_VAE_ISA")
    if not forced:
        return kernels
    known = _engine.instruction_sets()
    if forced not in known:
        raise ValueError(f"RBLN_VAE_ISA is {forced!r}, expected one of {', '.join(known)}.")
    present = {each.isa for each in kernels}
    if forced not in present:
        raise RBLNTargetUnavailableError(
            f"RBLN_VAE_ISA is {forced!r}, but this machine and this build only have "
            f"{', '.join(isa for isa in known if isa in present)}."
        )
    allowed = known[: known.index(forced) + 1]
    return [each for each in kernels if each.isa in allowed]


@functools.cache
def measured_limit(isa: str, dtype: str, threads: int) -> float:
    """The peak of a number of threads in floating-point operations per second; 0 if unknown.

    It is measured once in a process, three times for a tenth of a second, with random data. The
    highest counts: threads that have just begun may share a core for that long.
    """
    (kernels,) = (k for k in _engine.all_kernels() if (k.isa, k.dtype) == (isa, dtype))
    return max(kernels.measure_limit(threads, 0.1) for _ in range(3))


def best_dtype() -> str:
    """`"bfloat16"` if the machine multiplies it faster than float32, else `"float32"`."""
    return usable_kernels()[-1].dtype


def chosen_kernels(dtype: str) -> _engine.Kernels:
    """The best kernels for a dtype that the operating system permits."""
    return next(k for k in reversed(usable_kernels()) if k.dtype == dtype and k.prepare())
