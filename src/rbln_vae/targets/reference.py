"""The target `reference`: the interpreter, with plain PyTorch on the CPU."""

from __future__ import annotations

import collections
import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..artifact import Artifact, read_artifact
from ..errors import RBLNArtifactError
from ..graph.interpreter import Interpreter, OnOperation
from ..graph.ir import Graph, Operation, Shape, Value
from ..graph.passes import optimise
from ..levels import sample_of
from ..profiler import RunProfile, Step
from ..sizes import format_size
from ..units import format_bytes
from .base import (
    CompiledPart,
    CompileOptions,
    GraphTarget,
    OnRows,
    RuntimeOptions,
    beyond_float16,
    hand_over,
    over_memory_limit,
)
from .watch import ShouldStop, Watch

_PROFILES_KEPT = 100


class InterpreterTarget(GraphTarget):
    """A target that stores the optimised graph and interprets it."""

    def unavailable_reason(self) -> str | None:
        return None

    def default_device(self) -> int | str:
        return "cpu"

    def best_dtype(self) -> str:
        return "float32"

    def compile(self, graph: Graph, options: CompileOptions) -> Artifact:
        dtype = options.dtype or self.best_dtype()
        return Artifact(optimise(graph), self.name, dtype, options.source)

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

    def create_runtime(self, compiled: CompiledPart, options: RuntimeOptions) -> InterpreterRuntime:
        assert isinstance(compiled, Artifact)
        device = self.default_device() if options.device is None else options.device
        return InterpreterRuntime(compiled, str(device), options)


class InterpreterRuntime:
    """Runs an artifact with the interpreter, within limits on time and memory."""

    def __init__(self, artifact: Artifact, device: str, options: RuntimeOptions) -> None:
        self._interpreter = Interpreter(artifact.graph, getattr(torch, artifact.dtype), device)
        self._wider: Interpreter | None = None
        self._options = options
        self._profiles: collections.deque[RunProfile] = collections.deque(maxlen=_PROFILES_KEPT)

    @property
    def profiles(self) -> list[RunProfile]:
        return list(self._profiles)

    def run(
        self,
        image: Tensor,
        out: Tensor | None = None,
        should_stop: ShouldStop | None = None,
        *,
        levels: bool = False,
        finite: Tensor | None = None,
        on_rows: OnRows | None = None,
    ) -> Tensor:
        interpreter = self._interpreter
        self._check_memory(image.shape)
        watch = Watch(self._options.timeout, should_stop)
        stopwatch = _Stopwatch(interpreter) if self._options.activate_profiler else None

        def before(index: int, operation: Operation) -> None:
            watch.check()
            if stopwatch is not None:
                stopwatch.lap()

        with _threads(self._options.num_threads):
            source = image
            if not image.is_floating_point():
                source = sample_of(image.to(interpreter.device))
            result = interpreter.run(source, before)
            if stopwatch is not None:
                stopwatch.lap()
                self._profiles.append(stopwatch.profile(tuple(image.shape)))
            result = self._in_range(result, source, lambda *_: watch.check())
        watch.check()
        return hand_over(result, image.dtype, out, levels, finite, on_rows)

    def _in_range(self, result: Tensor, image: Tensor, before: OnOperation) -> Tensor:
        """The result, with images that float16 could not hold run again in bfloat16."""
        first = self._interpreter
        if first.dtype != torch.float16:
            return result
        for n in range(len(result)):
            if result[n].isfinite().all() or not image[n].isfinite().all():
                continue
            if self._wider is None:
                warnings.warn(beyond_float16(first.graph.name), RuntimeWarning, stacklevel=2)
                self._wider = Interpreter(first.graph, torch.bfloat16, first.device)
            result = result.to(torch.float32)
            result[n] = self._wider.run(image[n : n + 1], before)[0].to(torch.float32)
        return result

    def memory_needed(self, shape: Shape) -> int:
        return peak_elements(self._interpreter.graph, shape) * self._interpreter.dtype.itemsize

    def seconds_expected(self, shape: Shape) -> float | None:
        """Always `None`: how fast the kernels of PyTorch are here isn't known."""
        return None

    def describe(self, shape: Shape, *, steps: bool = False) -> str:
        graph = self._interpreter.graph
        memory = format_bytes(self.memory_needed(shape))
        text = (
            f"{graph.name} on {format_size(shape)}: {memory} for activations, everything computed "
            "once"
        )
        return f"{text}\n{graph}" if steps else text

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Does nothing: the interpreter has only one way to run a graph."""

    def _check_memory(self, shape: Shape) -> None:
        limit = self._options.memory_limit
        if limit is None:
            return
        needed = self.memory_needed(shape)
        if needed > limit:
            name = self._interpreter.graph.name
            raise over_memory_limit(name, tuple(shape), needed, limit)


def peak_elements(graph: Graph, input_shape: Shape) -> int:
    """The largest total number of elements of all live values during a run."""
    shapes = graph.infer_shapes(input_shape)
    last = graph.last_uses()
    live: dict[Value, int] = {graph.input: math.prod(input_shape)}
    peak = live[graph.input]
    for index, operation in enumerate(graph.operations):
        live[operation.output] = math.prod(shapes[operation.output])
        peak = max(peak, sum(live.values()))
        live = {value: size for value, size in live.items() if last.get(value, -1) > index}
    return peak


class _Stopwatch:
    """Times the operations of one run."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.start = time.time()
        self.laps: list[float] = []

    def lap(self) -> None:
        if self.interpreter.device.type == "cuda":
            torch.cuda.synchronize(self.interpreter.device)
        self.laps.append(time.perf_counter())

    def profile(self, input_shape: Shape) -> RunProfile:
        graph = self.interpreter.graph
        shapes = graph.infer_shapes(input_shape)
        steps = []
        for operation, start, end in zip(
            graph.operations, self.laps[:-1], self.laps[1:], strict=True
        ):
            moved = sum(math.prod(shapes[v]) for v in (*operation.inputs, operation.output))
            moved += sum(graph.weights[name].numel() for name in operation.weights)
            steps.append(
                Step(
                    operation.output,
                    operation.kind,
                    start - self.laps[0],
                    end - start,
                    operation.flops(shapes, graph.weights),
                    moved * self.interpreter.dtype.itemsize,
                )
            )
        return RunProfile(graph.name, input_shape, self.start, tuple(steps))


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set the number of torch's threads during a block; `None` changes nothing."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ReferenceTarget(InterpreterTarget):
    """The interpreter itself."""

    name = "reference"
    description = "the graph in plain torch on the CPU: the oracle of the other targets"


TARGET = ReferenceTarget()
