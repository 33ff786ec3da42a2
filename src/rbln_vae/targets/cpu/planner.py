"""From a graph and an input shape to a plan: what the engine does, and in what memory.

A plan is a flat list of steps over one arena. Everything that is decided, is decided
here: the order, where each buffer lies and which share memory, what is computed again
rather than kept, and the tiles that images are worked on in. Tiles depend neither on the
number of threads nor on the memory that there is, and so neither do the results, to the
last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
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
from .memory import ALIGNMENT, Buffer, Image, Place, place
from .packing import BLOCK, PANEL, bias_name
from .sweep import Export, Import, Sweep, top_row

WINOGRAD_CHANNELS = 32
"""In or out, that a convolution needs to gain by Winograd's algorithm."""

WINOGRAD_KERNELS = 96
"""What one position of a transformed kernel costs, in products that take as long."""

WINOGRAD_TILES = 32
"""Of 4x4 outputs, in a tile of the plan.

Enough that fetching kernels costs little beside multiplying by them; few enough that what
128 channels are transformed to stays in the L2 cache.
"""

WINOGRAD_TILE = 4
"""Rows and columns of outputs that Winograd's algorithm makes at once."""

MAX_TAPS = 64
"""Of a convolution kernel that the engine takes."""

LARGEST_UNIT = 64
"""Rows that strips of several targets may have to be a multiple of."""


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
        sweep: The number of the sweep that it is a strip of, from 1; else 0.
    """

    call: str
    name: str
    kind: str
    flops: int
    bytes: int
    arguments: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)
    sweep: int = 0


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
        recomputed: The values that are never held whole, but computed in strips wherever
            they are needed; the others are computed once.
        needed_flops: Floating-point operations that a run does where all values are kept.
    """

    input_shape: Shape
    output_shape: Shape
    machine: Machine
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    recomputed: tuple[Value, ...]
    needed_flops: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a run."""
        return sum(step.flops for step in self.steps)

    @property
    def extra_work(self) -> float:
        """What is computed again, as a share of what is needed."""
        return self.flops / self.needed_flops - 1 if self.needed_flops else 0.0

    def live_bytes(self) -> list[int]:
        """For each step, the bytes of the buffers that hold something then."""
        changes = [0] * (len(self.steps) + 1)
        for buffer in self.buffers:
            changes[buffer.first] += buffer.bytes
            changes[buffer.last + 1] -= buffer.bytes
        return list(itertools.accumulate(changes[:-1]))

    def describe(self) -> str:
        """The steps, their work and their memory, as a table; those of strips together."""
        lines = [
            f"{'x'.join(map(str, self.input_shape))} to {'x'.join(map(str, self.output_shape))}, "
            f"{self.machine.dtype}, {self.machine.isa}: {self.flops / 1e9:.1f} GFLOP "
            f"({self.extra_work:.1%} of extra work), arena of {self.arena_bytes / 2**20:.1f} MiB",
            f"{'GFLOP':>9} {'MiB live':>9}  step",
        ]
        together: dict[tuple[int, str, str], list[int]] = {}
        for index, step in enumerate(self.steps):
            together.setdefault((step.sweep, step.kind, step.name), []).append(index)
        live = self.live_bytes()
        for (sweep, kind, name), indices in together.items():
            first = self.steps[indices[0]]
            tile = first.arguments.get("tile")
            note = f", tiles of {tile[0]}x{tile[1]}" if tile else ""
            splits = first.arguments.get("splits", 1)
            note += f", channels in {splits} parts" if splits > 1 else ""
            note += f", sweep {sweep} in {len(indices)} strips" if sweep else ""
            flops = sum(self.steps[i].flops for i in indices) / 1e9
            most = max(live[i] for i in indices) / 2**20
            lines.append(f"{flops:9.2f} {most:9.1f}  {kind} {name}{note}")
        return "\n".join(lines)


def make_plan(
    graph: Graph,
    input_shape: Iterable[int],
    machine: Machine,
    recomputed: Iterable[Value] = (),
    *,
    sketch: bool = False,
) -> Plan:
    """Plan a run.

    Args:
        graph: What the passes made of it; its weights may be on the meta device.
        input_shape: `(N, input_channels, H, W)`.
        machine: What will run it.
        recomputed: Values that are not to be held whole, of `droppable`; for a batch of
            one only.
        sketch: Whether to leave out all strips but the first of each sweep, whose steps
            then stand for the work of all: enough to know the memory and the work.

    Raises:
        GraphError: The operations don't fit the input.
        RBLNCompileError: The engine has no kernel for an operation.
    """
    return _Planner(graph, tuple(input_shape), machine, frozenset(recomputed), sketch).plan()


def droppable(graph: Graph) -> frozenset[Value]:
    """The values that can be computed in strips wherever they are needed."""
    readers: dict[Value, list[Operation]] = {graph.output: [Export("", graph.output)]}
    for operation in graph.operations:
        for value in operation.inputs:
            readers.setdefault(value, []).append(operation)
    makers: list[Operation] = [Import(graph.input), *graph.operations]
    return frozenset(
        maker.output
        for maker in makers
        if isinstance(maker, (Import, Conv2d))
        and all(isinstance(reader, (Export, Conv2d)) for reader in readers[maker.output])
        # What arrives has no convolution that would sum its statistics.
        and not (
            isinstance(maker, Import)
            and any(
                getattr(r, "norm", None) and r.inputs[0] == maker.output
                for r in readers[maker.output]
            )
        )
    )


@dataclass(frozen=True)
class _Statistics:
    """Sums by tile that a step left for the norms of its output."""

    buffer: Buffer
    channels: int
    grid: tuple[int, int]
    tile: tuple[int, int]
    points: int


class _Planner:
    def __init__(
        self,
        graph: Graph,
        input_shape: Shape,
        machine: Machine,
        recomputed: frozenset[Value],
        sketch: bool,
    ) -> None:
        self.graph = graph
        self.machine = machine
        self.recomputed = recomputed
        self.sketch = sketch
        self.shapes = graph.infer_shapes(input_shape)
        self.heights = {v: s[2] for v, s in self.shapes.items()}
        self.batch = input_shape[0]
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.images: dict[Value, Image] = {}
        self.coefficients: dict[tuple[Value, Norm], Buffer] = {}
        self.norms: dict[Value, list[Norm]] = {}
        self.tiles: dict[Convolution, tuple[int, int]] = {}
        self.sweeps = 0
        self.sweeping = 0
        for operation in graph.operations:
            norm = getattr(operation, "norm", None)
            if norm is not None:
                value = operation.inputs[0]
                # What follows the norm doesn't change its coefficients.
                bare = dataclasses.replace(norm, activation=None)
                norms = self.norms.setdefault(value, [])
                if bare not in norms:
                    norms.append(bare)
        self.convolutions = {
            operation.output: self.convolution_of(operation)
            for operation in graph.operations
            if isinstance(operation, Conv2d)
        }
        self.needed_until = self.last_needs()

    def last_needs(self) -> dict[Value, int]:
        """For each value, the index of the last operation that it is needed for.

        What is computed again needs its inputs as long as it is needed itself.
        """
        until = {self.graph.output: len(self.graph.operations)}
        for index, operation in reversed(list(enumerate(self.graph.operations))):
            again = operation.output in self.recomputed
            needed = max(index, until.get(operation.output, -1)) if again else index
            for value in operation.inputs:
                until[value] = max(until.get(value, -1), needed)
        return until

    def plan(self) -> Plan:
        graph = self.graph
        if graph.input not in self.recomputed:
            source = self.image(graph.input)
            self.import_rows(source, 0)
            self.statistics_of(graph.input, None)
        for index, operation in enumerate(graph.operations):
            if operation.output in self.images:
                continue  # made in one sweep with another
            if operation.output in self.recomputed:
                if operation.output in self.norms:
                    self.sweep([operation])
            elif self.recomputed.intersection(operation.inputs):
                self.sweep([operation, *self.partners(index)])
            else:
                self.operation(index, operation)
        if graph.output in self.recomputed:
            self.sweep([Export("", graph.output)])
        else:
            self.export_rows(self.images[graph.output], 0)
        arena = place(self.buffers)
        return Plan(
            self.shapes[graph.input],
            self.shapes[graph.output],
            self.machine,
            tuple(self.resolve(step) for step in self.steps),
            tuple(self.buffers),
            arena,
            tuple(o.output for o in self.makers() if o.output in self.recomputed),
            sum(o.flops(self.shapes, graph.weights) for o in graph.operations),
        )

    def makers(self) -> Sequence[Operation]:
        return (Import(self.graph.input), *self.graph.operations)

    # Memory.

    def buffer(self, name: str, size: int) -> Buffer:
        """A buffer that the next step is the first to use."""
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        result = Buffer(name, rounded, len(self.steps), len(self.steps))
        self.buffers.append(result)
        return result

    def rows_image(self, value: Value, rows: int) -> Image:
        """An image in a buffer of its own that holds so many rows of a value."""
        _, channels, _, width = self.shapes[value]
        blocks = -(-channels // BLOCK)
        plane = rows * width
        size = self.batch * blocks * plane * BLOCK * self.machine.element_bytes
        return Image(self.buffer(value, size), channels, rows, width, plane, blocks * plane)

    def image(self, value: Value, over: Image | None = None) -> Image:
        """An image for a value that the next step makes, in a new buffer or an old one."""
        if over is None:
            self.images[value] = self.rows_image(value, self.heights[value])
        else:
            self.images[value] = dataclasses.replace(over, channels=self.shapes[value][1])
        return self.images[value]

    def replaceable(self, index: int, value: Value | None, *read: Value) -> Image | None:
        """The image of a value, if the operation may write its output over it."""
        if value is None or value in read or self.needed_until[value] != index:
            return None
        image = self.images[value]
        # Another value may be stored in the same buffer, as after an identity.
        others = (
            other.buffer
            for name, other in self.images.items()
            if name != value and self.needed_until.get(name, -1) >= index
        )
        return None if any(b is image.buffer for b in others) else image

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
            if isinstance(each, Image):
                size += self.batch * each.elements * self.machine.element_bytes
                each.buffer.last = len(self.steps)
            else:
                size += each.bytes
                each.last = len(self.steps)
        arguments = {"batch": self.batch, **arguments}
        self.steps.append(
            Step(call, name, kind, flops, size, arguments, weights or {}, self.sweeping)
        )

    def resolve(self, step: Step) -> Step:
        """The step with offsets in place of buffers, now that they are known."""

        def known(argument: Any) -> Any:
            match argument:
                case Image():
                    return argument.sizes(self.machine.element_bytes)
                case Place(buffer, offset):
                    return buffer.offset + offset
                case Buffer():
                    return argument.offset
            return argument

        arguments = {name: known(argument) for name, argument in step.arguments.items()}
        return dataclasses.replace(step, arguments=arguments)

    def import_rows(self, image: Image, first: int) -> None:
        arguments = {"image": image, "first_row": first}
        self.emit("import_image", self.graph.input, "Import", arguments, writes=[image])

    def export_rows(self, image: Image, first: int) -> None:
        arguments = {"image": image, "first_row": first}
        self.emit("export_image", self.graph.output, "Export", arguments, reads=[image])

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

    # Convolutions.

    def convolution_of(self, operation: Conv2d) -> Convolution:
        outputs, inputs, height, width = operation.kernel(self.graph.weights)
        if height * width > MAX_TAPS:
            raise RBLNCompileError(
                f"The target 'cpu' takes convolution kernels of up to {MAX_TAPS} taps, "
                f"{operation.output!r} has {height}x{width}."
            )
        grid = self.shapes[operation.input if operation.upsample else operation.output][2:]
        conv = Convolution(
            inputs=inputs,
            outputs=outputs,
            kernel=(height, width),
            stride=operation.stride,
            upsample=operation.upsample,
            grid=(grid[0], grid[1]),
            normed=operation.norm is not None,
        )
        # By the size of the whole image, so that the bits of a result depend on it alone.
        winograd = self.machine.dtype == "float32" and gains_by_winograd(conv)
        return dataclasses.replace(conv, winograd=winograd)

    def tile(self, conv: Convolution) -> tuple[int, int]:
        """The tiles of a convolution; many strips ask for the same."""
        if conv not in self.tiles:
            self.tiles[conv] = conv.tile(self.machine)
        return self.tiles[conv]

    def convolution(self, index: int, operation: Conv2d) -> None:
        """All rows at once."""
        source = self.images[operation.input]
        residual = self.images[operation.residual] if operation.residual else None
        over = self.replaceable(index, operation.residual, operation.input)
        if over is None and self.reads_what_it_writes(operation):
            over = self.replaceable(index, operation.input)
        target = self.image(operation.output, over)
        statistics = self.summed_statistics(operation)
        rows = (0, self.heights[operation.output])
        kernels = self.winograd_kernels(operation)
        self.convolve(operation, rows, source, 0, target, residual, statistics, kernels)
        self.statistics_of(operation.output, statistics)

    def reads_what_it_writes(self, operation: Conv2d) -> bool:
        """Whether a tile of the output needs no other pixels than the same of the input."""
        conv = self.convolutions[operation.output]
        return (
            conv.kernel == (1, 1)
            and operation.stride == 1
            and not any(operation.padding)
            and not operation.upsample
            and operation.residual is None
            and -(-conv.outputs // BLOCK) <= -(-conv.inputs // BLOCK)
            # Each tile is read once, before it is written.
            and conv.splits(self.tile(conv), self.batch, self.machine) == 1
        )

    def summed_statistics(self, operation: Conv2d) -> _Statistics | None:
        """Where a convolution sums what the norms of its output need, if there are any."""
        if operation.output not in self.norms:
            return None
        conv = self.convolutions[operation.output]
        tile = self.tile(conv)
        size = self.batch * conv.tiles(tile) * conv.sums_bytes
        return _Statistics(
            self.buffer(f"{operation.output} statistics", size),
            conv.panels * PANEL,
            conv.grid,
            tile,
            4 if operation.upsample else 1,
        )

    def convolve(
        self,
        operation: Conv2d,
        rows: tuple[int, int],
        source: Image,
        source_row: int,
        target: Image,
        residual: Image | None,
        statistics: _Statistics | None,
        kernels: Buffer | None,
    ) -> None:
        """Compute some rows of an output.

        Args:
            operation: What to compute.
            rows: Which; they begin with a row of tiles where statistics are summed.
            source: The rows of the input that they read.
            source_row: The first of these.
            target: For the rows themselves.
            residual: Those of what is added to them.
            statistics: Of the whole output.
            kernels: What `winograd_kernels` gave.
        """
        machine = self.machine
        whole = self.convolutions[operation.output]
        scale = 2 if operation.upsample else 1
        begin, end = rows[0] // scale, rows[1] // scale
        conv = dataclasses.replace(whole, grid=(end - begin, whole.grid[1]))
        # Statistics are summed by tiles of the whole image; else strips have tiles of their own.
        tall, wide = self.tile(conv if statistics is None else whole)
        tile = (min(tall, end - begin), wide)
        splits = conv.splits(tile, self.batch, machine)
        partials = None
        if statistics is not None:
            above = begin // tall * -(-whole.grid[1] // wide)
            partials = Place(statistics.buffer, above * whole.sums_bytes)
        weights = {"weights": operation.weight, "bias": bias_name(operation)}
        if kernels is not None:
            del weights["weights"]
        norm = self.norm_arguments(operation.input, operation.norm)
        flops = operation.flops(self.shapes, self.graph.weights)
        if not self.sketch:
            flops = flops * (rows[1] - rows[0]) // self.heights[operation.output]
        phases = 4 if operation.upsample else 1
        weight_bytes = (
            math.prod(conv.kernel) * conv.inputs * conv.outputs * phases * machine.element_bytes
        )
        self.emit(
            "convolution",
            operation.output,
            operation.kind,
            dict(
                input=source,
                output=target,
                kernels=kernels,
                kernel=conv.kernel,
                stride=operation.stride,
                above=source_row - top_row(operation, rows[0]),
                left=operation.padding[2],
                upsample=operation.upsample,
                residual=residual,
                partials=partials,
                tile=tile,
                splits=splits,
                together=conv.together(tile, self.batch, splits, machine),
                **norm,
            ),
            reads=[source, residual, kernels, norm["coefficients"]],
            writes=[target, *([statistics.buffer] if statistics else [])],
            weights=weights,
            flops=flops,
            extra_bytes=0 if kernels is not None else weight_bytes,
        )

    def winograd_kernels(self, operation: Conv2d) -> Buffer | None:
        """Transform the kernels of a convolution that is done by Winograd's algorithm."""
        conv = self.convolutions[operation.output]
        if not conv.winograd:
            return None
        blocks = -(-conv.inputs // BLOCK)
        products = conv.panels * PANEL * blocks * BLOCK * conv.products
        kernels = self.buffer(f"{operation.output} kernels", products * 4)
        self.emit(
            "winograd_kernels",
            operation.output,
            "Winograd",
            {
                "panels": conv.panels,
                "blocks": blocks,
                "upsample": conv.upsample,
                "kernels": kernels,
            },
            writes=[kernels],
            weights={"weights": operation.weight},
        )
        return kernels

    # Strips.

    def partners(self, index: int) -> list[Operation]:
        """Later operations that read what this one recomputes, and can go along with it."""
        operation = self.graph.operations[index]
        members = {member.output for member in self.members([operation])}
        found: list[Operation] = []
        for other in self.graph.operations[index + 1 :]:
            shared = members.intersection(other.inputs)
            if (
                shared
                and isinstance(other, Conv2d)
                and other.output not in self.recomputed
                and other.output not in self.images
                and {m.output for m in self.members([other])} <= members
                and all(v in members or v in self.images for v in other.inputs)
                and self.heights[other.output] == self.heights[operation.output]
                and self.strip_unit([operation, *found, other]) <= LARGEST_UNIT
            ):
                found.append(other)
        return found

    def members(self, targets: Sequence[Operation]) -> list[Operation]:
        """What makes the recomputed values that some operations need, in order."""
        makers = {maker.output: maker for maker in self.makers()}
        needed: set[Value] = set()
        waiting = [value for target in targets for value in target.inputs]
        while waiting:
            value = waiting.pop()
            if value in self.recomputed and value not in needed:
                needed.add(value)
                waiting.extend(makers[value].inputs)
        return [maker for maker in self.makers() if maker.output in needed]

    def strip_unit(self, targets: Iterable[Operation]) -> int:
        """What the rows of a strip must be a multiple of."""
        unit = 1
        for target in targets:
            if isinstance(target, Conv2d):
                conv = self.convolutions[target.output]
                rows = conv.rows_at_once
                if target.output in self.norms:
                    rows = self.tile(conv)[0] * (2 if target.upsample else 1)
                unit = math.lcm(unit, rows)
        return unit

    def strip_height(self, sweep: Sweep) -> int:
        """Rows of a strip: work enough for all threads, little memory."""
        tiles = min(
            -(-self.convolutions[o.output].grid[1] // tile[1]) / tile[0]
            for o in (*sweep.members, *sweep.targets)
            if isinstance(o, Conv2d)
            for tile in [self.tile(self.convolutions[o.output])]
        )
        wanted = min(
            max(8, min(32, sweep.height // 16), int(4 * self.machine.threads / tiles)),
            max(1, sweep.height // 8),
        )
        unit = self.strip_unit(sweep.targets)
        return unit * max(1, round(wanted / unit))

    def sweep(self, targets: Sequence[Operation]) -> None:
        """Compute targets strip by strip, with the recomputed values that they need.

        A target that is itself recomputed is computed for its statistics alone.
        """
        self.sweeps += 1
        self.sweeping = self.sweeps
        sweep = Sweep(
            self.members(targets),
            targets,
            self.heights,
            {value: conv.kernel[0] for value, conv in self.convolutions.items()},
            {value: conv.rows_at_once for value, conv in self.convolutions.items()},
            step=1,
        )
        sweep = dataclasses.replace(sweep, step=self.strip_height(sweep))
        windows = {
            value: self.rows_image(value, rows) for value, rows in sweep.window_heights().items()
        }
        statistics: dict[Value, _Statistics | None] = {}
        dropped: dict[Value, Image] = {}
        for target in targets:
            if not isinstance(target, Conv2d):
                continue
            if target.output in self.recomputed:
                dropped[target.output] = self.rows_image(
                    target.output, min(sweep.step, sweep.height)
                )
            else:
                self.image(target.output, self.overwritten(sweep))
            statistics[target.output] = self.summed_statistics(target)

        kernels = {
            o.output: self.winograd_kernels(o)
            for o in (*sweep.members, *targets)
            if isinstance(o, Conv2d)
        }
        held: dict[Value, tuple[int, int]] = {}

        def rows_of(value: Value, rows: tuple[int, int]) -> Image:
            if value in windows:
                first = held[value][0]
                return windows[value].rows(rows[0] - first, rows[1] - first)
            return self.images[value].rows(*rows)

        for strip in itertools.islice(sweep.strips(), 1 if self.sketch else None):
            for operation in (*sweep.members, *targets):
                value, rows = operation.output, strip.computed[operation.output]
                if value in windows:
                    self.move_window(value, windows[value], held.get(value), strip.held[value])
                    held[value] = strip.held[value]
                if rows[0] == rows[1]:
                    continue
                match operation:
                    case Import():
                        self.import_rows(rows_of(value, rows), rows[0])
                    case Export(input=result):
                        self.export_rows(rows_of(result, rows), rows[0])
                    case Conv2d(input=source, residual=residual):
                        read = dict(sweep.read(operation, rows))
                        output = (
                            dropped[value].rows(0, rows[1] - rows[0])
                            if value in dropped
                            else rows_of(value, rows)
                        )
                        self.convolve(
                            operation,
                            rows,
                            rows_of(source, read[source]),
                            read[source][0],
                            output,
                            rows_of(residual, rows) if residual else None,
                            statistics.get(value),
                            kernels[value],
                        )
        self.sweeping = 0
        for target in targets:
            if isinstance(target, Conv2d):
                self.statistics_of(target.output, statistics[target.output])

    def overwritten(self, sweep: Sweep) -> Image | None:
        """The image of a value that the only target of a sweep may be written over."""
        (target, *others) = sweep.targets
        if others:
            return None
        index = self.graph.operations.index(target)
        _, channels, height, width = self.shapes[target.output]
        read = dict.fromkeys(v for o in (*sweep.members, target) for v in o.inputs)
        for value in read:
            image = self.images.get(value)
            if (
                image is not None
                and (image.height, image.width) == (height, width)
                and -(-channels // BLOCK) <= image.blocks
                and self.replaceable(index, value)
                and sweep.may_overwrite(value)
            ):
                return image
        return None

    def move_window(
        self,
        value: Value,
        window: Image,
        before: tuple[int, int] | None,
        after: tuple[int, int],
    ) -> None:
        """Move the rows that a window keeps to its beginning."""
        if before is None or before[0] == after[0] or before[1] == after[0]:
            return
        arguments = {
            "image": window,
            "from_row": after[0] - before[0],
            "rows": before[1] - after[0],
        }
        self.emit("move_rows", value, "MoveRows", arguments, reads=[window])

    # Everything else.

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
                residual=residual,
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
                residual=other,
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
        if statistics is None:
            image = self.images[value]
            grid = (image.height, image.width)
            tile = (max(1, min(grid[0], 4096 // grid[1])), min(grid[1], 4096))
            filled = image.blocks * BLOCK
            tiles = -(-grid[0] // tile[0]) * -(-grid[1] // tile[1])
            buffer = self.buffer(f"{value} statistics", self.batch * tiles * 2 * filled * 4)
            statistics = _Statistics(buffer, filled, grid, tile, 1)
            self.emit(
                "statistics",
                value,
                "Statistics",
                {"input": image, "tile": tile, "partials": buffer},
                reads=[image],
                writes=[buffer],
            )
        channels = self.shapes[value][1]
        for norm in norms:
            blocks = -(-channels // BLOCK)
            coefficients = self.buffer(f"{value} coefficients", self.batch * 2 * blocks * BLOCK * 4)
            self.coefficients[value, norm] = coefficients
            self.emit(
                "norm",
                value,
                "Norm",
                {
                    "channels": channels,
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
    winograd: bool = False

    @property
    def row_step(self) -> int:
        """Rows and columns of the grid at whose multiples its tiles begin.

        An output's last bits depend on where in so many rows and columns it lies, and on
        nothing else of the plan.
        """
        return WINOGRAD_TILE if self.winograd else 1

    @property
    def products(self) -> int:
        """Of an input and an output channel, for a point of the grid or a 4x4 of them."""
        if self.winograd:
            return 100 if self.upsample else 36
        return math.prod(self.kernel) * (4 if self.upsample else 1)

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def sums_bytes(self) -> int:
        """Of the statistics of a tile: a mean and a sum of squares for each channel."""
        return 2 * self.panels * PANEL * 4

    @property
    def rows_at_once(self) -> int:
        """Rows of the output that aren't computed one without the other."""
        return self.row_step * (2 if self.upsample else 1)

    def read(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the input that a tile reads."""
        if self.upsample:
            return tile[0] + 2, tile[1] + 2
        if self.winograd:
            rows, columns = (-(-size // WINOGRAD_TILE) * WINOGRAD_TILE for size in tile)
            return rows + 2, columns + 2
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
        points = math.prod(-(-size // self.row_step) for size in tile)
        return points * self.products * self.inputs * self.outputs

    def tile(self, machine: Machine) -> tuple[int, int]:
        """Height and width of the tiles: the least overhead that fits the cache."""
        if self.winograd:
            return self.winograd_tile(machine)
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

    def winograd_tile(self, machine: Machine) -> tuple[int, int]:
        """Tiles of at most `WINOGRAD_TILES` 4x4 outputs, those that read the least."""
        down, across = (-(-size // WINOGRAD_TILE) for size in self.grid)
        best, best_cost = (1, 1), math.inf
        for columns in range(min(across, WINOGRAD_TILES), 0, -1):
            rows = min(down, WINOGRAD_TILES // columns)
            tile = rows * WINOGRAD_TILE, columns * WINOGRAD_TILE
            weights = self.product_cost((1, 1)) * machine.costs.weights
            cost = self.tiles(tile) * (self.load_cost(tile, machine.costs) + weights)
            if cost < best_cost:
                best, best_cost = tile, cost
        return min(best[0], self.grid[0]), min(best[1], self.grid[1])

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


def gains_by_winograd(conv: Convolution) -> bool:
    """Whether Winograd's algorithm does a convolution of 3x3 faster than the definition.

    It has to have channels enough to pay for the transforms of images, and pixels enough
    to pay for that of its kernels, which is done in each run: stored, they would take
    four times the space.
    """
    if max(conv.inputs, conv.outputs) < WINOGRAD_CHANNELS:
        return False
    if not conv.upsample and (conv.kernel, conv.stride) != ((3, 3), 1):
        return False
    winograd = dataclasses.replace(conv, winograd=True)
    saved = conv.product_cost(conv.grid) - winograd.product_cost(conv.grid)
    return saved >= WINOGRAD_KERNELS * winograd.product_cost((1, 1))


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
