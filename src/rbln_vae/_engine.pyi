"""The CPU engine."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch

def cpu_features() -> list[str]:
    """
    The instruction sets that this processor and operating system support, by the
    names of Linux's /proc/cpuinfo; empty where the processor isn't x86.
    """

class OutOfMemoryError(MemoryError):
    pass

class TimedOutError(TimeoutError):
    pass

class ThreadsUnavailableError(RuntimeError):
    pass

class Costs:
    """What parts of a convolution cost, in products that take as long."""

    @property
    def product(self) -> float:
        """A product, in those of float32."""

    @property
    def norm(self) -> float:
        """Norm and activation of an element."""

    @property
    def copy(self) -> float:
        """Copying an element."""

    @property
    def weights(self) -> float:
        """Fetching a weight that isn't in the L2 cache."""

class WinogradCosts:
    """What parts of Winograd's algorithm cost, in products of float32."""

    @property
    def input(self) -> float:
        """Transforming an input value."""

    @property
    def output(self) -> float:
        """Transforming an output value."""

    @property
    def product(self) -> float:
        """A product of transformed values."""

    @property
    def kernel(self) -> float:
        """A value of a transformed kernel."""

    @property
    def others(self) -> Costs:
        """All else, in products of float32."""

class Kernels:
    """The kernels of one instruction set for one element type."""

    @property
    def isa(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether products take bfloat16; elsewhere they are made in float32."""

    @property
    def rows(self) -> int:
        """Rows of output pixels that one product makes."""

    @property
    def pixels(self) -> int:
        """Pixels of each of these rows."""

    @property
    def panels(self) -> int:
        """Panels of 16 output channels that one product makes."""

    @property
    def overlaps(self) -> bool:
        """Whether a tile is loaded during the products of another."""

    @property
    def tile_bytes(self) -> int:
        """The most bytes for the input of a tile."""

    @property
    def most_queries(self) -> int:
        """The most queries of an attention item."""

    @property
    def costs(self) -> Costs: ...
    @property
    def winograd(self) -> WinogradCosts | None:
        """
        What Winograd's algorithm costs, or None if these kernels don't have it.
        """

    def prepare(self) -> bool:
        """
        Asks the operating system for what these kernels need before their first run; False
        if it refuses, or this machine can't run them.
        """

    def measure_limit(self, threads: int, seconds: float) -> float:
        """
        Floating-point operations per second that so many threads can do together,
        measured for so many seconds; 0 where no limit is known.
        """

def instruction_sets() -> list[str]:
    """
    The names of all instruction sets that the engine knows, the best last.
    """

def built_kernels() -> list[Kernels]:
    """
    All kernels in this build, the best last, those that this machine can't run too.
    """

def all_kernels() -> list[Kernels]:
    """All kernels that this machine can run, the best last."""

class Plan:
    """The steps of a run for one input shape."""

    def __init__(
        self,
        kernels: Kernels,
        arena_bytes: int,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
    ) -> None: ...
    @property
    def scratch_bytes(self) -> int: ...
    def import_image(self, *, batch: int, image: Sequence[int], first_row: int) -> None: ...
    def export_image(self, *, batch: int, image: Sequence[int], first_row: int) -> None: ...
    def move_rows(self, *, batch: int, image: Sequence[int], from_row: int, rows: int) -> None: ...
    def convolution(
        self,
        *,
        batch: int,
        input: Sequence[int],
        output: Sequence[int],
        bias: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        weights: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)]
        | None = None,
        kernels: int | None = None,
        kernel: tuple[int, int],
        stride: int,
        above: int,
        left: int,
        upsample: bool,
        coefficients: int | None,
        activation: str | None,
        residual: Sequence[int] | None,
        partials: int | None,
        tile: tuple[int, int],
        splits: int,
        together: int,
    ) -> None: ...
    def winograd_kernels(
        self,
        *,
        batch: int,
        weights: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        panels: int,
        blocks: int,
        upsample: bool,
        kernels: int,
    ) -> None: ...
    def statistics(
        self, *, batch: int, input: Sequence[int], tile: tuple[int, int], partials: int
    ) -> None: ...
    def norm(
        self,
        *,
        batch: int,
        channels: int,
        groups: int,
        eps: float,
        weight: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        bias: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        partials: int,
        partial_channels: int,
        grid: tuple[int, int],
        tile: tuple[int, int],
        points: int,
        coefficients: int,
    ) -> None: ...
    def attention_pack(
        self,
        *,
        batch: int,
        key: Sequence[int],
        value: Sequence[int],
        heads: int,
        packed_keys: int,
        packed_values: int,
    ) -> None: ...
    def attention(
        self,
        *,
        batch: int,
        query: Sequence[int],
        output: Sequence[int],
        heads: int,
        scale: float,
        packed_keys: int,
        packed_values: int,
        residual: Sequence[int] | None,
        queries: int,
        keys: int,
    ) -> None: ...
    def pointwise(
        self,
        *,
        batch: int,
        input: Sequence[int],
        output: Sequence[int],
        coefficients: int | None,
        activation: str | None,
        factor: float,
        upsample: bool,
        above: int,
        left: int,
        residual: Sequence[int] | None,
    ) -> None: ...

class Executor:
    """Threads and memory that the runs of a model share."""

    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def idle_bytes(self) -> int: ...
    def release(self) -> None:
        """Gives memory that no run uses back to the system."""

    def bytes(self, plan: Plan) -> int:
        """Bytes of activations and scratch that a run of the plan takes."""

    def run(
        self,
        plan: Plan,
        input: Annotated[torch.Tensor, dict(shape=(None, None, None, None), device="cpu")],
        output: Annotated[torch.Tensor, dict(shape=(None, None, None, None), device="cpu")],
        timeout: float,
        ask: Callable[[], None] | None,
        profile: bool,
    ) -> list[tuple[float, float]]:
        """
        Runs a plan; gives the begin and end of each step where they are asked for.
        `ask` is called now and then, on the calling thread, where signals are looked for
        too; what it raises ends the run.
        """
