"""The target `rbln`: an RBLN NPU, through Rebellions' compiler.

The compiler, the module `rebel`, compiles a torch module for fixed shapes. So this target
passes it the torch module of a part, not a graph, in the same way as optimum-rbln 0.12.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    RBLNArtifactError,
    RBLNCompileError,
    RBLNRuntimeError,
    RBLNTargetUnavailableError,
)
from ..levels import sample_of
from ..profiler import RunProfile
from ..sizes import format_size
from .base import (
    CompiledPart,
    CompileOptions,
    OnRows,
    RuntimeOptions,
    Target,
    hand_over,
    only_images,
)
from .stream import Chunks, Stream
from .watch import Progress, ShouldStop, Watch

DEFAULT_TIMEOUT = 60.0
"""The most seconds of a run, as in optimum-rbln: only a timeout detects an NPU that hangs."""

_NO_COMPILER = (
    "Rebellions' compiler, the package rebel-compiler, is not installed. Install it as "
    "https://docs.rbln.ai says (it needs an account there), or use target='cpu'."
)


def _rebel() -> Any:
    """Import Rebellions' compiler."""
    if importlib.util.find_spec("rebel") is None:
        raise RBLNTargetUnavailableError(f"The target 'rbln' can't compile here: {_NO_COMPILER}")
    return importlib.import_module("rebel")


class RblnTarget(Target):
    """RBLN NPUs; every shape is fixed when compiling."""

    name = "rbln"
    description = "an RBLN NPU, by Rebellions' compiler"
    static_shapes = True
    own_options = ("npu", "num_devices")

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("rebel") is None:
            return _NO_COMPILER
        if _rebel().get_npu_name(0) is None:
            return (
                "the compiler finds no NPU. Check that rbln-smi lists one, use target='cpu', or "
                "compile without a device by create_runtimes=False and an npu."
            )
        return None

    def toolchain(self) -> str:
        rebel = _rebel()
        return f"rebel {getattr(rebel, '__version__', '')} for {rebel.get_npu_name(0)}"

    def default_device(self) -> int | str:
        return 0

    def best_dtype(self) -> str:
        return "float32"

    def compile_module(self, module: nn.Module, options: CompileOptions) -> RblnPart:
        rebel = _rebel()
        (name,) = inspect.signature(module.forward).parameters
        dtype = options.dtype or self.best_dtype()
        try:
            compiled = rebel.compile_from_torch(
                copy.deepcopy(module).to(getattr(torch, dtype)).eval(),
                input_info=[(name, list(options.input_shape), dtype)],
                npu=options.npu,
                **{_devices_keyword(rebel): options.num_devices},
            )
        except Exception as error:
            # The compiler runs the model's own Python code, which can raise anything.
            raise RBLNCompileError(
                f"Rebellions' compiler can't compile the {options.part}: {error}"
            ) from error
        return RblnPart(compiled, options.part, options.source, options.input_shape[1], dtype)

    def load(self, path: Path) -> RblnPart:
        try:
            return RblnPart(_rebel().RBLNCompiledModel(path), path.stem)
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, RBLNTargetUnavailableError):
                raise
            raise RBLNArtifactError(
                f"{path} can't be read by Rebellions' compiler: {error}. Compile the model again."
            ) from error

    def create_runtime(self, compiled: CompiledPart, options: RuntimeOptions) -> RblnRuntime:
        assert isinstance(compiled, RblnPart)
        if isinstance(options.device, str):
            raise ValueError(
                f"device={options.device!r} is none of the target 'rbln', whose devices are "
                "numbers: 0 is the first NPU. Leave device out, or compile for another target."
            )
        self.require()
        try:
            runtime = _rebel().Runtime(
                compiled.compiled,
                tensor_type="pt",
                device=options.device,
                activate_profiler=options.activate_profiler,
                timeout=DEFAULT_TIMEOUT if options.timeout is None else options.timeout,
            )
        except RuntimeError as error:
            raise RBLNRuntimeError(
                f"The NPU can't take the model: {error}. Check it with rbln-smi, name another "
                "device, or load the model with create_runtimes=False."
            ) from error
        dtype = options.dtype or compiled.dtype or self.best_dtype()
        return RblnRuntime(runtime, getattr(torch, dtype))


@dataclass(frozen=True)
class RblnPart:
    """One part of a model, compiled by Rebellions' compiler."""

    compiled: Any
    part: str
    source: Mapping[str, str] = field(default_factory=dict)
    in_channels: int | None = None
    dtype: str | None = None

    def save(self, path: Path) -> None:
        try:
            # In a temporary directory under its own name, as the compiler may check the suffix.
            with TemporaryDirectory(dir=path.parent) as directory:
                temporary = Path(directory) / path.name
                self.compiled.save(temporary)
                temporary.replace(path)
        except (OSError, RuntimeError) as error:
            raise RBLNArtifactError(f"{path} can't be written: {error}.") from error


class RblnRuntime:
    """A compiled part on its NPU, which takes images of one dtype."""

    def __init__(self, runtime: Any, dtype: torch.dtype) -> None:
        self._runtime = runtime
        self._dtype = dtype
        self._lock = threading.Lock()

    @property
    def profiles(self) -> list[RunProfile]:
        """Always empty: Rebellions' profiler writes its own files."""
        return []

    def chunks(self, shape: tuple[int, ...]) -> Chunks:
        """Always refused: only images are compiled for NPUs."""
        raise only_images("model")

    def stream(
        self,
        shape: tuple[int, ...],
        result_bytes: int | None = None,
        memory_limit: int | None = None,
    ) -> Stream:
        """Always refused: only images are compiled for NPUs."""
        raise only_images("model")

    def memory_needed(self, shape: tuple[int, ...]) -> int:
        """Always 0: a run needs only memory of the NPU, which is taken when the model loads."""
        return 0

    def seconds_expected(self, shape: tuple[int, ...]) -> float | None:
        """Always `None`: only the compiler knows."""
        return None

    def describe(self, shape: tuple[int, ...], *, steps: bool = False) -> str:
        return f"{format_size(shape)}: planned by the compiler, in the memory of the NPU"

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Does nothing: the compiler has already chosen."""

    def run(
        self,
        image: Tensor,
        out: Tensor | None = None,
        should_stop: ShouldStop | None = None,
        *,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        levels: bool = False,
        finite: Tensor | None = None,
        on_rows: OnRows | None = None,
    ) -> Tensor:
        """Run the part.

        A run on the NPU can't be stopped or looked at: `should_stop` and `progress` are called
        before and after it alone. `memory_limit` is ignored, since only the NPU's memory is taken.
        """
        watch = Watch(None, should_stop, progress, len(image))
        with self._lock:
            watch.check()
            sample = image if image.is_floating_point() else sample_of(image)
            # In a copy, since the compiler's runtime may write to its result again.
            result: Tensor = self._runtime(sample.to(self._dtype).contiguous()).clone()
        given = hand_over(result, image.dtype, out, levels, finite, on_rows)
        watch.finish()
        return given


def _devices_keyword(rebel: Any) -> str:
    """The keyword for the number of devices in this version of the compiler."""
    known = inspect.signature(rebel.compile).parameters
    return "num_devices" if "num_devices" in known else "tensor_parallel_size"


TARGET = RblnTarget()
