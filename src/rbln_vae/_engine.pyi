from collections.abc import Callable

from torch import Tensor

_Sizes = tuple[int, int, int, int, int, int]
"""Offset in the arena, channels, height, width, pixels of a plane, pixels of a sample."""

def cpu_features() -> list[str]: ...
def all_kernels() -> list[Kernels]: ...

class OutOfMemoryError(MemoryError): ...
class TimedOutError(TimeoutError): ...
class ThreadsUnavailableError(RuntimeError): ...

class Kernels:
    @property
    def isa(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def pixels(self) -> int: ...
    @property
    def panels(self) -> int: ...
    @property
    def winograd(self) -> bool: ...
    def prepare(self) -> bool: ...
    def measure_limit(self, threads: int, seconds: float) -> float: ...

class Plan:
    def __init__(
        self,
        kernels: Kernels,
        arena_bytes: int,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
    ) -> None: ...
    @property
    def scratch_bytes(self) -> int: ...
    def import_image(self, *, batch: int, image: _Sizes, first_row: int) -> None: ...
    def export_image(self, *, batch: int, image: _Sizes, first_row: int) -> None: ...
    def move_rows(self, *, batch: int, image: _Sizes, from_row: int, rows: int) -> None: ...
    def convolution(
        self,
        *,
        batch: int,
        input: _Sizes,
        output: _Sizes,
        bias: Tensor,
        weights: Tensor | None = None,
        kernels: int | None = None,
        kernel: tuple[int, int],
        stride: int,
        above: int,
        left: int,
        upsample: bool,
        coefficients: int | None,
        activation: str | None,
        residual: _Sizes | None,
        partials: int | None,
        tile: tuple[int, int],
        splits: int,
        together: int,
    ) -> None: ...
    def winograd_kernels(
        self,
        *,
        batch: int,
        weights: Tensor,
        panels: int,
        blocks: int,
        upsample: bool,
        kernels: int,
    ) -> None: ...
    def statistics(
        self, *, batch: int, input: _Sizes, tile: tuple[int, int], partials: int
    ) -> None: ...
    def norm(
        self,
        *,
        batch: int,
        channels: int,
        groups: int,
        eps: float,
        weight: Tensor,
        bias: Tensor,
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
        key: _Sizes,
        value: _Sizes,
        heads: int,
        packed_keys: int,
        packed_values: int,
    ) -> None: ...
    def attention(
        self,
        *,
        batch: int,
        query: _Sizes,
        output: _Sizes,
        heads: int,
        scale: float,
        packed_keys: int,
        packed_values: int,
        residual: _Sizes | None,
        queries: int,
        keys: int,
    ) -> None: ...
    def pointwise(
        self,
        *,
        batch: int,
        input: _Sizes,
        output: _Sizes,
        coefficients: int | None,
        activation: str | None,
        factor: float,
        upsample: bool,
        above: int,
        left: int,
        residual: _Sizes | None,
    ) -> None: ...

class Executor:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def idle_bytes(self) -> int: ...
    def release(self) -> None: ...
    def bytes(self, plan: Plan) -> int: ...
    def run(
        self,
        plan: Plan,
        input: Tensor,
        output: Tensor,
        timeout: float,
        ask: Callable[[], None] | None,
        profile: bool,
    ) -> list[tuple[float, float]]: ...
