"""The target `rbln`: an RBLN NPU, by Rebellions' compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NoReturn

from ..graph.ir import Graph
from .base import CompiledModel, CompileOptions, Runtime, RuntimeOptions, Target


class RblnTarget(Target):
    """RBLN NPUs; every shape is fixed when compiling."""

    name = "rbln"
    description = "an RBLN NPU, by Rebellions' compiler"
    static_shapes = True
    dtypes = ("float32",)

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("rebel") is None:
            return (
                "Rebellions' compiler, the package rebel-compiler, is not installed. Install it "
                "as https://docs.rbln.ai says (it needs an account there), or use target='cpu'."
            )
        return (
            "this version of rbln-vae doesn't compile for the NPU. Use target='cpu', or "
            "optimum-rbln."
        )

    def default_device(self) -> int | str:
        return 0

    def best_dtype(self) -> str:
        return "float32"

    def compile(self, graph: Graph, options: CompileOptions) -> CompiledModel:
        self._refuse()

    def load(self, path: Path) -> CompiledModel:
        self._refuse()

    def create_runtime(self, compiled: CompiledModel, options: RuntimeOptions) -> Runtime:
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.require()
        raise AssertionError("a reason is always given")


TARGET = RblnTarget()
