"""Every kernel of every instruction set that this machine has, over one table of shapes."""

from __future__ import annotations

import pytest
import torch
from cases import ATTENTIONS, CONVOLUTIONS, AttentionCase, ConvCase

from rbln_vae import _engine
from rbln_vae.graph.interpreter import Interpreter
from rbln_vae.targets.cpu import runtime
from rbln_vae.targets.cpu.planner import Convolution
from rbln_vae.targets.cpu.runtime import CpuRuntime

try:
    # AMX tiles in plain C++; `make test-engine` builds it.
    from rbln_vae import _engine_emulated as emulated
except ImportError:
    emulated = None

Case = ConvCase | AttentionCase
CASES: tuple[Case, ...] = (*CONVOLUTIONS, *ATTENTIONS)
FLOAT32 = [k.isa for k in _engine.all_kernels() if k.dtype == "float32" and k.isa != "generic"]
BFLOAT16 = [k.isa for k in _engine.all_kernels() if k.dtype == "bfloat16" and k.isa != "generic"]


def image(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(case.shape, generator=generator)


def run(case: Case, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    native = CpuRuntime(case.graph(), dtype=dtype, num_threads=2)
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
def test_portable_bfloat16_is_near_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Interpreter(case.graph()).run(image(case))
    limit = 0.05 if isinstance(case, AttentionCase) and case.sharp > 1 else 0.015
    assert difference(run(case, "generic", "bfloat16", monkeypatch), expected) < limit


@pytest.mark.parametrize("isa", FLOAT32)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_kernels_agree(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(case, "generic", "float32", monkeypatch)
    assert difference(run(case, isa, "float32", monkeypatch), expected) < 2e-6


@pytest.mark.parametrize("isa", BFLOAT16)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_kernels_agree(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(case, "generic", "bfloat16", monkeypatch)
    # A value near the middle of two may be rounded to the other.
    limit = 0.03 if isinstance(case, AttentionCase) and case.sharp > 1 else 0.008
    assert difference(run(case, isa, "bfloat16", monkeypatch), expected) < limit


@pytest.mark.skipif(emulated is None, reason="`make test-engine` builds the emulated tiles")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_tiles_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_engine", emulated)
    expected = run(case, "generic", "bfloat16", monkeypatch)
    limit = 0.03 if isinstance(case, AttentionCase) and case.sharp > 1 else 0.008
    assert difference(run(case, "amx_bf16", "bfloat16", monkeypatch), expected) < limit


@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.height * c.width > 60], ids=str)
def test_tiles_of_one_item_follow_each_other(
    case: ConvCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    if emulated is not None:
        monkeypatch.setattr(runtime, "_engine", emulated)
    isa = "amx_bf16" if emulated is not None else BFLOAT16[-1] if BFLOAT16 else "generic"
    monkeypatch.setattr(
        Convolution, "tile", lambda self, _: (min(4, self.grid[0]), min(19, self.grid[1]))
    )
    alone = run(case, isa, "bfloat16", monkeypatch)
    monkeypatch.setattr(Convolution, "together", lambda *_: 3)
    assert torch.equal(run(case, isa, "bfloat16", monkeypatch), alone)
