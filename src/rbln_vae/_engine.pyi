"""The CPU engine."""

from collections.abc import Callable, Sequence
import enum
from typing import Annotated, overload

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
        """Computing a value of a transformed kernel."""

    @property
    def fetch(self) -> float:
        """Reading one that was kept, from memory."""

    @property
    def others(self) -> Costs:
        """All else, in products of float32."""

class DoublingCosts:
    """What parts of the algorithm for doubling cost, in own products."""

    @property
    def input(self) -> float:
        """Transforming an input value."""

    @property
    def output(self) -> float:
        """Transforming an output value."""

    @property
    def product(self) -> float:
        """A product of transformed values."""

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
    def doubling(self) -> DoublingCosts:
        """What convolutions that double an image cost."""

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
        measured for so many seconds; 0 where the operating system refuses.
        """

def instruction_sets() -> list[str]:
    """
    The names of all instruction sets that the engine knows, the best last.
    """

def left_out() -> list[str]:
    """
    The instruction sets of this machine whose kernels this build leaves out, the best last.
    """

def built_kernels() -> list[Kernels]:
    """
    All kernels in this build, the best last, those that this machine can't run too.
    """

def all_kernels() -> list[Kernels]:
    """All kernels that this machine can run, the best last."""

def allocate(
    count: int,
) -> Annotated[torch.Tensor, dict(dtype="float32", shape=(None,), order="C", device="cpu")]:
    """
    So many zeros, in memory as runs have it: in large pages, where there are any.
    """

NONE: int = -1

class Activation(enum.Enum):
    """A function of each element."""

    none = 0

    silu = 1

    gelu = 2

    mish = 3

    relu = 4

    tanh = 5

class Image:
    """An image in the arena, or some rows of one."""

    def __init__(
        self,
        *,
        offset: int = 0,
        channels: int = 0,
        height: int = 0,
        width: int = 0,
        row: int = 0,
        sample: int = 0,
    ) -> None: ...
    @property
    def offset(self) -> int: ...
    @offset.setter
    def offset(self, arg: int, /) -> None: ...
    @property
    def channels(self) -> int: ...
    @channels.setter
    def channels(self, arg: int, /) -> None: ...
    @property
    def height(self) -> int: ...
    @height.setter
    def height(self, arg: int, /) -> None: ...
    @property
    def width(self) -> int: ...
    @width.setter
    def width(self, arg: int, /) -> None: ...
    @property
    def row(self) -> int: ...
    @row.setter
    def row(self, arg: int, /) -> None: ...
    @property
    def sample(self) -> int: ...
    @sample.setter
    def sample(self, arg: int, /) -> None: ...

class Reading:
    """What is done with an image while it is read."""

    def __init__(
        self, *, coefficients: int = -1, activation: Activation = Activation.none
    ) -> None: ...
    @property
    def coefficients(self) -> int: ...
    @coefficients.setter
    def coefficients(self, arg: int, /) -> None: ...
    @property
    def activation(self) -> Activation: ...
    @activation.setter
    def activation(self, arg: Activation, /) -> None: ...

class ImportStep:
    """From the caller's input to an image."""

    def __init__(
        self, *, batch: int = 1, image: Image = ..., first_row: int = 0, tensor: int = 0
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def image(self) -> Image: ...
    @image.setter
    def image(self, arg: Image, /) -> None: ...
    @property
    def first_row(self) -> int: ...
    @first_row.setter
    def first_row(self, arg: int, /) -> None: ...
    @property
    def tensor(self) -> int: ...
    @tensor.setter
    def tensor(self, arg: int, /) -> None: ...

class ExportStep:
    """From an image to the caller's output."""

    def __init__(
        self, *, batch: int = 1, image: Image = ..., first_row: int = 0, tensor: int = 0
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def image(self) -> Image: ...
    @image.setter
    def image(self, arg: Image, /) -> None: ...
    @property
    def first_row(self) -> int: ...
    @first_row.setter
    def first_row(self, arg: int, /) -> None: ...
    @property
    def tensor(self) -> int: ...
    @tensor.setter
    def tensor(self, arg: int, /) -> None: ...

class ConvStep:
    """A convolution over tiles of an image."""

    def __init__(
        self,
        *,
        batch: int = 1,
        input: Image = ...,
        earlier: Sequence[Image] = ...,
        left_out: int = 0,
        stacked: int = 1,
        at_once: int = 1,
        over_clip: bool = False,
        output: Image = ...,
        reading: Reading = ...,
        eps: float = 0.0,
        residual: Image = ...,
        output_activation: Activation = Activation.none,
        kernel_height: int = 1,
        kernel_width: int = 1,
        stride: int = 1,
        above: int = 0,
        left: int = 0,
        upsample: bool = False,
        doubles: bool = False,
        kernels: int = -1,
        tile_height: int = 1,
        tile_width: int = 1,
        cell_height: int = 1,
        cell_width: int = 1,
        image_cells: int = 0,
        splits: int = 1,
        together: int = 1,
        partials: int = -1,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def input(self) -> Image: ...
    @input.setter
    def input(self, arg: Image, /) -> None: ...
    @property
    def earlier(self) -> list[Image]: ...
    @earlier.setter
    def earlier(self, arg: Sequence[Image], /) -> None: ...
    @property
    def left_out(self) -> int: ...
    @left_out.setter
    def left_out(self, arg: int, /) -> None: ...
    @property
    def stacked(self) -> int: ...
    @stacked.setter
    def stacked(self, arg: int, /) -> None: ...
    @property
    def at_once(self) -> int: ...
    @at_once.setter
    def at_once(self, arg: int, /) -> None: ...
    @property
    def over_clip(self) -> bool: ...
    @over_clip.setter
    def over_clip(self, arg: bool, /) -> None: ...
    @property
    def output(self) -> Image: ...
    @output.setter
    def output(self, arg: Image, /) -> None: ...
    @property
    def reading(self) -> Reading: ...
    @reading.setter
    def reading(self, arg: Reading, /) -> None: ...
    @property
    def eps(self) -> float: ...
    @eps.setter
    def eps(self, arg: float, /) -> None: ...
    @property
    def residual(self) -> Image: ...
    @residual.setter
    def residual(self, arg: Image, /) -> None: ...
    @property
    def output_activation(self) -> Activation: ...
    @output_activation.setter
    def output_activation(self, arg: Activation, /) -> None: ...
    @property
    def kernel_height(self) -> int: ...
    @kernel_height.setter
    def kernel_height(self, arg: int, /) -> None: ...
    @property
    def kernel_width(self) -> int: ...
    @kernel_width.setter
    def kernel_width(self, arg: int, /) -> None: ...
    @property
    def stride(self) -> int: ...
    @stride.setter
    def stride(self, arg: int, /) -> None: ...
    @property
    def above(self) -> int: ...
    @above.setter
    def above(self, arg: int, /) -> None: ...
    @property
    def left(self) -> int: ...
    @left.setter
    def left(self, arg: int, /) -> None: ...
    @property
    def upsample(self) -> bool: ...
    @upsample.setter
    def upsample(self, arg: bool, /) -> None: ...
    @property
    def doubles(self) -> bool: ...
    @doubles.setter
    def doubles(self, arg: bool, /) -> None: ...
    @property
    def kernels(self) -> int: ...
    @kernels.setter
    def kernels(self, arg: int, /) -> None: ...
    @property
    def tile_height(self) -> int: ...
    @tile_height.setter
    def tile_height(self, arg: int, /) -> None: ...
    @property
    def tile_width(self) -> int: ...
    @tile_width.setter
    def tile_width(self, arg: int, /) -> None: ...
    @property
    def cell_height(self) -> int: ...
    @cell_height.setter
    def cell_height(self, arg: int, /) -> None: ...
    @property
    def cell_width(self) -> int: ...
    @cell_width.setter
    def cell_width(self, arg: int, /) -> None: ...
    @property
    def image_cells(self) -> int: ...
    @image_cells.setter
    def image_cells(self, arg: int, /) -> None: ...
    @property
    def splits(self) -> int: ...
    @splits.setter
    def splits(self, arg: int, /) -> None: ...
    @property
    def together(self) -> int: ...
    @together.setter
    def together(self, arg: int, /) -> None: ...
    @property
    def partials(self) -> int: ...
    @partials.setter
    def partials(self, arg: int, /) -> None: ...

class WinogradStep:
    """Transforms kernels for Winograd's algorithm."""

    def __init__(
        self,
        *,
        panels: int = 1,
        blocks: int = 1,
        skipped: int = 0,
        phases: int = 1,
        stride: int = 1,
        at_once: int = 1,
        kernels: int = 0,
    ) -> None: ...
    @property
    def panels(self) -> int: ...
    @panels.setter
    def panels(self, arg: int, /) -> None: ...
    @property
    def blocks(self) -> int: ...
    @blocks.setter
    def blocks(self, arg: int, /) -> None: ...
    @property
    def skipped(self) -> int: ...
    @skipped.setter
    def skipped(self, arg: int, /) -> None: ...
    @property
    def phases(self) -> int: ...
    @phases.setter
    def phases(self, arg: int, /) -> None: ...
    @property
    def stride(self) -> int: ...
    @stride.setter
    def stride(self, arg: int, /) -> None: ...
    @property
    def at_once(self) -> int: ...
    @at_once.setter
    def at_once(self, arg: int, /) -> None: ...
    @property
    def kernels(self) -> int: ...
    @kernels.setter
    def kernels(self, arg: int, /) -> None: ...

class StatisticsStep:
    """Sums of an image that no convolution summed."""

    def __init__(
        self,
        *,
        batch: int = 1,
        input: Image = ...,
        cell_height: int = 1,
        cell_width: int = 1,
        partials: int = 0,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def input(self) -> Image: ...
    @input.setter
    def input(self, arg: Image, /) -> None: ...
    @property
    def cell_height(self) -> int: ...
    @cell_height.setter
    def cell_height(self, arg: int, /) -> None: ...
    @property
    def cell_width(self) -> int: ...
    @cell_width.setter
    def cell_width(self, arg: int, /) -> None: ...
    @property
    def partials(self) -> int: ...
    @partials.setter
    def partials(self, arg: int, /) -> None: ...

class NormStep:
    """From the sums of cells to the coefficients of a group norm."""

    def __init__(
        self,
        *,
        batch: int = 1,
        channels: int = 0,
        groups: int = 1,
        over_clip: bool = False,
        eps: float = 0.0,
        partials: int = 0,
        partial_channels: int = 0,
        grid_height: int = 1,
        grid_width: int = 1,
        cell_height: int = 1,
        cell_width: int = 1,
        points: int = 1,
        coefficients: int = 0,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def channels(self) -> int: ...
    @channels.setter
    def channels(self, arg: int, /) -> None: ...
    @property
    def groups(self) -> int: ...
    @groups.setter
    def groups(self, arg: int, /) -> None: ...
    @property
    def over_clip(self) -> bool: ...
    @over_clip.setter
    def over_clip(self, arg: bool, /) -> None: ...
    @property
    def eps(self) -> float: ...
    @eps.setter
    def eps(self, arg: float, /) -> None: ...
    @property
    def partials(self) -> int: ...
    @partials.setter
    def partials(self, arg: int, /) -> None: ...
    @property
    def partial_channels(self) -> int: ...
    @partial_channels.setter
    def partial_channels(self, arg: int, /) -> None: ...
    @property
    def grid_height(self) -> int: ...
    @grid_height.setter
    def grid_height(self, arg: int, /) -> None: ...
    @property
    def grid_width(self) -> int: ...
    @grid_width.setter
    def grid_width(self, arg: int, /) -> None: ...
    @property
    def cell_height(self) -> int: ...
    @cell_height.setter
    def cell_height(self, arg: int, /) -> None: ...
    @property
    def cell_width(self) -> int: ...
    @cell_width.setter
    def cell_width(self, arg: int, /) -> None: ...
    @property
    def points(self) -> int: ...
    @points.setter
    def points(self, arg: int, /) -> None: ...
    @property
    def coefficients(self) -> int: ...
    @coefficients.setter
    def coefficients(self, arg: int, /) -> None: ...

class AttentionPackStep:
    """Rearranges keys and values for attention."""

    def __init__(
        self,
        *,
        batch: int = 1,
        key: Image = ...,
        value: Image = ...,
        heads: int = 1,
        packed_keys: int = 0,
        packed_values: int = 0,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def key(self) -> Image: ...
    @key.setter
    def key(self, arg: Image, /) -> None: ...
    @property
    def value(self) -> Image: ...
    @value.setter
    def value(self, arg: Image, /) -> None: ...
    @property
    def heads(self) -> int: ...
    @heads.setter
    def heads(self, arg: int, /) -> None: ...
    @property
    def packed_keys(self) -> int: ...
    @packed_keys.setter
    def packed_keys(self, arg: int, /) -> None: ...
    @property
    def packed_values(self) -> int: ...
    @packed_values.setter
    def packed_values(self, arg: int, /) -> None: ...

class AttentionStep:
    """Attention, over packed keys and values."""

    def __init__(
        self,
        *,
        batch: int = 1,
        query: Image = ...,
        output: Image = ...,
        heads: int = 1,
        scale: float = 1.0,
        packed_keys: int = 0,
        packed_values: int = 0,
        residual: Image = ...,
        queries: int = 1,
        keys: int = 32,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def query(self) -> Image: ...
    @query.setter
    def query(self, arg: Image, /) -> None: ...
    @property
    def output(self) -> Image: ...
    @output.setter
    def output(self, arg: Image, /) -> None: ...
    @property
    def heads(self) -> int: ...
    @heads.setter
    def heads(self, arg: int, /) -> None: ...
    @property
    def scale(self) -> float: ...
    @scale.setter
    def scale(self, arg: float, /) -> None: ...
    @property
    def packed_keys(self) -> int: ...
    @packed_keys.setter
    def packed_keys(self, arg: int, /) -> None: ...
    @property
    def packed_values(self) -> int: ...
    @packed_values.setter
    def packed_values(self, arg: int, /) -> None: ...
    @property
    def residual(self) -> Image: ...
    @residual.setter
    def residual(self, arg: Image, /) -> None: ...
    @property
    def queries(self) -> int: ...
    @queries.setter
    def queries(self, arg: int, /) -> None: ...
    @property
    def keys(self) -> int: ...
    @keys.setter
    def keys(self, arg: int, /) -> None: ...

class ModulateStep:
    """The product with one image plus another."""

    def __init__(
        self,
        *,
        batch: int = 1,
        input: Image = ...,
        output: Image = ...,
        coefficients: int = -1,
        scale: Image = ...,
        shift: Image = ...,
        factor: int = 1,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def input(self) -> Image: ...
    @input.setter
    def input(self, arg: Image, /) -> None: ...
    @property
    def output(self) -> Image: ...
    @output.setter
    def output(self, arg: Image, /) -> None: ...
    @property
    def coefficients(self) -> int: ...
    @coefficients.setter
    def coefficients(self, arg: int, /) -> None: ...
    @property
    def scale(self) -> Image: ...
    @scale.setter
    def scale(self, arg: Image, /) -> None: ...
    @property
    def shift(self) -> Image: ...
    @shift.setter
    def shift(self, arg: Image, /) -> None: ...
    @property
    def factor(self) -> int: ...
    @factor.setter
    def factor(self, arg: int, /) -> None: ...

class PointwiseStep:
    """The operations that no convolution took in."""

    def __init__(
        self,
        *,
        batch: int = 1,
        input: Image = ...,
        output: Image = ...,
        reading: Reading = ...,
        factor: float = 1.0,
        offset: float = 0.0,
        upsample: bool = False,
        above: int = 0,
        left: int = 0,
        residual: Image = ...,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def input(self) -> Image: ...
    @input.setter
    def input(self, arg: Image, /) -> None: ...
    @property
    def output(self) -> Image: ...
    @output.setter
    def output(self, arg: Image, /) -> None: ...
    @property
    def reading(self) -> Reading: ...
    @reading.setter
    def reading(self, arg: Reading, /) -> None: ...
    @property
    def factor(self) -> float: ...
    @factor.setter
    def factor(self, arg: float, /) -> None: ...
    @property
    def offset(self) -> float: ...
    @offset.setter
    def offset(self, arg: float, /) -> None: ...
    @property
    def upsample(self) -> bool: ...
    @upsample.setter
    def upsample(self, arg: bool, /) -> None: ...
    @property
    def above(self) -> int: ...
    @above.setter
    def above(self, arg: int, /) -> None: ...
    @property
    def left(self) -> int: ...
    @left.setter
    def left(self, arg: int, /) -> None: ...
    @property
    def residual(self) -> Image: ...
    @residual.setter
    def residual(self, arg: Image, /) -> None: ...

class ShuffleStep:
    """Moves channels, or pixels between channels and cells."""

    def __init__(self, *, batch: int = 1, input: Image = ..., output: Image = ...) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def input(self) -> Image: ...
    @input.setter
    def input(self, arg: Image, /) -> None: ...
    @property
    def output(self) -> Image: ...
    @output.setter
    def output(self, arg: Image, /) -> None: ...

class MoveRowsStep:
    """Moves rows of an image to its first."""

    def __init__(
        self, *, batch: int = 1, image: Image = ..., from_row: int = 0, rows: int = 0
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @batch.setter
    def batch(self, arg: int, /) -> None: ...
    @property
    def image(self) -> Image: ...
    @image.setter
    def image(self, arg: Image, /) -> None: ...
    @property
    def from_row(self) -> int: ...
    @from_row.setter
    def from_row(self, arg: int, /) -> None: ...
    @property
    def rows(self) -> int: ...
    @rows.setter
    def rows(self, arg: int, /) -> None: ...

class Plan:
    """The steps of a run for one input shape."""

    def __init__(
        self,
        kernels: Kernels,
        arena_bytes: int,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        inputs: int = 1,
        outputs: int = 1,
        state_bytes: int = 0,
    ) -> None: ...
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def items(self) -> list[int]:
        """The number of items of each step."""

    @overload
    def add(
        self,
        step: ConvStep,
        bias: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        weights: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)]
        | None = None,
        gamma: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)] | None = None,
        factor: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)]
        | None = None,
        kernels: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)]
        | None = None,
    ) -> None:
        """
        Adds a step; weights are as `packing.pack` makes them, and kept by the plan. Kernels
        that were transformed before are read instead of those in the arena.
        """

    @overload
    def add(
        self,
        step: WinogradStep,
        weights: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        kernels: Annotated[
            torch.Tensor, dict(dtype="float32", shape=(None,), order="C", device="cpu")
        ]
        | None = None,
    ) -> None:
        """Adds a step that writes to the arena, or to the given memory."""

    @overload
    def add(
        self,
        step: NormStep,
        weight: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
        bias: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
    ) -> None: ...
    @overload
    def add(
        self,
        step: ShuffleStep,
        order: Annotated[torch.Tensor, dict(order="C", device="cpu", writable=False)],
    ) -> None: ...
    @overload
    def add(self, step: ImportStep) -> None: ...
    @overload
    def add(self, step: ExportStep) -> None: ...
    @overload
    def add(self, step: StatisticsStep) -> None: ...
    @overload
    def add(self, step: AttentionPackStep) -> None: ...
    @overload
    def add(self, step: AttentionStep) -> None: ...
    @overload
    def add(self, step: ModulateStep) -> None: ...
    @overload
    def add(self, step: PointwiseStep) -> None: ...
    @overload
    def add(self, step: MoveRowsStep) -> None: ...

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
        inputs: Sequence[
            Annotated[torch.Tensor, dict(shape=(None, None, None, None), device="cpu")]
        ],
        outputs: Sequence[
            Annotated[torch.Tensor, dict(shape=(None, None, None, None), device="cpu")]
        ],
        timeout: float,
        ask: Callable[[int], None] | None,
        profile: bool,
        on_rows: Callable[[int, int], None] | None = None,
        finite: Annotated[torch.Tensor, dict(dtype="bool", shape=(None,), order="C", device="cpu")]
        | None = None,
        state: Annotated[
            torch.Tensor, dict(dtype="float32", shape=(None,), order="C", device="cpu")
        ]
        | None = None,
    ) -> tuple[list[int], list[tuple[float, float]]]:
        """
        Runs a plan. Gives the numbers of the images with values beyond the range of the
        type in which images are stored, whose results are not valid; and where they are
        asked for the begin and end of each step that was run.
        Tensors of uint8 hold levels of pictures; those of the output show values in the
        dtype of the input.
        `ask` is called now and then, on the calling thread, with the number of items that are
        done; signals are looked for then, too. What it raises ends the run.
        `on_rows` is called there with the first row and the number of rows when these are
        finished in all images of the output; what it raises ends the run.
        `finite` has an element for each image, which is cleared if levels of the image show
        a value that isn't finite.
        `state` is that of a video: zeros from `allocate` at first, then what runs leave in it.
        """
