"""The target `cpu`: this machine's processor, by the package's own engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ... import _engine
from ...artifact import Artifact, read_artifact
from ...errors import RBLNArtifactError
from ...graph.headroom import give_headroom
from ...graph.ir import Graph
from ...graph.passes import optimise
from ..base import CompiledPart, CompileOptions, GraphTarget, RuntimeOptions
from .kernels import best_dtype, left_out_warning
from .packing import check_packed, pack
from .runtime import CpuRuntime


class CpuTarget(GraphTarget):
    """This machine's processor; one compiled model serves every shape and instruction set."""

    name = "cpu"
    description = "this machine's processor, by the native engine"
    exact_batches = True  # how work is divided doesn't change the order of any sum
    # Goes up with every change of bits: of algorithms, of when they are taken, of sums, of packing.
    arithmetic = 6

    def unavailable_reason(self) -> str | None:
        return None

    def facts(self) -> list[str]:
        features = _engine.cpu_features()
        lines = [
            f"processor: {', '.join(features) or 'no known instruction sets'}",
            f"kernels: {', '.join(dict.fromkeys(k.isa for k in _engine.built_kernels()))}",
        ]
        left_out = left_out_warning()
        return [*lines, left_out] if left_out else lines

    def default_device(self) -> int | str:
        return "cpu"

    def best_dtype(self) -> str:
        return best_dtype()

    def compile(self, graph: Graph, options: CompileOptions) -> Artifact:
        graph = optimise(graph)
        dtype = options.dtype or self.best_dtype()
        if dtype == "float16":
            # What leaves the range is run again, which a video can't be.
            graph = give_headroom(graph.start.stateless())
        packed = pack(graph, dtype)
        graph = _without_weights(graph)
        # What the engine has no kernel for is an error now, not at the first run.
        CpuRuntime(graph, packed, dtype=dtype, num_threads=1).planned(options.input_shape)
        return Artifact(graph, self.name, dtype, options.source, packed=packed)

    def load(self, path: Path) -> Artifact:
        artifact = read_artifact(path)
        if artifact.target != self.name or artifact.packed is None:
            raise RBLNArtifactError(
                f"{path} was compiled for the target {artifact.target!r}, and the configuration "
                f"beside it says {self.name!r}: they don't belong together. Save the model again."
            )
        try:
            check_packed(artifact.graph, artifact.packed, artifact.dtype)
        except ValueError as error:
            raise RBLNArtifactError(
                f"{path} is not valid: {error}. Compile the model again."
            ) from error
        return artifact

    def create_runtime(self, compiled: CompiledPart, options: RuntimeOptions) -> CpuRuntime:
        assert isinstance(compiled, Artifact) and compiled.packed is not None
        return CpuRuntime(
            compiled.graph,
            compiled.packed,
            dtype=compiled.dtype,
            num_threads=options.num_threads,
            memory_limit=options.memory_limit,
            timeout=options.timeout,
            activate_profiler=options.activate_profiler,
        )


def _without_weights(graph: Graph) -> Graph:
    """The graphs of a part with the shapes of their weights alone."""
    shapes = {
        name: torch.empty(weight.shape, dtype=torch.float32, device="meta")
        for name, weight in graph.weights.items()
    }
    first = None if graph.first is None else _without_weights(graph.first)
    return dataclasses.replace(graph, weights=shapes, first=first)


TARGET = CpuTarget()
