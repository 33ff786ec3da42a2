"""Schedules by PyTorch's kernels, on a CPU or a GPU: the targets `reference` and `cuda`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ...artifact import Artifact, read_artifact
from ...errors import RBLNArtifactError
from ...graph.headroom import give_headroom
from ...graph.ir import Graph
from ...graph.passes import optimise
from ..base import CompiledPart, CompileOptions, GraphTarget, RuntimeOptions
from .runtime import TorchRuntime


class TorchTarget(GraphTarget):
    """A target that stores the optimised graph and runs it by PyTorch's kernels."""

    any_device = True
    # Goes up with every change of bits: of chunks, of how they are summed, of the calls.
    arithmetic = 3

    def compile(self, graph: Graph, options: CompileOptions) -> Artifact:
        dtype = options.dtype or self.best_dtype()
        graph = optimise(graph)
        if dtype == "float16":
            # What leaves the range is run again, which a video can't be.
            graph = give_headroom(graph.start.stateless())
        return Artifact(graph, self.name, dtype, options.source)

    def load(self, path: Path) -> Artifact:
        artifact = read_artifact(path)
        if artifact.target != self.name:
            raise RBLNArtifactError(
                f"{path} was compiled for the target {artifact.target!r}, and the configuration "
                f"beside it says {self.name!r}: they don't belong together. Save the model again."
            )
        if artifact.packed is not None:
            raise RBLNArtifactError(
                f"{path} holds packed weights, which the target {self.name!r} doesn't read. "
                "Compile the model again."
            )
        return artifact

    def create_runtime(self, compiled: CompiledPart, options: RuntimeOptions) -> TorchRuntime:
        self.require()
        assert isinstance(compiled, Artifact)
        device = self.default_device() if options.device is None else options.device
        dtype = getattr(torch, compiled.dtype)
        return TorchRuntime(compiled.graph, dtype, str(device), options, self.free_memory(device))

    def free_memory(self, device: int | str) -> Callable[[], int] | None:
        """What tells the bytes that are free on a device before each run, where that varies."""
        return None
