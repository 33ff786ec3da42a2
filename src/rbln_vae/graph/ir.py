"""The intermediate representation: graphs, and the definition of each operation.

A `Graph` is a list of operations over named values, each assigned once. It has channels,
weights and attributes, but no batch and no spatial size: shapes are inferred from an input
when a run is planned, so one graph serves every resolution. All values are images
`(N, C, H, W)`; the frames of a video are values of their own, or a stack: one after the other in
the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

Value: TypeAlias = str
"""The name of a tensor that an operation produces; each name is assigned once."""

Shape: TypeAlias = tuple[int, ...]
"""`(N, C, H, W)`."""
Shapes: TypeAlias = Mapping[Value, Shape]
Weights: TypeAlias = Mapping[str, torch.Tensor]

ACTIVATIONS = ("silu", "gelu", "mish", "relu", "tanh")
"""The activation functions of diffusers' autoencoders."""

PROBE_SHAPE = (3, 4096, 5120)
"""Batch, height and width of the input on which `Graph.verify` infers shapes."""

KNOWN_SHAPES = 64
"""How many inputs a graph keeps the shapes of its values for."""

_VALUE = {"role": "value"}
_WEIGHT = {"role": "weight"}


class GraphError(ValueError):
    """A graph that breaks a rule of the representation."""


def require(condition: bool, message: str) -> None:
    """Raise a `GraphError` with a message unless a condition holds."""
    if not condition:
        raise GraphError(message)


def _require_weight(weights: Weights, name: str, shape: Shape) -> None:
    require(name in weights, f"weight {name!r} is missing")
    found = tuple(weights[name].shape)
    require(found == shape, f"weight {name!r} has shape {found}, its operation needs {shape}")


def _require_activation(function: str) -> None:
    require(function in ACTIVATIONS, f"unknown activation {function!r}")


@dataclass(frozen=True)
class Norm:
    """Group normalisation with its affine weights.

    Mean and variance are taken over a group of channels of a whole image, or `over_clip` of all
    images of the batch, which are the frames of a clip.
    """

    groups: int
    eps: float
    weight: str = field(metadata=_WEIGHT)
    bias: str = field(metadata=_WEIGHT)
    over_clip: bool = False

    def check(self, channels: int, weights: Weights) -> None:
        require(
            self.groups > 0 and channels % self.groups == 0,
            f"{channels} channels don't make {self.groups} groups",
        )
        require(0 <= self.eps < math.inf, f"a norm with eps {self.eps}")
        _require_weight(weights, self.weight, (channels,))
        _require_weight(weights, self.bias, (channels,))

    def __str__(self) -> str:
        return f"{self.groups} groups" + (" over the clip" if self.over_clip else "")


@dataclass(frozen=True)
class RMSNorm:
    """Normalisation of each pixel by the root mean square of its channels, with weights.

    It needs no statistics of the image: `x / sqrt(mean(x²) + eps) * weight`, as
    `torch.nn.functional.rms_norm` over the channels.
    """

    eps: float
    weight: str = field(metadata=_WEIGHT)

    def check(self, channels: int, weights: Weights) -> None:
        require(0 < self.eps < math.inf, f"an RMS norm with eps {self.eps}")
        _require_weight(weights, self.weight, (channels,))

    def __str__(self) -> str:
        return "of each pixel"


@dataclass(frozen=True)
class Operation:
    """The base of all operations: one output value, its input values, and its weights."""

    output: Value

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        """The shape of the output; raises `GraphError` if inputs or weights do not fit."""
        raise NotImplementedError

    def flops(self, shapes: Shapes, weights: Weights) -> int:
        """Floating-point operations of one run; a product and its sum count as two.

        Only matrix products count, because everything else is bound by memory.
        """
        return 0

    @property
    def kind(self) -> str:
        """The name of the operation in files and in print."""
        return type(self).__name__

    @functools.cached_property
    def inputs(self) -> tuple[Value, ...]:
        """The values that the operation reads, in the order of its fields."""
        return tuple(_names(self, "value"))

    @functools.cached_property
    def weights(self) -> tuple[str, ...]:
        """The names of the operation's weights, in the order of its fields."""
        return tuple(_names(self, "weight"))

    @property
    def group_norm(self) -> Norm | None:
        """The norm of the input that needs statistics of the image, if there is one."""
        norm = getattr(self, "norm", None)
        return norm if isinstance(norm, Norm) else None

    def __str__(self) -> str:
        return f"%{self.output} = {self.kind}({', '.join('%' + i for i in self.inputs)})"


def _names(node: Any, role: str) -> Iterator[str]:
    for f in dataclasses.fields(node):
        item = getattr(node, f.name)
        if isinstance(item, (Norm, RMSNorm)):
            yield from _names(item, role)
        elif f.metadata.get("role") == role and item is not None:
            yield from (item,) if isinstance(item, str) else item


@dataclass(frozen=True)
class Conv2d(Operation):
    """A convolution with zero padding, and the operations that passes fuse into it.

    `norm` and then `activation` are applied to the input; the result is padded with zeros
    and convolved; then `residual` is added, and `output_activation` applied.

    With `upsample` each pixel makes 2x2 pixels of the output. With a kernel `(out, in, 3, 3)` that
    is a convolution of the image doubled by nearest neighbours. With kernels `(row phase, column
    phase, out, in, 3, 3)` it is one before a pixel shuffle: each phase has a kernel, centred on
    the pixel, and a bias `(row phase, column phase, out)` of its own.

    A convolution over frames has the frames before its input as `earlier`, the oldest first. They
    have the shape of the input, `norm` and `activation` are applied to each, and the kernel has
    the channels of all of them, frame by frame. Frames before these that are zeros are
    `left_out`: the kernel has their channels, and nothing is multiplied with them. The input may
    have several frames one after the other, as `Stack` makes them; so has the output then, and
    each of its frames is that of one frame of the input and of as many before it.

    One `over_clip` takes the images of the batch for the frames of a clip. The kernel has the
    channels of three of them: of the frame before, of the frame itself, and of the one after.
    Where there is none, zeros are convolved.
    """

    input: Value = field(metadata=_VALUE)
    weight: str = field(metadata=_WEIGHT)
    bias: str | None = field(metadata=_WEIGHT)
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros above, below, left and right."""
    upsample: bool = False
    norm: Norm | RMSNorm | None = None
    activation: str | None = None
    """One of `ACTIVATIONS`."""
    residual: Value | None = field(default=None, metadata=_VALUE)
    output_activation: str | None = None
    """One of `ACTIVATIONS`."""
    earlier: tuple[Value, ...] = field(default=(), metadata=_VALUE)
    left_out: int = 0
    over_clip: bool = False

    @property
    def frames(self) -> int:
        """The frames whose channels the kernel has."""
        return self.left_out + len(self.earlier) + (3 if self.over_clip else 1)

    def kernel(self, weights: Weights) -> Shape:
        """The shape `(out, in, height, width)` of one kernel, with the channels of all frames."""
        require(self.weight in weights, f"weight {self.weight!r} is missing")
        shape = tuple(weights[self.weight].shape)
        require(0 not in shape, f"weight {self.weight!r} has shape {shape}, which is empty")
        if not self.upsample:
            require(len(shape) == 4, f"weight {self.weight!r} has shape {shape}, not four axes")
            return shape
        require(
            len(shape) in (4, 6) and shape[:-4] in ((), (2, 2)) and shape[-2:] == (3, 3),
            f"weight {self.weight!r} has shape {shape}, not one kernel of 3x3 or 2x2 of them",
        )
        return shape[-4:]

    def doubles(self, weights: Weights) -> bool:
        """Whether the image is doubled by nearest neighbours, and then convolved."""
        return self.upsample and len(weights[self.weight].shape) == 4

    def has_phases(self, weights: Weights) -> bool:
        """Whether each pixel of a 2x2 cell of the output has a kernel and a bias of its own."""
        return self.upsample and not self.doubles(weights)

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        batch, channels, height, width = shapes[self.input]
        out, into, rows, columns = self.kernel(weights)
        of_frames = "" if self.frames == 1 else f" of {self.frames} frames"
        require(
            self.left_out >= 0 and into == channels * self.frames,
            f"{channels} channels{of_frames} meet a kernel for {into}",
        )
        for value in self.earlier:
            found = shapes[value]
            require(
                found[1:] == shapes[self.input][1:]
                and found == shapes[self.earlier[0]]
                and batch % found[0] == 0
                and (batch == found[0] or not self.left_out),
                f"frames {found} and {shapes[self.input]}",
            )
        require(
            not self.earlier or not self.group_norm,
            "a group norm has the statistics of one frame, and meets several",
        )
        require(
            not self.over_clip or not (self.earlier or self.left_out or self.upsample),
            "a convolution over a clip reads frames of other inputs, or doubles the image",
        )
        if self.bias is not None:
            phases = (2, 2) if self.has_phases(weights) else ()
            _require_weight(weights, self.bias, (*phases, out))
        if self.norm is not None:
            self.norm.check(channels, weights)
        for function in (self.activation, self.output_activation):
            if function is not None:
                _require_activation(function)
        require(self.stride >= 1, f"stride {self.stride}")
        require(len(self.padding) == 4 and min(self.padding) >= 0, f"padding {self.padding}")
        result: Shape
        if self.upsample:
            require(
                self.stride == 1 and self.padding == (1, 1, 1, 1),
                "a convolution with upsampling needs stride 1 and padding 1",
            )
            result = (batch, out, 2 * height, 2 * width)
        else:
            above, below, left, right = self.padding
            tall = (height + above + below - rows) // self.stride + 1
            wide = (width + left + right - columns) // self.stride + 1
            require(
                tall > 0 and wide > 0,
                f"{height}x{width} is too small for a {rows}x{columns} kernel",
            )
            result = (batch, out, tall, wide)
        if self.residual is not None:
            found = shapes[self.residual]
            require(found == result, f"residual {self.residual!r} is {found}, not {result}")
        return result

    def flops(self, shapes: Shapes, weights: Weights) -> int:
        _, into, rows, columns = self.kernel(weights)
        # A kernel of 3x3 meets only 2x2 different pixels of an image that is doubled.
        taps = 4 if self.doubles(weights) else rows * columns
        into = into // self.frames * (self.frames - self.left_out)
        return 2 * math.prod(shapes[self.output]) * into * taps

    def __str__(self) -> str:
        text = super().__str__() + f" {self.weight}"
        if self.stride != 1:
            text += f", stride {self.stride}"
        if any(self.padding):
            text += f", padding {self.padding}"
        if self.upsample:
            text += ", upsample"
        if self.over_clip:
            text += ", over the clip"
        if self.norm is not None:
            text += f", norm {self.norm}"
        text += f", {self.activation}" if self.activation else ""
        return text + (f", then {self.output_activation}" if self.output_activation else "")


@dataclass(frozen=True)
class GroupNorm(Operation):
    """Group normalisation of an image."""

    input: Value = field(metadata=_VALUE)
    norm: Norm

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        shape = shapes[self.input]
        self.norm.check(shape[1], weights)
        return shape

    def __str__(self) -> str:
        return f"{super().__str__()} {self.norm}"


@dataclass(frozen=True)
class PixelNorm(Operation):
    """RMS normalisation of the pixels of an image."""

    input: Value = field(metadata=_VALUE)
    norm: RMSNorm

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        shape = shapes[self.input]
        self.norm.check(shape[1], weights)
        return shape


@dataclass(frozen=True)
class Activation(Operation):
    """An elementwise activation function, one of `ACTIVATIONS`."""

    input: Value = field(metadata=_VALUE)
    function: str

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        _require_activation(self.function)
        return shapes[self.input]

    def __str__(self) -> str:
        return f"{super().__str__()} {self.function}"


@dataclass(frozen=True)
class Add(Operation):
    """The sum of two values of the same shape."""

    left: Value = field(metadata=_VALUE)
    right: Value = field(metadata=_VALUE)

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        left, right = shapes[self.left], shapes[self.right]
        require(left == right, f"{left} and {right} can't be added")
        return left


@dataclass(frozen=True)
class Scale(Operation):
    """Multiplication by a constant, and then addition of another."""

    input: Value = field(metadata=_VALUE)
    factor: float
    offset: float = 0.0

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        for number in (self.factor, self.offset):
            require(math.isfinite(number), f"a factor or offset {number}")
        return shapes[self.input]

    def __str__(self) -> str:
        offset = f", plus {self.offset}" if self.offset else ""
        return f"{super().__str__()} by {self.factor}{offset}"


@dataclass(frozen=True)
class Modulate(Operation):
    """The product with one image plus another: `norm(input) * scale + shift`.

    `scale` and `shift` have the size of the input or are smaller by one whole factor, and are
    then enlarged by nearest neighbour. Without `norm`, the input is taken as it is.
    """

    input: Value = field(metadata=_VALUE)
    scale: Value = field(metadata=_VALUE)
    shift: Value | None = field(default=None, metadata=_VALUE)
    norm: Norm | None = None

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        shape, scale = shapes[self.input], shapes[self.scale]
        factor = shape[2] // scale[2]
        require(
            shape == (*scale[:2], scale[2] * factor, scale[3] * factor),
            f"{shape} can't be multiplied by {scale}, which is smaller by no whole factor",
        )
        if self.shift is not None:
            shift = shapes[self.shift]
            require(shift == scale, f"scale {scale} and shift {shift} differ")
        if self.norm is not None:
            self.norm.check(shape[1], weights)
        return shape

    def __str__(self) -> str:
        return super().__str__() + (f" norm {self.norm}" if self.norm is not None else "")


@dataclass(frozen=True)
class Identity(Operation):
    """A copy of a value."""

    input: Value = field(metadata=_VALUE)

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        return shapes[self.input]


@dataclass(frozen=True)
class Upsample(Operation):
    """Nearest-neighbour doubling of height and width."""

    input: Value = field(metadata=_VALUE)

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        batch, channels, height, width = shapes[self.input]
        return (batch, channels, 2 * height, 2 * width)


@dataclass(frozen=True)
class Shuffle(Operation):
    """Moves channels: to other channels, or between channels and the 2x2 pixels of a cell.

    Attributes:
        way: `"channels"` keeps the size of the image; `"up"` doubles height and width, and
            `"down"` halves them.
        order: For each element of an output pixel, or for `"up"` of a 2x2 cell of the output,
            where it comes from. The elements of a cell have the order of
            `torch.nn.functional.pixel_unshuffle`: channel, row, column. Elements may be taken
            several times, or never.
    """

    input: Value = field(metadata=_VALUE)
    way: str
    order: tuple[int, ...]

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        batch, channels, height, width = shapes[self.input]
        require(self.way in ("channels", "up", "down"), f"a shuffle {self.way!r}")
        if self.way == "down":
            require(
                height % 2 == width % 2 == 0, f"{height}x{width} pixels don't make cells of 2x2"
            )
            channels, height, width = 4 * channels, height // 2, width // 2
        require(
            bool(self.order) and min(self.order) >= 0 and max(self.order) < channels,
            f"a shuffle takes channels that are not among {channels}",
        )
        if self.way != "up":
            return (batch, len(self.order), height, width)
        require(len(self.order) % 4 == 0, f"{len(self.order)} channels don't make cells of 2x2")
        return (batch, len(self.order) // 4, 2 * height, 2 * width)

    def __str__(self) -> str:
        return f"{super().__str__()} {self.way}"


@dataclass(frozen=True)
class Pad(Operation):
    """Padding of an image with zeros: above, below, left and right."""

    input: Value = field(metadata=_VALUE)
    padding: tuple[int, int, int, int]

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        batch, channels, height, width = shapes[self.input]
        require(len(self.padding) == 4 and min(self.padding) >= 0, f"padding {self.padding}")
        above, below, left, right = self.padding
        return (batch, channels, height + above + below, width + left + right)

    def __str__(self) -> str:
        return f"{super().__str__()} {self.padding}"


@dataclass(frozen=True)
class Attention(Operation):
    """Attention between all pixels of an image.

    `query`, `key` and `value` are images, whose channels are split into `heads`. `residual`
    is added to the result.
    """

    query: Value = field(metadata=_VALUE)
    key: Value = field(metadata=_VALUE)
    value: Value = field(metadata=_VALUE)
    heads: int
    scale: float
    residual: Value | None = field(default=None, metadata=_VALUE)

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        query, key, value = (shapes[v] for v in (self.query, self.key, self.value))
        require(math.isfinite(self.scale), f"attention with scale {self.scale}")
        require(query == key, f"query {query} and key {key} differ")
        require(query[0] == value[0] and query[2:] == value[2:], f"{query} meets value {value}")
        require(
            self.heads > 0 and query[1] % self.heads == value[1] % self.heads == 0,
            f"{query[1]} and {value[1]} channels don't make {self.heads} heads",
        )
        if self.residual is not None:
            found = shapes[self.residual]
            require(found == value, f"residual {self.residual!r} is {found}, not {value}")
        return value

    def flops(self, shapes: Shapes, weights: Weights) -> int:
        batch, channels, height, width = shapes[self.query]
        return 2 * batch * (height * width) ** 2 * (channels + shapes[self.value][1])


@dataclass(frozen=True)
class Stack(Operation):
    """Frames one after the other, as a batch of so many times the images."""

    frames: tuple[Value, ...] = field(metadata=_VALUE)

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        require(len(self.frames) > 1, f"a stack of {len(self.frames)} frames")
        found = {shapes[frame] for frame in self.frames}
        require(len(found) == 1, f"a stack of frames of the shapes {sorted(found)}")
        batch, *image = found.pop()
        return (batch * len(self.frames), *image)


@dataclass(frozen=True)
class Unstack(Operation):
    """One of the frames of a stack: that of an `index` among as many as `count`."""

    input: Value = field(metadata=_VALUE)
    index: int
    count: int

    def infer(self, shapes: Shapes, weights: Weights) -> Shape:
        batch, *image = shapes[self.input]
        require(
            0 <= self.index < self.count and batch % self.count == 0,
            f"frame {self.index} of {self.count} in a batch of {batch} images",
        )
        return (batch // self.count, *image)

    def __str__(self) -> str:
        return f"{super().__str__()} {self.index} of {self.count}"


OPERATIONS: Mapping[str, type[Operation]] = types.MappingProxyType(
    {kind.__name__: kind for kind in Operation.__subclasses__()}
)
"""Every operation, by its `kind`."""


@dataclass(frozen=True)
class Slot:
    """An image that a run leaves for the next run of a video.

    Attributes:
        name: Its name.
        read: The value as which a run reads it; `None` in the graph of the first run.
        left: The value that a run leaves in it, read or produced by the run.
        zeros: Whether zeros are left instead, in the shape of that value.
    """

    name: str
    read: Value | None
    left: Value
    zeros: bool = False


@dataclass(frozen=True)
class Graph:
    """A part of a model, which maps images to images: mostly one to one.

    A part that runs videos has two graphs. The first maps the first frame, or latent frame; the
    other maps those that follow, as many as belong together, and runs any number of times. State
    connects the runs: what each leaves in its slots, the next one reads.

    Attributes:
        name: The name of the part: `"encoder"` or `"decoder"`.
        inputs: The names of the input values, which all have the same shape.
        input_channels: The number of channels of an input.
        outputs: The names of the values that are the results, in order.
        operations: The operations, ordered so that every value is produced before it is read.
        weights: The weights of the operations by name, in float32.
        state: What a run reads of the run before, and leaves for the next.
        first: The graph of the first run of a video, if this is that of the others.
    """

    name: str
    inputs: tuple[Value, ...]
    input_channels: int
    outputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    weights: Mapping[str, torch.Tensor]
    state: tuple[Slot, ...] = ()
    first: Graph | None = None

    @property
    def start(self) -> Graph:
        """The graph of the first run; of a part without state, the graph itself."""
        return self if self.first is None else self.first

    @property
    def input(self) -> Value:
        """The only input."""
        (value,) = self.inputs
        return value

    @property
    def output(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value

    @property
    def given(self) -> tuple[Value, ...]:
        """The values that are there before the first operation: inputs, and the state."""
        return (*self.inputs, *(slot.read for slot in self.state if slot.read is not None))

    @property
    def results(self) -> frozenset[Value]:
        """The values that are needed after the last operation: outputs, and the state."""
        return frozenset((*self.outputs, *(s.left for s in self.state if not s.zeros)))

    @property
    def carried(self) -> frozenset[Value]:
        """The values of the state: read of it, left in it, or read as earlier frames."""
        earlier = (v for o in self.operations if isinstance(o, Conv2d) for v in o.earlier)
        slots = (v for s in self.state for v in (s.read, s.left) if v is not None)
        return frozenset((*slots, *earlier))

    @functools.cached_property
    def runs_clips(self) -> bool:
        """Whether the images of a batch are the frames of a clip, and can't run apart."""
        norms = (getattr(operation, "norm", None) for operation in self.operations)
        return any(getattr(each, "over_clip", False) for each in (*self.operations, *norms))

    def least_shape(self, shape: Shape) -> Shape:
        """The shape of the smallest run that a batch can be divided into."""
        return shape if self.runs_clips else (1, *shape[1:])

    def stateless(self) -> Graph:
        """The graph of a first run whose state nobody reads: that of an image."""
        return dataclasses.replace(self, state=()).pruned()

    def infer_shapes(self, input_shape: Iterable[int]) -> Shapes:
        """The shape of every value for one input.

        Args:
            input_shape: `(N, input_channels, H, W)`.

        Raises:
            GraphError: An operation does not fit its inputs; the message names it.
        """
        shape = tuple(input_shape)
        known = self._inferred.get(shape)
        if known is None:
            known = self._infer_shapes(shape)
            if len(self._inferred) >= KNOWN_SHAPES:
                self._inferred.clear()
            self._inferred[shape] = known
        return known

    @functools.cached_property
    def _inferred(self) -> dict[Shape, Shapes]:
        """What is known of some inputs: every run asks for the shape of its result."""
        return {}

    def _infer_shapes(self, shape: Shape) -> Shapes:
        require(
            len(shape) == 4 and shape[1] == self.input_channels and min(shape) > 0,
            f"the input has shape {shape}, expected (N, {self.input_channels}, H, W)",
        )
        shapes: dict[Value, Shape] = dict.fromkeys(self.inputs, shape)
        if self.first is not None:
            before = self.first.infer_shapes(shape)
            left = {slot.name: before[slot.left] for slot in self.first.state}
            shapes |= {s.read: left[s.name] for s in self.state if s.read is not None}
        for operation in self.operations:
            try:
                shapes[operation.output] = operation.infer(shapes, self.weights)
            except GraphError as error:
                raise GraphError(f"{operation.kind} {operation.output!r}: {error}") from None
        for slot in self.state if self.first is not None else ():
            require(
                slot.read is not None and shapes[slot.left] == shapes[slot.read],
                f"the state {slot.name!r} changes its shape",
            )
        return shapes

    def flops(self, input_shape: Iterable[int]) -> int:
        """Floating-point operations of one run on an input of this shape."""
        shapes = self.infer_shapes(input_shape)
        return sum(operation.flops(shapes, self.weights) for operation in self.operations)

    def probe_shapes(self) -> Shapes:
        """The shape of every value for an input whose batch, height and width all differ."""
        batch, height, width = PROBE_SHAPE
        return self.infer_shapes((batch, self.input_channels, height, width))

    @property
    def output_channels(self) -> int:
        """The number of channels of a result."""
        return self.probe_shapes()[self.outputs[0]][1]

    def producers(self) -> dict[Value, Operation]:
        """The operation that produces each value; those that are given have none."""
        return {operation.output: operation for operation in self.operations}

    def consumers(self) -> dict[Value, list[Operation]]:
        """The operations that read each value, in order."""
        readers: dict[Value, list[Operation]] = {value: [] for value in self.given}
        for operation in self.operations:
            readers[operation.output] = []
            for value in dict.fromkeys(operation.inputs):
                readers[value].append(operation)
        return readers

    def last_uses(self) -> dict[Value, int]:
        """The index of the last operation that reads each value.

        For results it is the number of operations.
        """
        last = {value: i for i, o in enumerate(self.operations) for value in o.inputs}
        return last | dict.fromkeys(self.results, len(self.operations))

    def pruned(self) -> Graph:
        """The graph without the operations and weights that its results do not need."""
        needed = {*self.outputs, *(slot.left for slot in self.state)}
        kept: list[Operation] = []
        for operation in reversed(self.operations):
            if operation.output in needed:
                needed.update(operation.inputs)
                kept.append(operation)
        used = {name for operation in kept for name in operation.weights}
        return dataclasses.replace(
            self,
            operations=tuple(reversed(kept)),
            weights={name: weight for name, weight in self.weights.items() if name in used},
        )

    def verify(self) -> Graph:
        """Check every rule of the representation.

        Returns:
            The graph itself, so that a pass can end with this call.

        Raises:
            GraphError: A value is assigned twice, read before it is produced, or never read;
                a weight is missing, unused or of the wrong shape; shapes do not fit; or the
                state is not that of the graph of the first run.
        """
        require(self.input_channels > 0, f"an input of {self.input_channels} channels")
        self._verify_state()
        made = {*self.given}
        read = {*self.outputs, *(slot.left for slot in self.state)}
        for operation in self.operations:
            for value in operation.inputs:
                require(value in made, f"{operation.kind} reads {value!r} before it is made")
            require(operation.output not in made, f"{operation.output!r} is made twice")
            made.add(operation.output)
            read.update(operation.inputs)
        for value in (*self.outputs, *(slot.left for slot in self.state)):
            require(value in made, f"the output {value!r} is never made")
        require(made - read <= {*self.given}, f"made for nothing: {sorted(made - read)}")
        used = {name for operation in self.operations for name in operation.weights}
        unused = sorted(self.weights.keys() - used)
        require(not unused, f"weights that no operation uses: {unused}")
        shapes = self.probe_shapes()
        for value in (*self.outputs, *(slot.left for slot in self.state)):
            found = shapes[value][0]
            require(
                found == PROBE_SHAPE[0],
                f"{value!r} has a batch of {found} images, the input one of {PROBE_SHAPE[0]}: what "
                "a run gives or leaves isn't a stack",
            )
        return self

    def _verify_state(self) -> None:
        for kind, names in (
            ("inputs", self.given),
            ("outputs", self.outputs),
            ("slots", [slot.name for slot in self.state]),
        ):
            require(len({*names}) == len(names), f"{kind} of the same name: {names}")
        require(bool(self.inputs and self.outputs), "no inputs or no outputs")
        if self.first is None:
            read = [slot.name for slot in self.state if slot.read is not None]
            require(not read, f"a first run reads the state {read}")
            return
        require(self.first.first is None, "the graph of a first run has another one")
        require(
            (self.name, self.input_channels) == (self.first.name, self.first.input_channels)
            and len(self.first.inputs) == len(self.first.outputs) == 1,
            "the graph of the first run maps an image to an image of the same part",
        )
        names = [slot.name for slot in self.state]
        before = [slot.name for slot in self.first.state]
        require(bool(names) and names == before, f"the state {names} follows {before}")
        unread = [slot.name for slot in self.state if slot.read is None or slot.zeros]
        require(not unread, f"state that is not read, or left as zeros: {unread}")
        self.first.verify()
        for name in self.weights.keys() & self.first.weights.keys():
            require(
                self.weights[name].shape == self.first.weights[name].shape,
                f"both runs have a weight {name!r}, of different shapes",
            )

    @property
    def all_weights(self) -> Mapping[str, torch.Tensor]:
        """The weights of this graph and of that of the first run."""
        return {**self.start.weights, **self.weights}

    @property
    def all_operations(self) -> tuple[Operation, ...]:
        """The operations of both graphs of a part."""
        return self.operations if self.first is None else self.first.operations + self.operations

    def __str__(self) -> str:
        given = ", ".join(f"%{value}" for value in self.given)
        lines = [f"graph {self.name}({given}: {self.input_channels} channels)"]
        lines += [f"  {operation}" for operation in self.operations]
        lines += [
            f"  leave {slot.name} = {'zeros like ' if slot.zeros else ''}%{slot.left}"
            for slot in self.state
        ]
        lines.append(f"  return {', '.join(f'%{value}' for value in self.outputs)}")
        return "\n".join(([] if self.first is None else [str(self.first), ""]) + lines)
