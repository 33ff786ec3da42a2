"""The target `cpu`."""

from __future__ import annotations

from ..reference import InterpreterTarget


class CpuTarget(InterpreterTarget):
    """This machine's processor."""

    name = "cpu"
    description = "this machine's processor"


TARGET = CpuTarget()
