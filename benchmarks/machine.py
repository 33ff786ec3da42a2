"""What machine a result was measured on."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rbln_vae.host import usable_processors

_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def threads() -> int:
    """The cores that this process may use."""
    return usable_processors()


def describe() -> dict[str, str]:
    """Processor, its instruction sets, memory, system and the versions of all contenders."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*:\s*(.*)", cpu)
    flags = re.search(r"flags\s*:\s*(.*)", cpu)
    found = flags[1].split() if flags else []
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    return {
        "processor": model[1] if model else platform.machine(),
        "cores used": str(threads()),
        "instruction sets": " ".join(name for name in _SETS if name in found),
        "limit measured": _limits(),
        "memory": f"{int(memory[1]) / 2**20:.1f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **{name: _version(name) for name in ("rbln-vae", "torch", "diffusers", "openvino")},
    }


def _limits() -> str:
    """What all threads together can multiply, on random data, by instruction set."""
    from rbln_vae import _engine

    # Kernels of both dtypes of an instruction set have one limit.
    kernels = {each.isa: each for each in _engine.all_kernels()}
    limits = {isa: each.measure_limit(threads(), 1.0) / 1e9 for isa, each in kernels.items()}
    return ", ".join(f"{isa} {limit:.0f} GFLOP/s" for isa, limit in limits.items() if limit)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
