"""From a graph and an input shape to a plan: what the engine does, and in what memory.

A plan is a flat list of steps over one arena. All that a run does is decided here: the
order, where each buffer lies and which share memory, what is computed again rather than
kept. The tiles are those of `tiles.py`: they depend neither on the number of threads nor
on the memory that there is, and so neither do the results, to the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from .plan import Plan, Step
from .sweep import Export, Import, Keep, Sweep, top_row
from .tiles import Convolution, Machine, attention_blocks, gains_by_winograd

MAX_TAPS = 64
"""Of a convolution kernel that the engine takes."""

REPLACED_BYTES = 2**28
"""Of a value that is written over in a sweep; smaller ones are held beside what is made of them."""

LARGEST_UNIT = 64
"""Rows that strips of several targets may have to be a multiple of."""


def make_plan(
    graph: Graph,
    input_shape: Iterable[int],
    machine: Machine,
    recomputed: Iterable[Value] = (),
    *,
    sketch: bool = False,
    beside: bool = False,
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
        beside: Whether to write no value over another one in a sweep. Where values are
            recomputed none is.

    Raises:
        GraphError: The operations don't fit the input.
        RBLNCompileError: The engine has no kernel for an operation.
    """
    return _Planner(
        graph, tuple(input_shape), machine, frozenset(recomputed), sketch, beside
    ).plan()


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
        beside: bool,
    ) -> None:
        self.graph = graph
        self.machine = machine
        self.recomputed = recomputed
        self.sketch = sketch
        self.in_place = not (beside or recomputed or input_shape[0] > 1)
        self.shapes = graph.infer_shapes(input_shape)
        self.heights = {v: s[2] for v, s in self.shapes.items()}
        self.batch = input_shape[0]
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.images: dict[Value, Image] = {}
        self.coefficients: dict[tuple[Value, Norm], Buffer] = {}
        self.norms: dict[Value, list[Norm]] = {}
        self.tiles: dict[Convolution, tuple[int, int]] = {}
        self.divisions: dict[tuple[Convolution, tuple[int, int]], int] = {}
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
            elif readers := self.replacing(index, operation):
                self.sweep(readers, kept=readers[0].inputs[0])
            else:
                self.operation(index, operation)
        if graph.output in self.recomputed:
            self.sweep([Export("", graph.output)])
        else:
            self.export_rows(self.images[graph.output], 0)
        arena = place(self.buffers, self.times())
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

    def times(self) -> list[int]:
        """When each step happens, and what follows the last; a sweep is one moment.

        A sketch of a plan has fewer steps in its sweeps, and is to have the same memory.
        """
        sweeps = [step.sweep for step in self.steps]
        passes = [int(not (a and a == b)) for a, b in itertools.pairwise([0, *sweeps])]
        return [*itertools.accumulate(passes), len(sweeps)]

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
        return dataclasses.replace(conv, winograd=gains_by_winograd(conv, self.machine))

    def tile(self, conv: Convolution) -> tuple[int, int]:
        """The tiles of a convolution; many strips ask for the same."""
        if conv not in self.tiles:
            self.tiles[conv] = conv.tile(self.machine)
        return self.tiles[conv]

    def splits(self, conv: Convolution, tile: tuple[int, int]) -> int:
        """Into how many parts its output channels are divided, likewise."""
        if (conv, tile) not in self.divisions:
            self.divisions[conv, tile] = conv.splits(tile, self.batch, self.machine)
        return self.divisions[conv, tile]

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
            and self.splits(conv, self.tile(conv)) == 1
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
        splits = self.splits(conv, tile)
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
        if any(isinstance(member, Keep) for member in sweep.members):
            # Beside all of a value some of its rows are little, and few strips cost the least.
            wanted = max(wanted, sweep.height // 16)
        unit = self.strip_unit(sweep.targets)
        return unit * max(1, round(wanted / unit))

    def replacing(self, index: int, operation: Operation) -> list[Operation]:
        """The convolutions that are all there is of a value, and fit where it lies.

        Such are a residual block's first convolution and that of its shortcut, where they
        halve the channels. Made in one sweep, over the value itself, they take no memory
        beside it but for a few of its rows.
        """
        if not self.in_place or not isinstance(operation, Conv2d):
            return []
        value = operation.input
        rest = self.graph.operations[index:]
        readers = [other for other in rest if value in other.inputs]
        image = self.images[value]
        if (
            len(readers) < 2
            or value == self.graph.output
            or image.blocks * image.plane * BLOCK * self.machine.element_bytes < REPLACED_BYTES
            or sum(-(-self.shapes[o.output][1] // BLOCK) for o in readers) > image.blocks
            or self.strip_unit(readers) > LARGEST_UNIT
        ):
            return []
        for reader in readers:
            if (
                not isinstance(reader, Conv2d)
                or reader.residual is not None
                or self.shapes[reader.output][2:] != (image.height, image.width)
            ):
                return []
        if self.replaceable(self.graph.operations.index(readers[-1]), value) is None:
            return []
        return list(readers)

    def sweep(self, targets: Sequence[Operation], kept: Value | None = None) -> None:
        """Compute targets strip by strip, with the recomputed values that they need.

        A target that is itself recomputed is computed for its statistics alone.

        Args:
            targets: What to compute.
            kept: The value that the targets are written over, one beside the other.
        """
        self.sweeps += 1
        self.sweeping = self.sweeps
        sweep = Sweep(
            self.members(targets) if kept is None else [Keep(kept)],
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
        taken = 0
        for target in targets:
            if not isinstance(target, Conv2d):
                continue
            if kept is not None:
                self.images[target.output] = self.beside(kept, target.output, taken)
                taken += self.images[target.output].blocks
            elif target.output in self.recomputed:
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
                    case Keep():
                        self.copy_rows(value, self.images[value].rows(*rows), rows_of(value, rows))
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
        if kept is not None:
            self.images[kept].buffer.last = len(self.steps) - 1
            for target in targets:
                self.images[target.output].buffer.first = len(self.steps)
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

    def beside(self, value: Value, output: Value, block: int) -> Image:
        """An image from a block of channels of another one on, which ends with this sweep."""
        image = self.images[value]
        place = Place(image.buffer, block * image.plane * BLOCK * self.machine.element_bytes)
        made = self.rows_image(output, image.height)
        made.buffer.bytes = made.blocks * made.plane * BLOCK * self.machine.element_bytes
        made.buffer.over = place
        return made

    def copy_rows(self, value: Value, source: Image, target: Image) -> None:
        """Copy an image or some rows of it."""
        arguments = {
            "input": source,
            "output": target,
            "factor": 1.0,
            "upsample": False,
            "above": 0,
            "left": 0,
            "residual": None,
            **self.norm_arguments(value, None),
        }
        self.emit("pointwise", value, "Keep", arguments, reads=[source], writes=[target])

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
