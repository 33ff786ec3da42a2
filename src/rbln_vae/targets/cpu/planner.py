"""From a graph and an input shape to a plan: what the engine does, and in what memory.

A plan is a flat list of steps over one arena. Everything that is decided, is decided
here: the order, where each buffer lies and which share memory, and the tiles that images
are worked on in. Tiles don't depend on the number of threads, and so neither do the
results, to the last bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import RBLNCompileError
from ...graph.ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GroupNorm,
    Identity,
    Norm,
    Operation,
    Pad,
    Scale,
    Shape,
    Upsample,
    Value,
)
from .packing import BLOCK, PANEL, bias_name

ALIGNMENT = 4096
"""Buffers begin on a page of their own."""

MAX_TAPS = 64
"""Of a convolution kernel that the engine takes."""


@dataclass(frozen=True)
class Machine:
    """What the planner knows of the kernels that will run.

    Attributes:
        isa: Their instruction set.
        dtype: In what images are stored.
        rows: Rows of output pixels that one product makes.
        pixels: Pixels of a row that it makes.
        panels: Panels of 16 output channels that it makes.
        threads: How many work on a run.
    """

    isa: str
    dtype: str
    rows: int
    pixels: int
    panels: int
    threads: int

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def scratch_bytes(self) -> int:
        """How large a tile's input may be: a good part of the L2 cache.

        A constant of the instruction set, so that results are the same on all machines
        that have it.
        """
        # With AMX two tiles are held, in a cache of 2 MiB.
        return 700_000 if self.isa == "amx_bf16" else 560_000

    @property
    def costs(self) -> Costs:
        return COSTS.get(self.isa, Costs(24, 6, 8))


@dataclass(frozen=True)
class Costs:
    """What else a convolution does, in products of two numbers that take as long.

    Attributes:
        norm: Norm and activation of an element.
        copy: Copying one.
        weights: Fetching a weight that isn't in the L2 cache.
    """

    norm: float
    copy: float
    weights: float


COSTS: Mapping[str, Costs] = {
    "avx512_bf16": Costs(48, 12, 16),
    "amx_bf16": Costs(256, 64, 100),
}
"""By instruction set: the faster its products are, the more everything else costs."""


@dataclass(eq=False)
class Buffer:
    """A range of the arena, and the steps from the first to the last that need it."""

    name: str
    bytes: int
    first: int
    last: int
    offset: int = -1


@dataclass(frozen=True)
class Image:
    """An image in a buffer."""

    buffer: Buffer
    channels: int
    height: int
    width: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As the engine takes it."""
        return (self.buffer.offset, self.channels, self.height, self.width)


@dataclass(frozen=True)
class Step:
    """One call of the engine.

    Attributes:
        call: The method of the engine's plan that adds it.
        name: The value of the graph that it makes.
        kind: The operation.
        flops: Products and sums that it does; two each.
        bytes: What it reads and writes at the least.
        arguments: Of the call: numbers, images and offsets.
        weights: Of the call: names of packed weights.
    """

    call: str
    name: str
    kind: str
    flops: int
    bytes: int
    arguments: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The steps of a run for one input shape.

    Attributes:
        input_shape: `(N, C, H, W)`.
        output_shape: `(N, C, H, W)`.
        machine: What it was made for.
        steps: In order.
        buffers: Everything in the arena.
        arena_bytes: The size of the arena.
    """

    input_shape: Shape
    output_shape: Shape
    machine: Machine
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a run."""
        return sum(step.flops for step in self.steps)

    def describe(self) -> str:
        """The steps, their work and their memory, as a table."""
        lines = [
            f"{'x'.join(map(str, self.input_shape))} to {'x'.join(map(str, self.output_shape))}, "
            f"{self.machine.dtype}, {self.machine.isa}: {self.flops / 1e9:.1f} GFLOP, "
            f"arena of {self.arena_bytes / 2**20:.1f} MiB",
            f"{'GFLOP':>9} {'MiB live':>9}  step",
        ]
        for index, step in enumerate(self.steps):
            live = sum(b.bytes for b in self.buffers if b.first <= index <= b.last)
            tile = step.arguments.get("tile")
            note = f", tiles of {tile[0]}x{tile[1]}" if tile else ""
            splits = step.arguments.get("splits", 1)
            note += f", channels in {splits} parts" if splits > 1 else ""
            lines.append(
                f"{step.flops / 1e9:9.2f} {live / 2**20:9.1f}  {step.kind} {step.name}{note}"
            )
        return "\n".join(lines)


def make_plan(graph: Graph, input_shape: Iterable[int], machine: Machine) -> Plan:
    """Plan a run.

    Args:
        graph: What the passes made of it; its weights may be on the meta device.
        input_shape: `(N, input_channels, H, W)`.
        machine: What will run it.

    Raises:
        GraphError: The operations don't fit the input.
        RBLNCompileError: The engine has no kernel for an operation.
    """
    return _Planner(graph, tuple(input_shape), machine).plan()


@dataclass(frozen=True)
class _Statistics:
    """Sums by tile that a step left for the norms of its output."""

    buffer: Buffer
    channels: int
    grid: tuple[int, int]
    tile: tuple[int, int]
    points: int


class _Planner:
    def __init__(self, graph: Graph, input_shape: Shape, machine: Machine) -> None:
        self.graph = graph
        self.machine = machine
        self.shapes = graph.infer_shapes(input_shape)
        self.batch = input_shape[0]
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.images: dict[Value, Image] = {}
        self.coefficients: dict[tuple[Value, Norm], Buffer] = {}
        self.norms: dict[Value, list[Norm]] = {}
        for operation in graph.operations:
            norm = getattr(operation, "norm", None)
            if norm is not None:
                value = operation.inputs[0]
                # What follows the norm doesn't change its coefficients.
                bare = dataclasses.replace(norm, activation=None)
                norms = self.norms.setdefault(value, [])
                if bare not in norms:
                    norms.append(bare)
        self.last_uses = graph.last_uses()

    def plan(self) -> Plan:
        graph = self.graph
        source = self.image(graph.input)
        self.emit("import_image", graph.input, "Import", {"image": source}, writes=[source])
        self.statistics_of(graph.input, None)
        for index, operation in enumerate(graph.operations):
            self.operation(index, operation)
        result = self.images[graph.output]
        self.emit("export_image", graph.output, "Export", {"image": result}, reads=[result])
        arena = place(self.buffers)
        return Plan(
            self.shapes[graph.input],
            self.shapes[graph.output],
            self.machine,
            tuple(self.resolve(step) for step in self.steps),
            tuple(self.buffers),
            arena,
        )

    # Memory.

    def buffer(self, name: str, size: int) -> Buffer:
        """A buffer that the next step is the first to use."""
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        result = Buffer(name, rounded, len(self.steps), len(self.steps))
        self.buffers.append(result)
        return result

    def image_bytes(self, value: Value) -> int:
        batch, channels, height, width = self.shapes[value]
        blocks = -(-channels // BLOCK)
        return batch * blocks * height * width * BLOCK * self.machine.element_bytes

    def image(self, value: Value, over: Image | None = None) -> Image:
        """An image for a value that the next step makes, in a new buffer or an old one."""
        _, channels, height, width = self.shapes[value]
        buffer = over.buffer if over else self.buffer(value, self.image_bytes(value))
        self.images[value] = Image(buffer, channels, height, width)
        return self.images[value]

    def replaceable(self, index: int, residual: Value | None, *read: Value) -> Image | None:
        """The image of a residual, if the operation may write its output over it."""
        if residual is None or residual in read or self.last_uses[residual] != index:
            return None
        image = self.images[residual]
        # Another value may be stored in the same buffer, as after an identity.
        others = (self.images[v].buffer for v in self.live(index) if v != residual)
        return None if any(b is image.buffer for b in others) else image

    def live(self, index: int) -> list[Value]:
        """Values that the operation at an index or a later one reads."""
        return [v for v in self.images if self.last_uses.get(v, -1) >= index]

    # Steps.

    def emit(
        self,
        call: str,
        name: str,
        kind: str,
        arguments: dict[str, Any],
        *,
        reads: Iterable[Image | Buffer | None] = (),
        writes: Iterable[Image | Buffer] = (),
        weights: Mapping[str, str] | None = None,
        flops: int = 0,
        extra_bytes: int = 0,
    ) -> None:
        size = extra_bytes
        for each in (*reads, *writes):
            if each is None:
                continue
            buffer = each.buffer if isinstance(each, Image) else each
            buffer.last = len(self.steps)
            size += buffer.bytes
        arguments = {"batch": self.batch, **arguments}
        self.steps.append(Step(call, name, kind, flops, size, arguments, weights or {}))

    @staticmethod
    def resolve(step: Step) -> Step:
        """The step with offsets in place of buffers, now that they are known."""

        def known(argument: Any) -> Any:
            if isinstance(argument, Image):
                return argument.sizes
            return argument.offset if isinstance(argument, Buffer) else argument

        arguments = {name: known(argument) for name, argument in step.arguments.items()}
        return dataclasses.replace(step, arguments=arguments)

    def operation(self, index: int, operation: Operation) -> None:
        match operation:
            case Conv2d():
                self.convolution(index, operation)
            case Attention():
                self.attention(index, operation)
            case GroupNorm(norm=norm):
                self.pointwise(operation, operation.input, norm=norm)
            case Activation(function=function):
                self.pointwise(operation, operation.input, activation=function)
            case Scale(factor=factor):
                self.pointwise(operation, operation.input, factor=factor)
            case Identity():
                self.images[operation.output] = self.images[operation.input]
                self.statistics_of(operation.output, None)
            case Upsample():
                self.pointwise(operation, operation.input, upsample=True)
            case Pad(padding=(above, _, left, _)):
                self.pointwise(operation, operation.input, above=above, left=left)
            case Add():
                self.pointwise(operation, operation.left, residual=operation.right)
            case _:
                raise RBLNCompileError(
                    f"The target 'cpu' has no kernel for {operation.kind} {operation.output!r}."
                )

    def norm_arguments(self, value: Value, norm: Norm | None) -> dict[str, Any]:
        if norm is None:
            return {"coefficients": None, "activation": None}
        bare = dataclasses.replace(norm, activation=None)
        return {
            "coefficients": self.coefficients[value, bare],
            "activation": norm.activation,
        }

    def convolution(self, index: int, operation: Conv2d) -> None:
        machine = self.machine
        source = self.images[operation.input]
        residual = self.images[operation.residual] if operation.residual else None
        over = self.replaceable(index, operation.residual, operation.input)
        outputs, inputs, height, width = operation.kernel(self.graph.weights)
        if height * width > MAX_TAPS:
            raise RBLNCompileError(
                f"The target 'cpu' takes convolution kernels of up to {MAX_TAPS} taps, "
                f"{operation.output!r} has {height}x{width}."
            )
        target = self.image(operation.output, over)
        grid = source if operation.upsample else target
        conv = Convolution(
            inputs=inputs,
            outputs=outputs,
            kernel=(height, width),
            stride=operation.stride,
            upsample=operation.upsample,
            grid=(grid.height, grid.width),
            normed=operation.norm is not None,
        )
        tile = conv.tile(machine)
        splits = conv.splits(tile, self.batch, machine)
        panels = -(-outputs // PANEL)
        statistics: _Statistics | None = None
        if operation.output in self.norms:
            size = self.batch * conv.tiles(tile) * 2 * panels * PANEL * 4
            statistics = _Statistics(
                self.buffer(f"{operation.output} statistics", size),
                panels * PANEL,
                conv.grid,
                tile,
                4 if operation.upsample else 1,
            )
        norm = self.norm_arguments(operation.input, operation.norm)
        above, _, left, _ = operation.padding
        phases = 4 if operation.upsample else 1
        weight_bytes = outputs * inputs * height * width * phases * machine.element_bytes
        self.emit(
            "convolution",
            operation.output,
            operation.kind,
            dict(
                input=source,
                output=target,
                kernel=(height, width),
                stride=operation.stride,
                above=above,
                left=left,
                upsample=operation.upsample,
                residual=residual.buffer if residual else None,
                partials=statistics.buffer if statistics else None,
                tile=tile,
                splits=splits,
                together=conv.together(tile, self.batch, splits, machine),
                **norm,
            ),
            reads=[source, residual, norm["coefficients"]],
            writes=[target, *([statistics.buffer] if statistics else [])],
            weights={"weights": operation.weight, "bias": bias_name(operation)},
            flops=operation.flops(self.shapes, self.graph.weights),
            extra_bytes=weight_bytes,
        )
        self.statistics_of(operation.output, statistics)

    def attention(self, index: int, operation: Attention) -> None:
        if not operation.scale > 0:
            raise RBLNCompileError(
                f"The target 'cpu' needs a scale above zero in attention, "
                f"{operation.output!r} has {operation.scale}."
            )
        machine, heads = self.machine, operation.heads
        query, key, value = (
            self.images[v] for v in (operation.query, operation.key, operation.value)
        )
        residual = self.images[operation.residual] if operation.residual else None
        pixels = query.height * query.width
        blocks = -(-pixels // BLOCK)
        of_head = query.channels // heads, value.channels // heads
        panel = BLOCK * PANEL * machine.element_bytes
        matrices = self.batch * heads * blocks * panel
        packed_keys = self.buffer(
            f"{operation.output} keys", matrices * 2 * -(-of_head[0] // BLOCK)
        )
        packed_values = self.buffer(
            f"{operation.output} values", matrices * -(-of_head[1] // PANEL)
        )
        packed = {"heads": heads, "packed_keys": packed_keys, "packed_values": packed_values}
        self.emit(
            "attention_pack",
            operation.output,
            "AttentionPack",
            dict(key=key, value=value, **packed),
            reads=[key, value],
            writes=[packed_keys, packed_values],
        )
        read = (operation.query, operation.key, operation.value)
        over = self.replaceable(index, operation.residual, *read)
        target = self.image(operation.output, over)
        queries, keys = attention_blocks(pixels, self.batch * heads, machine)
        self.emit(
            "attention",
            operation.output,
            operation.kind,
            dict(
                query=query,
                output=target,
                scale=operation.scale,
                residual=residual.buffer if residual else None,
                queries=queries,
                keys=keys,
                **packed,
            ),
            reads=[query, packed_keys, packed_values, residual],
            writes=[target],
            flops=operation.flops(self.shapes, self.graph.weights),
        )
        self.statistics_of(operation.output, None)

    def pointwise(
        self,
        operation: Operation,
        source: Value,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        factor: float = 1.0,
        upsample: bool = False,
        above: int = 0,
        left: int = 0,
        residual: Value | None = None,
    ) -> None:
        image = self.images[source]
        other = self.images[residual] if residual else None
        arguments = self.norm_arguments(source, norm)
        if activation is not None:
            arguments["activation"] = activation
        target = self.image(operation.output)
        self.emit(
            "pointwise",
            operation.output,
            operation.kind,
            dict(
                input=image,
                output=target,
                factor=factor,
                upsample=upsample,
                above=above,
                left=left,
                residual=other.buffer if other else None,
                **arguments,
            ),
            reads=[image, other, arguments["coefficients"]],
            writes=[target],
        )
        self.statistics_of(operation.output, None)

    def statistics_of(self, value: Value, statistics: _Statistics | None) -> None:
        """Prepare every norm that reads a value, right after it was made."""
        norms = self.norms.get(value, [])
        if not norms:
            return
        image = self.images[value]
        if statistics is None:
            grid = (image.height, image.width)
            tile = (max(1, min(grid[0], 4096 // grid[1])), min(grid[1], 4096))
            channels = -(-image.channels // BLOCK) * BLOCK
            tiles = -(-grid[0] // tile[0]) * -(-grid[1] // tile[1])
            buffer = self.buffer(f"{value} statistics", self.batch * tiles * 2 * channels * 4)
            statistics = _Statistics(buffer, channels, grid, tile, 1)
            self.emit(
                "statistics",
                value,
                "Statistics",
                {"input": image, "tile": tile, "partials": buffer},
                reads=[image],
                writes=[buffer],
            )
        for norm in norms:
            blocks = -(-image.channels // BLOCK)
            coefficients = self.buffer(f"{value} coefficients", self.batch * 2 * blocks * BLOCK * 4)
            self.coefficients[value, norm] = coefficients
            self.emit(
                "norm",
                value,
                "Norm",
                {
                    "channels": image.channels,
                    "groups": norm.groups,
                    "eps": norm.eps,
                    "partials": statistics.buffer,
                    "partial_channels": statistics.channels,
                    "grid": statistics.grid,
                    "tile": statistics.tile,
                    "points": statistics.points,
                    "coefficients": coefficients,
                },
                reads=[statistics.buffer],
                writes=[coefficients],
                weights={"weight": norm.weight, "bias": norm.bias},
            )


@dataclass(frozen=True)
class Convolution:
    """What matters for the tiles of a convolution.

    With `upsample` the grid is that of the input, else that of the output.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: int
    upsample: bool
    grid: tuple[int, int]
    normed: bool

    def read(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the input that a tile reads."""
        if self.upsample:
            return tile[0] + 2, tile[1] + 2
        return (
            (tile[0] - 1) * self.stride + self.kernel[0],
            (tile[1] - 1) * self.stride + self.kernel[1],
        )

    def tiles(self, tile: tuple[int, int]) -> int:
        return math.prod(-(-size // part) for size, part in zip(self.grid, tile, strict=True))

    def load_cost(self, tile: tuple[int, int], costs: Costs) -> float:
        """Loading a tile's input, in the units of `product_cost`."""
        return (
            math.prod(self.read(tile)) * self.inputs * (costs.norm if self.normed else costs.copy)
        )

    def product_cost(self, tile: tuple[int, int]) -> float:
        phases = 4 if self.upsample else 1
        taps = self.kernel[0] * self.kernel[1] * phases
        return tile[0] * tile[1] * taps * self.inputs * self.outputs

    def tile(self, machine: Machine) -> tuple[int, int]:
        """Height and width of the tiles: the least overhead that fits the cache."""
        height, width = self.grid
        pixel = -(-self.inputs // BLOCK) * BLOCK * machine.element_bytes
        # Tiles for some threads, whose number isn't known here; more are made by splits.
        enough = max(256, height * width // 8)
        best, best_cost = (1, 1), math.inf
        for wanted in (width, 512, 256, 192, 128, 96, 64, 48, 32, 16):
            if wanted > width:
                continue
            columns = -(-width // -(-width // wanted))
            columns = min(width, -(-columns // 16) * 16)
            across = self.read((1, columns))[1] * pixel
            rows = machine.scratch_bytes // across
            taken = self.read((1, 1))[0] if not self.upsample else 3
            rows = (rows - taken) // self.stride + 1
            rows = max(1, min(height, rows, 32, max(1, enough // columns)))
            if rows > machine.rows:
                rows -= rows % machine.rows
            # As many tiles as that makes, but of even height.
            down = -(-height // rows)
            even = -(-height // down)
            even = min(rows, -(-even // machine.rows) * machine.rows)
            tile = (even, columns)
            # Products come in fixed shapes: what sticks out is computed for nothing.
            padded = (
                -(-even // machine.rows) * machine.rows * -(-columns // 16) * 16
                if machine.rows > 1
                else even * columns
            )
            filled = self.product_cost(tile) * padded / (even * columns)
            weights = self.product_cost((1, 1)) * machine.costs.weights
            cost = (filled + self.load_cost(tile, machine.costs) + weights) * self.tiles(tile)
            if self.read(tile)[0] * across > machine.scratch_bytes:
                cost *= 1.5
            if cost < best_cost:
                best, best_cost = tile, cost
        return best

    def splits(self, tile: tuple[int, int], batch: int, machine: Machine) -> int:
        """Into how many parts to divide the output channels, so that all threads work."""
        groups = -(-self.outputs // (PANEL * machine.panels))
        tiles = batch * self.tiles(tile)
        best, best_cost = 1, math.inf
        for splits in range(1, min(groups, 4 * machine.threads) + 1):
            rounds = -(-tiles * splits // machine.threads)
            part = self.product_cost(tile) * -(-groups // splits) / groups
            cost = rounds * (self.load_cost(tile, machine.costs) + part)
            if cost < best_cost * 0.97:
                best, best_cost = splits, cost
        return best

    def together(self, tile: tuple[int, int], batch: int, splits: int, machine: Machine) -> int:
        """Tiles that one item does in turn, loading the next during one.

        Only tile registers leave the vector units time for that; and there must be items
        enough for all threads to finish together.
        """
        if machine.isa != "amx_bf16":
            return 1
        items = batch * self.tiles(tile) * splits
        return max(1, min(16, items // (8 * machine.threads)))


def attention_blocks(pixels: int, matrices: int, machine: Machine) -> tuple[int, int]:
    """Queries of an item, and keys that it works on at once.

    The keys decide in what order sums are made, and so don't depend on the threads.
    """
    together = machine.rows * machine.pixels
    most = 192 if machine.isa == "amx_bf16" else 112
    queries = max(together, most // together * together)
    # Smaller items where there would be too few of them.
    while queries > together and matrices * -(-pixels // queries) < 3 * machine.threads:
        queries -= together
    return min(queries, pixels), 256


def place(buffers: list[Buffer]) -> int:
    """Give each buffer an offset; those that live at different times may share memory.

    Large buffers first, each at the lowest offset where it meets no other that lives at
    the same time.

    Returns:
        The size of the arena.
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.first)):
        offset = 0
        for other in placed:
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if other.offset >= offset + buffer.bytes:
                break
            offset = max(offset, other.offset + other.bytes)
        buffer.offset = offset
        placed.append(buffer)
        placed.sort(key=lambda b: b.offset)
    return max((b.offset + b.bytes for b in buffers), default=0)
