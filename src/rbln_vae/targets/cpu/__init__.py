"""The target `cpu`."""

from __future__ import annotations

from ..reference import InterpreterTarget


class CpuTarget(InterpreterTarget):
    name = "cpu"
    description = "this machine's processor"


TARGET = CpuTarget()
