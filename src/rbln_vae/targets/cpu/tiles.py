"""Chooses the tiles and the algorithms of convolutions and attention.

Tiles and algorithms depend on sizes and on the engine's table of kernels. They do not depend
on the memory limit, and those that affect bits do not depend on the number of threads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ... import _engine
from .packing import BLOCK, DOUBLING_PRODUCTS, PANEL

SQUARE = 4
"""The rows and columns of outputs that Winograd's algorithm computes at once, and doubling."""

SQUARES = 32
"""The most such squares in a tile of the plan.

Enough that fetching weights costs little compared with the products; few enough that the
transformed 128 channels stay in the L2 cache.
"""


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
        splits: Divide output channels where tiles are too few for the threads.
        together: Load the next tile during the products of one, where kernels can.
        in_place: Write a result over an input that nothing reads later.
        kept_kernels: Keep transformed kernels for later runs, where there is memory.
    """

    winograd: float = 0.9
    splits: bool = True
    together: bool = True
    in_place: bool = True
    kept_kernels: bool = True


FASTEST = Choices()


@dataclass(frozen=True)
class Convolution:
    """The properties of a convolution that determine its tiles.

    The grid is the height and width of the input with `upsample`, else of the output.
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
        """Products per input and output channel, for as many grid points as are made at once."""
        if self.doubles:
            return DOUBLING_PRODUCTS
        return (36 if self.winograd else math.prod(self.kernel)) * self.phases

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
        return (
            math.prod(self.read(tile)) * self.inputs * (costs.norm if self.normed else costs.copy)
        )

    def product_cost(self, tile: tuple[int, int]) -> float:
        points = math.prod(-(-size // self.row_step) for size in tile)
        return points * self.products * self.inputs * self.outputs

    def tile(self, machine: Machine) -> tuple[int, int]:
        """The height and width of tiles: those with the least overhead that fit in the cache."""
        if self.row_step > 1:
            return self.tile_of_squares(machine)
        height, width = self.grid
        pixel = -(-self.inputs // BLOCK) * BLOCK * machine.scratch_element_bytes
        # Enough tiles for a few threads. Their number must not matter here; splits make more.
        enough = max(256, height * width // 8)
        best, best_cost = (1, 1), math.inf
        for wanted in (width, 512, 256, 192, 128, 96, 64, 48, 32, 16):
            if wanted > width:
                continue
            columns = -(-width // -(-width // wanted))
            columns = min(width, -(-columns // 16) * 16)
            across = self.read((1, columns))[1] * pixel
            rows = machine.kernels.tile_bytes // across
            rows = (rows - self.kernel[0]) // self.stride + 1
            rows = max(1, min(height, rows, 32, max(1, enough // columns)))
            if rows > machine.kernels.rows:
                rows -= rows % machine.kernels.rows
            # The same number of tiles, but with equal heights.
            down = -(-height // rows)
            even = -(-height // down)
            even = min(rows, -(-even // machine.kernels.rows) * machine.kernels.rows)
            tile = (even, columns)
            # Products have fixed shapes: points beyond the tile are computed in vain.
            padded = (
                -(-even // machine.kernels.rows) * machine.kernels.rows * -(-columns // 16) * 16
                if machine.kernels.rows > 1
                else even * columns
            )
            filled = self.product_cost(tile) * padded / (even * columns)
            weights = self.product_cost((1, 1)) * self.costs(machine).weights
            cost = (filled + self.load_cost(tile, machine) + weights) * self.tiles(tile)
            if self.read(tile)[0] * across > machine.kernels.tile_bytes:
                cost *= 1.5
            if cost < best_cost:
                best, best_cost = tile, cost
        return best

    def tile_of_squares(self, machine: Machine) -> tuple[int, int]:
        """The tile of at most `SQUARES` squares of 4x4 outputs that reads the least."""
        down, across = (-(-size // self.row_step) for size in self.grid)
        best, best_cost = (1, 1), math.inf
        for columns in range(min(across, SQUARES), 0, -1):
            rows = min(down, SQUARES // columns)
            tile = rows * self.row_step, columns * self.row_step
            weights = self.product_cost((1, 1)) * self.costs(machine).weights
            cost = self.tiles(tile) * (self.load_cost(tile, machine) + weights)
            if cost < best_cost:
                best, best_cost = tile, cost
        return min(best[0], self.grid[0]), min(best[1], self.grid[1])

    def splits(self, tile: tuple[int, int], batch: int, machine: Machine) -> int:
        """The number of parts to divide the output channels into, so that all threads work."""
        groups = -(-self.outputs // (PANEL * machine.kernels.panels))
        tiles = batch * self.tiles(tile)
        best, best_cost = 1, math.inf
        for splits in range(1, min(groups, 4 * machine.threads) + 1):
            rounds = -(-tiles * splits // machine.threads)
            part = self.product_cost(tile) * -(-groups // splits) / groups
            cost = rounds * (self.load_cost(tile, machine) + part)
            if cost < best_cost * 0.97:
                best, best_cost = splits, cost
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
    return costs.kernel * conv.product_cost((1, 1)) / machine.kernels.costs.product


def _winograd_costs(machine: Machine) -> _engine.WinogradCosts:
    costs = machine.kernels.winograd
    assert costs is not None
    return costs


def _transforms(conv: Convolution, costs: _engine.WinogradCosts | _engine.DoublingCosts) -> float:
    """The work of transforming the images, in the products of the costs."""
    inputs, outputs = -(-conv.inputs // BLOCK) * BLOCK, conv.panels * PANEL
    points = 4 if conv.upsample else 1
    return math.prod(conv.grid) * (costs.input * inputs + costs.output * outputs * points)


def gains_by_winograd(conv: Convolution, machine: Machine, most: float = FASTEST.winograd) -> bool:
    """Whether Winograd's algorithm takes at most a share of the time of direct convolution.

    It needs enough channels to pay for transforming the images, and enough pixels to pay for
    reading the transformed weights, which are four times as many. Transforming them is not
    counted: usually they are kept. Where they are not, the smallest images lose a little by
    Winograd's algorithm, but bits must not depend on what is kept.

    Args:
        conv: Of any kernel; only 3x3 has the algorithm.
        machine: What runs it.
        most: The share.
    """
    costs = machine.kernels.winograd
    if costs is None:
        return False
    if conv.doubles or (conv.kernel, conv.stride) != ((3, 3), 1):
        return False
    padded = dataclasses.replace(conv, outputs=conv.panels * PANEL)
    winograd = dataclasses.replace(padded, winograd=True)
    time = (
        _transforms(winograd, costs)
        + costs.product * winograd.product_cost(conv.grid)
        + costs.fetch * winograd.product_cost((1, 1))
    )
    return time <= most * machine.kernels.costs.product * padded.product_cost(conv.grid)


def attention_blocks(pixels: int, matrices: int, machine: Machine) -> tuple[int, int]:
    """The number of queries of an item, and of keys that it works on at once.

    The number of keys determines the order of sums, so it does not depend on the threads.
    """
    together = machine.kernels.rows * machine.kernels.pixels
    queries = max(together, machine.kernels.most_queries // together * together)
    # Make items smaller if there are too few of them.
    while queries > together and matrices * -(-pixels // queries) < 3 * machine.threads:
        queries -= together
    return min(queries, pixels), 256
