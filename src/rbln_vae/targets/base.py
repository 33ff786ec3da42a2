"""What a target is, and the list of them.

A target compiles parts of models, loads what it compiled, and makes runtimes, which run images.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from ..config import TARGETS
from ..errors import RBLNTargetUnavailableError
from ..graph.capture import capture
from ..graph.ir import Graph
from ..host import usable_memory
from ..levels import levels_of
from ..profiler import RunProfile
from .watch import Progress, ShouldStop

if TYPE_CHECKING:
    from .stream import Chunks, Stream


class CompiledPart(Protocol):
    """One part of a model, compiled for a target."""

    @property
    def part(self) -> str:
        """The name of the part."""

    @property
    def dtype(self) -> str | None:
        """In what it computes; `None` where the target's own files don't say."""

    @property
    def source(self) -> Mapping[str, str]:
        """What it was compiled from; empty where the target's own files don't say."""

    @property
    def in_channels(self) -> int | None:
        """Channels of its input; `None` where the target's own files don't say."""

    def save(self, path: Path) -> None:
        """Write it to a `.rbln` file, atomically."""


@dataclass(frozen=True)
class CompileOptions:
    """What a graph is compiled for.

    Attributes:
        input_shape: `(N, C, H, W)` that the model is tuned for, or fixed to.
        dtype: In what to compute; `None` is what is best on the target.
        source: What the graph was captured from, kept in the file.
        npu: The RBLN chip.
        num_devices: Devices that share the model.
        part: The name of the part of the model.
    """

    input_shape: tuple[int, int, int, int]
    dtype: str | None = None
    source: Mapping[str, str] = field(default_factory=dict)
    npu: str | None = None
    num_devices: int = 1
    part: str = "model"


@dataclass(frozen=True)
class RuntimeOptions:
    """How a compiled part runs; see `RBLNModelConfig`.

    Attributes:
        dtype: In what the part computes, for targets whose own files don't say; by default
            what its file says.
    """

    dtype: str | None = None
    device: int | str | None = None
    num_threads: int | None = None
    memory_limit: int | None = None
    timeout: float | None = None
    activate_profiler: bool = False


OnRows: TypeAlias = Callable[[int, Tensor], object]
"""Called with the first row and with rows `(N, C, rows, W)` of a result."""


class Runtime(Protocol):
    """A compiled part on its device, ready to run; several threads may share it."""

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

        Args:
            image: `(N, C, H, W)` of any strides and floating dtype, or uint8 for the levels of a
                picture; not written to. It is on the CPU unless the target takes `any_device`.
            out: Where to write the result, on the same devices, of its shape and any strides
                and floating dtype, or uint8 for levels; it shares no memory with the image.
            should_stop: Asked at most every 50 ms, on the calling thread; true stops the run.
            progress: Called as often with the work that is done and with all of it, in
                thousandths of an image; and at the end, when both are the same. What it raises
                ends the run and passes through.
            memory_limit: The most bytes of this run besides the weights, if that is less than
                the limit of the runtime.
            levels: Whether the result is the levels that show it, instead of floats.
            finite: Gets whether each image had only finite values before they became
                levels: bool `(N,)`.
            on_rows: Called on the calling thread as rows are finished in all images: from the
                top, once for each row. What it raises ends the run and passes through.

        Returns:
            `out`, or a new tensor where the image is: in its dtype, float32 if that is levels;
            or levels, whose channels are the last axis in memory.

        Raises:
            TimeoutError: The run took longer than its timeout.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than its memory limit.
        """

    def chunks(self, shape: tuple[int, ...]) -> Chunks:
        """What the runs of a stream take and give.

        Args:
            shape: `(N, C, H, W)` of a frame.

        Raises:
            ValueError: The part takes no such frames, or runs images alone.
        """

    def stream(
        self,
        shape: tuple[int, ...],
        result_bytes: int | None = None,
        memory_limit: int | None = None,
    ) -> Stream:
        """Begin to run the part on a batch of videos.

        Args:
            shape: `(N, C, H, W)` of a frame.
            result_bytes: What results take that are there at the same time, for the memory
                limit. By default those of one run in float32.
            memory_limit: The most bytes of each run, state included; the smaller of it and the
                runtime's holds. By default that of the runtime.

        Raises:
            ValueError: The part takes no such frames, or runs images alone.
            MemoryError: It would need more than its memory limit, state included.
        """

    def memory_needed(self, shape: tuple[int, ...]) -> int:
        """Bytes that a run on an input of that shape takes, besides weights.

        Args:
            shape: `(N, C, H, W)`; or `(N, C, T, H, W)` for a stream of videos, which takes the
                same for any `T`: state, activations, and the frames of one run.

        Raises:
            ValueError: The part takes no such input.
            MemoryError: It would need more than its memory limit.
        """

    def seconds_expected(self, shape: tuple[int, ...]) -> float | None:
        """About how long a run on an input of that shape takes alone; `None` if it isn't known.

        Raises:
            ValueError: The part takes no such input.
            MemoryError: It would need more than its memory limit.
        """

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Take less memory than the limit allows, where the target knows how.

        Args:
            slicing: Whether to run the images of a batch one by one.
            tiling: Whether to run each in less memory, for some more time.
        """

    def describe(self, shape: tuple[int, ...], *, steps: bool = False) -> str:
        """What a run on an input of that shape takes in memory and work, for a reader.

        Args:
            shape: As of `memory_needed`.
            steps: Whether to list what it does, too.

        Raises:
            ValueError: The part takes no such input.
            MemoryError: It would need more than its memory limit.
        """

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active."""


class Target(ABC):
    """A kind of machine that models are compiled for."""

    name: ClassVar[str]
    """As given to `target=`."""
    description: ClassVar[str]
    """What it is, in a line."""
    static_shapes: ClassVar[bool] = False
    """Whether a compiled model takes only the shape that it was compiled for."""
    exact_batches: ClassVar[bool] = False
    """Whether each sample of a batch gets the same bits as in a run of its own."""
    arithmetic: ClassVar[int] = 1
    """The version of its arithmetic: the same model may give other bits by another version."""
    any_device: ClassVar[bool] = False
    """Whether its runtimes take and give tensors on any device; else on the CPU alone."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options of a configuration that no other target takes."""

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why this machine can't run it and what to install; `None` if it can."""

    def toolchain(self) -> str:
        """What compiles besides this package and torch, with its version; by default nothing."""
        return ""

    def facts(self) -> list[str]:
        """What this machine and this build have for it: lines for a reader, by default none."""
        return []

    @abstractmethod
    def default_device(self) -> int | str:
        """The device on which a model runs if none is named."""

    def owns(self, device: int | str) -> bool:
        """Whether it runs on a device, as options name one: `0`, `"cpu"` or `"cuda:1"`."""
        return _kind(device) == _kind(self.default_device())

    def usable_memory(self, device: int | str) -> int:
        """Bytes that runs on a device may take, with all else that is there.

        That is the memory of this machine, or of the control group of the process, unless the
        target knows of memory that is the device's own.

        Args:
            device: As `default_device` gives one.
        """
        return usable_memory()

    @abstractmethod
    def best_dtype(self) -> str:
        """What is fastest here at an error that the model bears."""

    @abstractmethod
    def compile_module(self, module: nn.Module, options: CompileOptions) -> CompiledPart:
        """Compile a part of a model.

        Args:
            module: Takes an image and gives an image; it is not changed.
            options: What to compile it for.

        Raises:
            RBLNCompileError: The target can't run what the module does.
        """

    @abstractmethod
    def load(self, path: Path) -> CompiledPart:
        """Read what a compiled model's `save` wrote.

        Raises:
            RBLNArtifactError: The file isn't one of this target, or is damaged.
        """

    @abstractmethod
    def create_runtime(self, compiled: CompiledPart, options: RuntimeOptions) -> Runtime:
        """Put a compiled part on its device.

        Raises:
            RBLNTargetUnavailableError: This machine can't run it.
        """

    def require(self) -> None:
        """Raise an `RBLNTargetUnavailableError` where this machine can't run the target."""
        reason = self.unavailable_reason()
        if reason is not None:
            raise RBLNTargetUnavailableError(f"The target {self.name!r} can't run here: {reason}")


def _kind(device: int | str) -> str:
    """`npu`, `cpu` or `cuda`."""
    return "npu" if isinstance(device, int) else device.partition(":")[0]


@runtime_checkable
class BuildsGraph(Protocol):
    """A module that builds its graph itself, instead of being traced."""

    def graph(self) -> Graph:
        """The graph."""


class GraphTarget(Target):
    """A target that runs our own graphs, not what another compiler makes of a module."""

    def compile_module(self, module: nn.Module, options: CompileOptions) -> CompiledPart:
        if isinstance(module, BuildsGraph):
            return self.compile(module.graph(), options)
        return self.compile(capture(module, options.part, options.input_shape[1]), options)

    @abstractmethod
    def compile(self, graph: Graph, options: CompileOptions) -> CompiledPart:
        """Set a captured graph up for the target.

        Raises:
            RBLNCompileError: The target can't run the graph.
        """


def hand_over(
    result: Tensor,
    dtype: torch.dtype,
    out: Tensor | None,
    levels: bool,
    finite: Tensor | None,
    on_rows: OnRows | None,
) -> Tensor:
    """Give the whole result of a run to its caller, as `Runtime.run` promises.

    Args:
        result: Floats on any device, in which nobody else writes.
        dtype: Of the input.
        out: As of `Runtime.run`, and so are the others.
        levels: As of `Runtime.run`.
        finite: As of `Runtime.run`.
        on_rows: As of `Runtime.run`.

    Returns:
        As `Runtime.run`.
    """
    dtype = dtype if dtype.is_floating_point else torch.float32
    if levels:
        result = result.to(dtype)
        if finite is not None:
            finite.copy_(result.isfinite().flatten(1).all(1))
        result = levels_of(result).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        dtype = torch.uint8
    given = result.to("cpu", dtype) if out is None else out.copy_(result)
    if on_rows is not None:
        on_rows(0, given)
    return given


def only_images(part: str) -> ValueError:
    """The error of a part that is to run a video, and runs images."""
    return ValueError(
        f"The {part} was compiled for images of one frame. Compile the model again for videos: "
        "without rbln_num_frames=1, for a target other than 'rbln', and with dtype 'bfloat16' or "
        "'float32'."
    )


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in TARGETS:
        raise ValueError(f"There is no target {name!r}; there are {', '.join(TARGETS)}.")
    target: Target = importlib.import_module(f".{name}", __package__).TARGET
    return target


def all_targets() -> list[Target]:
    """Every target, whether it can run here or not."""
    return [get_target(name) for name in TARGETS]


def default_target() -> Target:
    """`rbln` where an NPU is present, else `cpu`."""
    rbln = get_target("rbln")
    return rbln if rbln.unavailable_reason() is None else get_target("cpu")
