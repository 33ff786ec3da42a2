"""Runs that nobody waits for, to be stopped."""

from __future__ import annotations

from typing import Any

import torch

from rbln_vae.graph.ir import Attention, Graph
from rbln_vae.targets.cpu.runtime import CpuRuntime


def attention_graph() -> Graph:
    """Attention of an image to itself: one operation, one step of a run."""
    return Graph(
        "decoder", ("x",), 32, ("y",), (Attention("y", "x", "x", "x", heads=1, scale=0.2),), {}
    ).verify()


def endless_run(dtype: str = "float32", **options: Any) -> tuple[CpuRuntime, torch.Tensor]:
    """A runtime and an image whose run takes minutes, all of them in one step."""
    runtime = CpuRuntime(attention_graph(), dtype=dtype, **options)
    return runtime, torch.randn(1, 32, 1024, 1024)
