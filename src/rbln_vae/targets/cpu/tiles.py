"""Chooses the tiles and the algorithms of convolutions and attention.

What affects bits depends only on sizes and on the engine's table of kernels: algorithms, and
*cells*, the parts of an image whose statistics are summed together. Tiles consist of whole
cells, and divide the work among the threads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ... import _engine
from .packing import BLOCK, DOUBLING_PRODUCTS, PANEL

SQUARE = 4
"""The rows and columns of outputs that Winograd's algorithm computes at once, and doubling."""

WINOGRAD_PRODUCTS, HALVING_PRODUCTS = 36, 81
"""The products that Winograd's algorithm needs for them with stride 1, and with stride 2."""

FRAMES_OF_KERNEL = 3
"""The frames of the kernels that are filtered over time."""

FILTERED_FRAMES = (4, 2)
"""How many frames filtering over time makes at once, the best first."""

SQUARES = 32
"""The most such squares in a tile of the plan.

Enough that fetching weights costs little compared with the products; few enough that the
transformed 128 channels stay in the L2 cache.
"""

FEW_CELLS, MANY_CELLS = 64, 1024
"""With fewer cells than these, or more, cells are half as high, or twice.

More cells can be divided among more threads, but their statistics must be read again.
"""

GAIN = 0.97
"""The most time that other tiles may take of what those with the least overhead take."""

MOST_PARTS = 32
"""The most parts of a side of a tile, or more rounds of attention, that are tried."""


@dataclass(frozen=True)
class Machine:
    """The machine that runs a program.

    Attributes:
        kernels: The row of the engine's table for one instruction set and dtype.
        threads: The number of threads of a run.
    """

    kernels: _engine.Kernels
    threads: int

    @property
    def isa(self) -> str:
        return self.kernels.isa

    @property
    def dtype(self) -> str:
        return self.kernels.dtype

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def scratch_element_bytes(self) -> int:
        """Bytes of an element of a tile's input, which has the type that products need."""
        return 2 if self.kernels.multiplies_bfloat16 else 4


@dataclass(frozen=True)
class Choices:
    """What the rules may choose to be faster; with any of them a model is the same.

    The defaults are for use, others for measuring what each is worth.

    Attributes:
        winograd: The most time that Winograd's algorithm may take of what the definition takes.
            Below 1, since it needs more memory; 0 is never, and infinity wherever it can.
        halving: Let it also be used with stride 2.
        splits: Divide output channels and tiles where tiles are too few for the threads.
        together: Load the next tile during the products of one, where kernels can.
        in_place: Write a result over an input that nothing reads later.
        kept_kernels: Keep transformed kernels for later runs, where there is memory.
    """

    winograd: float = 0.9
    halving: bool = True
    splits: bool = True
    together: bool = True
    in_place: bool = True
    kept_kernels: bool = True


FASTEST = Choices()


@dataclass(frozen=True)
class Convolution:
    """The properties of a convolution that determine its tiles.

    The grid is the height and width of the input with `upsample`, else of the output.

    Where several frames are made `at_once`, by filtering over time, the inputs are the channels
    of one frame, and everything else counts for all of them.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: int
    upsample: bool
    grid: tuple[int, int]
    normed: bool
    doubles: bool = False
    winograd: bool = False
    at_once: int = 1

    @property
    def frames_read(self) -> int:
        """The frames that are read apart; if one is made at a time, their channels are inputs."""
        return self.at_once + FRAMES_OF_KERNEL - 1 if self.at_once > 1 else 1

    @property
    def row_step(self) -> int:
        """The number of grid rows and columns at whose multiples tiles begin.

        The last bits of an output depend on its position modulo this number, and on nothing
        else in the plan.
        """
        return SQUARE // 2 if self.doubles else SQUARE if self.winograd else 1

    @property
    def phases(self) -> int:
        """Kernels that each point of the grid has."""
        return 4 if self.upsample and not self.doubles else 1

    @property
    def products(self) -> int:
        """Products per input and output channel, for as many points as are made at once."""
        if self.halves:
            return HALVING_PRODUCTS
        return self.matrices

    @property
    def matrices(self) -> int:
        """Kernels, transformed where they are, of which each product takes one."""
        if self.doubles:
            return DOUBLING_PRODUCTS
        in_space = WINOGRAD_PRODUCTS if self.winograd else math.prod(self.kernel)
        return in_space * self.frames_read * self.phases

    @property
    def weights(self) -> int:
        """Elements of these kernels."""
        return self.matrices * self.inputs * self.outputs

    @property
    def halves(self) -> bool:
        """Whether it is filtered with stride 2, by `conv2d/halving.h`."""
        return self.winograd and self.stride == 2

    @property
    def values(self) -> float:
        """Transformed values of an output, for one that it has with stride 1."""
        return HALVING_PRODUCTS / WINOGRAD_PRODUCTS if self.halves else 1

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the statistics of a tile: a mean and a sum of squares for each channel."""
        return 2 * self.panels * PANEL * 4

    @property
    def rows_at_once(self) -> int:
        """The number of output rows that can only be computed together."""
        return self.row_step * (2 if self.upsample else 1)

    def read(self, tile: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of the input that a tile reads."""
        rows, columns = (-(-size // self.row_step) * self.row_step for size in tile)
        return (
            (rows - 1) * self.stride + self.kernel[0],
            (columns - 1) * self.stride + self.kernel[1],
        )

    def tiles(self, tile: tuple[int, int]) -> int:
        return math.prod(-(-size // part) for size, part in zip(self.grid, tile, strict=True))

    def costs(self, machine: Machine) -> _engine.Costs:
        """The costs of the parts of the convolution; Winograd's algorithm uses those of float32."""
        return _winograd_costs(machine).others if self.winograd else machine.kernels.costs

    def load_cost(self, tile: tuple[int, int], machine: Machine) -> float:
        """The cost of loading a tile's input, in the units of `product_cost`."""
        costs = self.costs(machine)
        elements = math.prod(self.read(tile)) * self.inputs * self.frames_read
        return elements * (costs.norm if self.normed else costs.copy)

    def product_cost(self, tile: tuple[int, int]) -> float:
        points = math.prod(-(-size // self.row_step) for size in tile)
        return points * self.products * self.inputs * self.outputs

    def cell(self, machine: Machine) -> tuple[int, int]:
        """The height and width of the parts of the grid whose statistics are summed together.

        They do not depend on the number of threads.
        """
        if self.phases_apart:
            return self.tile(self.unit, machine)
        height, width = self.grid
        scale = 2 if self.doubles else 1  # a grid of half the outputs' size has cells as small
        columns = _rounded(-(-width // -(-width // (32 // scale))), self.unit[1])
        rows, count = 8, -(-height * scale // 8) * -(-width // columns)
        if count < FEW_CELLS:
            rows = 4
        elif count > MANY_CELLS:
            rows = 16
        rows //= scale
        if self.row_step == 1:
            while (
                rows > 1 and self.tile_bytes((rows, columns), machine) > machine.kernels.tile_bytes
            ):
                rows //= 2
        return min(rows, height), min(columns, width)

    @property
    def phases_apart(self) -> bool:
        """Whether a tile is one cell, because it is computed phase by phase.

        The weights of all phases would not fit in the L2 cache beside a tile's input.
        """
        return self.phases > 1

    @property
    def unit(self) -> tuple[int, int]:
        """The height and width whose multiples tiles are where nothing is summed."""
        return (self.row_step, self.row_step) if self.row_step > 1 else (1, 16)

    def tile_bytes(self, tile: tuple[int, int], machine: Machine) -> int:
        """The bytes of a tile's input."""
        blocks = -(-self.inputs // BLOCK)
        return math.prod(self.read(tile)) * blocks * BLOCK * machine.scratch_element_bytes

    def tile(self, cell: tuple[int, int], machine: Machine) -> tuple[int, int]:
        """The height and width of the tiles with the least overhead for a few threads.

        Args:
            cell: What tiles are multiples of.
            machine: The machine; its number of threads does not matter.
        """
        if self.phases_apart and cell != self.unit:
            return min(cell[0], self.grid[0]), min(cell[1], self.grid[1])
        if self.row_step > 1:
            return self.tile_of_squares(cell, machine)
        height, width = self.grid
        enough = max(256, height * width // 8)
        best, best_cost = (1, 1), math.inf
        for wanted in (width, 512, 256, 192, 128, 96, 64, 48, 32, 16):
            if wanted > width:
                continue
            columns = min(width, _rounded(-(-width // -(-width // wanted)), cell[1]))
            row = self.tile_bytes((1, columns), machine) / self.read((1, columns))[0]
            rows = (int(machine.kernels.tile_bytes / row) - self.kernel[0]) // self.stride + 1
            rows = min(height, rows, 32, enough // columns)
            step = cell[0]
            if step == 1 and rows >= machine.kernels.rows:
                step = machine.kernels.rows
            rows = max(cell[0], rows - rows % step)
            # The same number of tiles, but with equal heights.
            even = _rounded(-(-height // -(-height // rows)), step)
            tile = min(rows, even), columns
            cost = self.tiles(tile) * self.item_cost(tile, self.panels, machine)
            if self.tile_bytes(tile, machine) > machine.kernels.tile_bytes:
                cost *= 1.5
            if cost < best_cost:
                best, best_cost = tile, cost
        return min(best[0], height), best[1]

    def tile_of_squares(self, cell: tuple[int, int], machine: Machine) -> tuple[int, int]:
        """The tile of at most `SQUARES` squares of 4x4 outputs that reads the least."""
        step = self.row_step
        down, across = (-(-size // step) for size in self.grid)
        high, wide = (-(-size // step) for size in cell)
        best, best_cost = (high, wide), math.inf
        for columns in range(min(across, SQUARES), 0, -1):
            rows = min(down, SQUARES // columns)
            if rows < down:
                rows -= rows % high
            if rows == 0 or (columns % wide and columns < across):
                continue
            tile = rows * step, columns * step
            weights = self.weights * self.costs(machine).weights
            cost = self.tiles(tile) * (self.load_cost(tile, machine) + weights)
            if cost < best_cost:
                best, best_cost = (rows, columns), cost
        rows, columns = (size * step for size in best)
        return min(rows, self.grid[0]), min(columns, self.grid[1])

    def item_cost(self, tile: tuple[int, int], panels: int, machine: Machine) -> float:
        """The cost of a number of panels of outputs of a tile, in the units of `product_cost`."""
        share = panels * PANEL / self.outputs
        # Products have fixed shapes: points beyond the tile are computed in vain.
        columns = _rounded(tile[1], 16) if machine.kernels.rows > 1 else tile[1]
        products = self.product_cost((tile[0], columns)) * share
        weights = self.weights * share * self.costs(machine).weights
        load = self.load_cost(tile, machine)
        if self.row_step > 1:
            costs = machine.kernels.doubling if self.doubles else _winograd_costs(machine)
            load += _transforms(dataclasses.replace(self, grid=tile), costs, panels)
            products *= costs.product
        return load + products + weights

    def partition(
        self, cell: tuple[int, int], batch: int, machine: Machine
    ) -> tuple[tuple[int, int], int]:
        """The height and width of tiles, and the number of parts of the output channels.

        An item of work is one part of the channels of a tile. Where the tiles with the least
        overhead are too few for the threads, or too many for whole rounds, others may be faster.

        Args:
            cell: What tiles are multiples of.
            batch: The number of images, or of parts of a video whose frames are made at once.
            machine: The machine.
        """
        groups = -(-self.panels // machine.kernels.panels)

        def time(tile: tuple[int, int], splits: int) -> float:
            rounds = -(-batch * self.tiles(tile) * splits // machine.threads)
            panels = min(self.panels, -(-groups // splits) * machine.kernels.panels)
            return rounds * self.item_cost(tile, panels, machine)

        tile = self.tile(cell, machine)
        best, least = (tile, 1), time(tile, 1) * GAIN
        tiles = batch * self.tiles(tile)
        if -(-tiles // machine.threads) * machine.threads * GAIN <= tiles:
            return best
        splits = {-(-groups // share) for share in range(1, groups + 1)}
        for parts in sorted(splits):
            if parts > 4 * machine.threads:
                break
            for rows in _parts(tile[0], cell[0]):
                for columns in _parts(tile[1], cell[1]):
                    taken = time((rows, columns), parts)
                    if taken < least:
                        best, least = ((rows, columns), parts), taken
        return best

    def together(self, tile: tuple[int, int], batch: int, splits: int, machine: Machine) -> int:
        """The number of tiles of one item, which loads each tile while it computes the previous.

        It is limited so that there are enough items for all threads to finish together.
        """
        if not machine.kernels.overlaps or self.row_step > 1:
            return 1
        items = batch * self.tiles(tile) * splits
        return max(1, min(16, items // (8 * machine.threads)))


def convolution_work(conv: Convolution, tile: tuple[int, int], machine: Machine) -> float:
    """The work of a convolution, in products at the machine's peak.

    Args:
        conv: The convolution, or some rows of one.
        tile: The height and width of its tiles.
        machine: The machine.
    """
    if conv.doubles:
        doubling = machine.kernels.doubling
        return _transforms(conv, doubling) + doubling.product * conv.product_cost(conv.grid)
    if conv.winograd:
        costs = _winograd_costs(machine)
        products = _transforms(conv, costs) + costs.product * conv.product_cost(conv.grid)
        return products / machine.kernels.costs.product
    return (conv.product_cost(tile) + conv.load_cost(tile, machine)) * conv.tiles(tile)


def kernels_work(conv: Convolution, machine: Machine) -> float:
    """The work of transforming the weights of a convolution, in products at the peak."""
    costs = _winograd_costs(machine)
    return costs.kernel * conv.weights / machine.kernels.costs.product


def _winograd_costs(machine: Machine) -> _engine.WinogradCosts:
    costs = machine.kernels.winograd
    assert costs is not None
    return costs


def _transforms(
    conv: Convolution,
    costs: _engine.WinogradCosts | _engine.DoublingCosts,
    panels: int | None = None,
) -> float:
    """The work of transforming the images, in the products of the costs.

    `panels` of the outputs are computed, or all.
    """
    inputs = -(-conv.inputs // BLOCK) * BLOCK
    outputs = (conv.panels if panels is None else panels) * PANEL
    points = 4 if conv.upsample else 1
    read, made = costs.input * inputs, costs.output * outputs * points
    transformed = conv.frames_read * read + conv.at_once * made
    return conv.values * math.prod(conv.grid) * transformed


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _parts(size: int, multiple: int) -> list[int]:
    """The sizes of even parts of a size, from all of it down to a multiple; all are multiples."""
    counts = range(1, min(MOST_PARTS, -(-size // multiple)) + 1)
    return sorted({min(size, _rounded(-(-size // n), multiple)) for n in counts}, reverse=True)


def gains_by_winograd(conv: Convolution, machine: Machine, choices: Choices = FASTEST) -> bool:
    """Whether Winograd's algorithm takes at most a share of the time of direct convolution.

    It needs enough channels to pay for transforming the images, and enough pixels to pay for
    reading the transformed weights, which are four times as many. Transforming them is not
    counted: usually they are kept. Where they are not, the smallest images lose a little by
    Winograd's algorithm, but bits must not depend on what is kept.

    Args:
        conv: Of any kernel; only 3x3 has the algorithm, with stride 1 or 2.
        machine: What runs it.
        choices: The share, and whether stride 2 counts.
    """
    costs = machine.kernels.winograd
    if costs is None:
        return False
    if conv.doubles or conv.kernel != (3, 3) or conv.stride > (2 if choices.halving else 1):
        return False
    padded = dataclasses.replace(conv, outputs=conv.panels * PANEL)
    winograd = dataclasses.replace(padded, winograd=True)
    time = (
        _transforms(winograd, costs)
        + costs.product * winograd.product_cost(conv.grid)
        + costs.fetch * winograd.weights
    )
    return time <= choices.winograd * machine.kernels.costs.product * padded.product_cost(conv.grid)


def attention_blocks(pixels: int, matrices: int, machine: Machine) -> tuple[int, int]:
    """The number of queries of an item, and of keys that it works on at once.

    The number of keys determines the order of sums, so it does not depend on the threads.

    Args:
        pixels: The number of queries, and of keys.
        matrices: The number of heads of all images.
        machine: The machine.
    """
    kernels = machine.kernels
    # Where products have several rows, points beyond the queries are computed in vain.
    whole = kernels.pixels if kernels.rows > 1 else 1
    items = matrices * -(-pixels // kernels.most_queries)
    fewest = -(-items // machine.threads)
    best, least = kernels.most_queries, math.inf
    for rounds in range(fewest, min(2 * fewest, fewest + MOST_PARTS) + 1):
        parts = min(pixels, -(-rounds * machine.threads // matrices))
        queries = min(kernels.most_queries, _rounded(-(-pixels // parts), whole))
        taken = -(-matrices * -(-pixels // queries) // machine.threads)
        cost = taken * (queries + kernels.costs.weights)
        if cost < least:
            best, least = queries, cost
    return min(best, pixels), 256
