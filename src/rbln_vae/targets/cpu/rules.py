"""The engine's rules for schedules: tiles, layouts, and prepared buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ...errors import RBLNCompileError
from ...graph.ir import (
    Attention,
    Conv2d,
    Graph,
    Operation,
    PixelNorm,
    Shape,
)
from ...schedule.sweep import Sweep
from .packing import BLOCK, PANEL
from .tiles import (
    FASTEST,
    FEW_CELLS,
    FILTERED_FRAMES,
    FRAMES_OF_KERNEL,
    Choices,
    Convolution,
    Machine,
    gains_by_winograd,
)

MAX_TAPS = 64
"""The most taps of a convolution kernel."""

MAX_FRAMES = 3
"""The most frames of a convolution kernel."""


class CpuRules:
    """The engine's `Rules` for a graph and one input shape.

    Args:
        graph: The graph; its weights may be on the meta device.
        input_shape: `(N, C, H, W)`.
        machine: The machine that will run it.
        choices: What the rules may choose; by default everything that is faster.
    """

    def __init__(
        self,
        graph: Graph,
        input_shape: Sequence[int],
        machine: Machine,
        choices: Choices = FASTEST,
    ) -> None:
        self.graph = graph
        self.machine = machine
        self.choices = choices
        self.shapes = graph.infer_shapes(tuple(input_shape))
        self._normed = {o.inputs[0] for o in graph.operations if o.group_norm is not None}
        self._convolutions: dict[str, Convolution] = {}
        self._cells: dict[Convolution, tuple[int, int]] = {}
        self._tiles: dict[Convolution, tuple[int, int]] = {}
        self._partitions: dict[
            tuple[Convolution, tuple[int, int], int], tuple[tuple[int, int], int]
        ] = {}

    def require(self, operation: Operation) -> None:
        match operation:
            case Conv2d():
                self.convolution(operation)
            case Attention() if not operation.scale > 0:
                raise RBLNCompileError(
                    f"The target 'cpu' needs a scale above zero in attention, "
                    f"{operation.output!r} has {operation.scale}."
                )
            case PixelNorm():
                raise RBLNCompileError(
                    f"The target 'cpu' takes an RMS norm only before convolutions, and "
                    f"{operation.output!r} is read by other operations."
                )

    def row_bytes(self, channels: int, width: int) -> int:
        return _blocks(channels) * width * BLOCK * self.machine.element_bytes

    def prepared(self, operation: Operation) -> Mapping[str, int]:
        match operation:
            case Conv2d():
                conv = self.convolution(operation)
                if not conv.winograd:
                    return {}
                kernels = conv.matrices * conv.panels * PANEL * _blocks(conv.inputs) * BLOCK
                return {"kernels": kernels * 4}
            case Attention(heads=heads):
                batch, keys, height, width = self.shapes[operation.key]
                values = self.shapes[operation.value][1]
                panel = BLOCK * PANEL * self.machine.element_bytes
                matrices = batch * heads * _blocks(height * width) * panel
                return {
                    "keys": matrices * 2 * _blocks(keys // heads),
                    "values": matrices * -(-(values // heads) // PANEL),
                }
        return {}

    def sums_bytes(self, operation: Conv2d) -> int:
        conv = self.convolution(operation)
        return self.shapes[operation.output][0] * conv.tiles(self.cell(conv)) * conv.sums_bytes

    def statistics_bytes(self, shape: Shape) -> int:
        height, width = statistics_cell(shape)
        cells = -(-shape[2] // height) * -(-shape[3] // width)
        return shape[0] * cells * 2 * _blocks(shape[1]) * BLOCK * 4

    def coefficients_bytes(self, shape: Shape) -> int:
        return shape[0] * 2 * _blocks(shape[1]) * BLOCK * 4

    def rows_at_once(self, operation: Conv2d, *, summed: bool) -> int:
        conv = self.convolution(operation)
        if not summed:
            return conv.rows_at_once
        # Sums are made per cell of the whole image.
        return self.cell(conv)[0] * (2 if operation.upsample else 1)

    def strip_rows(self, sweep: Sweep) -> int:
        tiles = min(
            (
                -(-conv.grid[1] // tile[1]) / tile[0]
                for operation in (*sweep.members, *sweep.targets)
                if isinstance(operation, Conv2d)
                for conv in [self.convolution(operation)]
                for tile in [self.tile(conv)]
            ),
            default=1.0,
        )
        return min(
            max(8, min(16, sweep.height // 16), int(4 * self.machine.threads / tiles)),
            max(1, sweep.height // 8),
        )

    @property
    def overwrites(self) -> bool:
        return self.choices.in_place

    def runs_in_place(self, operation: Conv2d) -> bool:
        conv = self.convolution(operation)
        return (
            conv.kernel == (1, 1)
            and operation.frames == 1
            and operation.stride == 1
            and not any(operation.padding)
            and not operation.upsample
            and operation.residual is None
            and _blocks(conv.outputs) <= _blocks(conv.inputs)
            # Each tile is read once, before it is written.
            and self.partition(conv, conv.unit, self.shapes[operation.output][0])[1] == 1
        )

    # Lowering uses these, too.

    def skipped_blocks(self, operation: Conv2d) -> int:
        """The blocks of input channels of frames that a convolution leaves out."""
        return operation.left_out * _blocks(self.shapes[operation.input][1])

    def convolution(self, operation: Conv2d) -> Convolution:
        """The properties of a convolution that determine its tiles.

        Raises:
            RBLNCompileError: The engine has no kernel for the convolution.
        """
        if operation.output not in self._convolutions:
            self._convolutions[operation.output] = self._convolution(operation)
        return self._convolutions[operation.output]

    def _convolution(self, operation: Conv2d) -> Convolution:
        outputs, _, height, width = operation.kernel(self.graph.weights)
        inputs = self.shapes[operation.input][1]
        if operation.frames > 1:  # of each frame whole blocks
            inputs = (operation.frames - operation.left_out) * _blocks(inputs) * BLOCK
        doubles = operation.doubles(self.graph.weights)
        if operation.frames > (1 if doubles else MAX_FRAMES):
            raise RBLNCompileError(
                f"The target 'cpu' takes convolutions over up to {MAX_FRAMES} frames, and over one "
                f"that is doubled; {operation.output!r} has {operation.frames}."
            )
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
            doubles=doubles,
            grid=(grid[0], grid[1]),
            normed=operation.norm is not None or operation.activation is not None,
        )
        # Decided by the size of the whole image, so that strips do not change the bits.
        gains = gains_by_winograd(conv, self.machine, self.choices)
        conv = dataclasses.replace(conv, winograd=gains)
        alone = not gains or conv.phases > 1 or conv.halves
        at_once = 1 if alone else self.frames_at_once(operation)
        if at_once == 1:
            return conv
        return dataclasses.replace(conv, inputs=inputs // operation.frames, at_once=at_once)

    def stacked(self, operation: Conv2d) -> int:
        """The frames that stand one after the other in the input of a convolution over frames."""
        if not operation.earlier:
            return 1
        return self.shapes[operation.input][0] // self.shapes[operation.earlier[0]][0]

    def frames_at_once(self, operation: Conv2d) -> int:
        """How many frames a convolution makes at once if it filters over time."""
        if len(operation.earlier) + 1 != FRAMES_OF_KERNEL or operation.output in self._normed:
            return 1
        stacked = self.stacked(operation)
        return next((n for n in FILTERED_FRAMES if stacked % n == 0), 1)

    def cell(self, conv: Convolution) -> tuple[int, int]:
        """The height and width of the parts of a whole convolution that are summed together."""
        if conv not in self._cells:
            self._cells[conv] = conv.cell(self.machine)
        return self._cells[conv]

    def tile(self, conv: Convolution) -> tuple[int, int]:
        """The height and width of the tiles with the least overhead for a few threads."""
        if conv not in self._tiles:
            self._tiles[conv] = conv.tile(conv.unit, self.machine)
        return self._tiles[conv]

    def partition(
        self, conv: Convolution, cell: tuple[int, int], batch: int
    ) -> tuple[tuple[int, int], int]:
        """The height and width of a convolution's tiles, and the parts of its output channels.

        Args:
            conv: The convolution, or some rows of one.
            cell: What its tiles are multiples of.
            batch: The number of images.
        """
        if not self.choices.splits:
            return conv.tile(cell, self.machine), 1
        key = conv, cell, batch
        if key not in self._partitions:
            self._partitions[key] = conv.partition(cell, batch, self.machine)
        return self._partitions[key]

    def together(self, conv: Convolution, tile: tuple[int, int], splits: int, batch: int) -> int:
        """The number of tiles that one item of work computes."""
        if not self.choices.together:
            return 1
        return conv.together(tile, batch, splits, self.machine)


def statistics_cell(shape: Shape) -> tuple[int, int]:
    """The height and width of cells of an image that no convolution has summed."""
    height, width = shape[2], shape[3]
    pixels = min(4096, max(64, height * width // FEW_CELLS))
    return max(1, min(height, pixels // width)), min(width, pixels)


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)
