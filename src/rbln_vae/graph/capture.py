"""Captures a torch module as a Graph, with `torch.export`.

The module is exported once, for an example input. Every value of a graph is an image, so capture
tracks how views and transposes rearrange the pixels of each image, for example into a row with
the channels last. It applies every operation on rearranged pixels to the image itself: a linear
layer over channels becomes a 1x1 convolution, and attention over pixels becomes one operation.
So all sizes disappear, and the graph serves images of every size.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RBLNCompileError
from .ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GraphError,
    GroupNorm,
    Modulate,
    Norm,
    Operation,
    Pad,
    PixelNorm,
    RMSNorm,
    Scale,
    Shuffle,
    Upsample,
    Value,
)

# Multiples of two primes, so that height, width and channels differ; multiples of 64, so that up
# to six downsamplings leave no remainder. They are not larger because torch computes the bytes of
# attention's matrix, pixels times pixels, in 63 bits.
EXAMPLE_HEIGHT, EXAMPLE_WIDTH = 64 * 241, 64 * 251
EXAMPLE_BATCH = 2  # not 1, for which a model that mixes images would look like any other


_EXPORTING = threading.Lock()
"""Held during an export: `torch.export` patches `torch.nn.Module` and uses global state."""


def capture(module: torch.nn.Module, name: str, input_channels: int) -> Graph:
    """Capture a module as a graph.

    Several threads may call this at the same time; they take turns.

    Args:
        module: Maps an image `(N, input_channels, H, W)` to an image. It is never modified,
            so other threads may run it meanwhile. Its weights are copied.
        name: The name of the graph.
        input_channels: The number of channels of the input.

    Returns:
        The unoptimised graph, with float32 weights; `passes.optimise` makes it fast.

    Raises:
        RBLNCompileError: The module can't be exported, or has an operation that the
            representation lacks; the message names the operation and its submodule.

    Example:
        >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        >>> print(capture(conv, "conv", 3))
        graph conv(%x: 3 channels)
          %conv2d = Conv2d(%x) weight, padding (1, 1, 1, 1)
          return %conv2d
    """
    parameter = next(module.parameters(), torch.empty(0))
    # One element, expanded to a whole image: export reads only its shape.
    example = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(
        EXAMPLE_BATCH, input_channels, EXAMPLE_HEIGHT, EXAMPLE_WIDTH
    )
    return _Capture(export(module, (example,)), name, input_channels).graph()


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module and its submodules, but share the weights.

    Args:
        module: The module to copy. It is not changed.

    Returns:
        A module with the same classes, hooks, attributes and weight tensors.

    Raises:
        RBLNCompileError: A hook or an attribute can't be copied.
    """
    weights = itertools.chain(module.parameters(), module.buffers())
    try:
        return copy.deepcopy(module, {id(weight): weight for weight in weights})
    except Exception as error:  # copying runs the attributes' own code
        raise RBLNCompileError(
            f"{type(module).__name__} can't be copied: {error}. Remove the hooks and attributes "
            "that hold what can't be copied, such as locks and open files."
        ) from error


def export(
    module: torch.nn.Module, examples: tuple[torch.Tensor, ...]
) -> torch.export.ExportedProgram:
    """Export a copy of a module that shares its weights.

    Several threads may call this at the same time; they take turns.

    Args:
        module: The module. It is never modified.
        examples: Its inputs, of which only shapes, dtypes and devices are read.

    Raises:
        RBLNCompileError: The module can't be exported.
    """
    copied = replica(module)
    try:
        with _EXPORTING, torch.no_grad():
            return torch.export.export(copied, examples, strict=False)
    except Exception as error:
        # Export runs the model's own Python code, which can raise anything.
        raise RBLNCompileError(
            f"{type(module).__name__} can't be exported as one graph: {error}. A model must run "
            "the same operations for every input to be compiled."
        ) from error


_IMAGE = ("n", "c", "h", "w")
_FRAMES = ("one", "n", "c", "h", "w")
_CLIP = ("one", "c", "n", "h", "w")
_CHANNELS_FIRST = ("n", "c", "hw")
_CHANNELS_LAST = ("n", "hw", "c")
_SPLIT = ("n", "hw", "heads", "d")
_BY_HEAD = ("n", "heads", "hw", "d")


@dataclass(frozen=True)
class _Arranged:
    """A tensor of the module: an image of the graph, with its elements on other axes.

    Attributes:
        image: The value of the image in the graph.
        channels: The number of channels of the image.
        size: The height and width of the image in the example.
        axes: The meaning of each axis of the tensor, by default those of an image.
        heads: The number of heads that the channels are split into, by default 1.
    """

    image: Value
    channels: int
    size: tuple[int, int]
    axes: tuple[str, ...] = _IMAGE
    heads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the example."""
        height, width = self.size
        sizes = {
            "one": 1,
            "n": EXAMPLE_BATCH,
            "c": self.channels,
            "h": height,
            "w": width,
            "hw": height * width,
            "heads": self.heads,
            "d": self.channels // self.heads,
        }
        return tuple(sizes[axis] for axis in self.axes)

    def viewed(self, shape: tuple[int, ...]) -> _Arranged:
        """A view of the tensor: the same elements in the same order, with another shape."""
        for same_order in (
            (self.axes,),
            (_IMAGE, _CHANNELS_FIRST, _FRAMES),
            (_CHANNELS_LAST, _SPLIT),
        ):
            if self.axes not in same_order:
                continue
            for axes in same_order:
                heads = shape[2] if axes == _SPLIT and len(shape) == 4 else 1
                heads = self.heads if axes == self.axes else heads
                view = dataclasses.replace(self, axes=axes, heads=heads)
                if view.shape == shape:
                    return view
        raise GraphError(
            f"({', '.join(self.axes)}) viewed as {shape}, only pixels in a row and channels in "
            "heads are supported"
        )

    def transposed(self, first: int, second: int) -> _Arranged:
        """The tensor with two axes exchanged."""
        axes = list(self.axes)
        axes[first], axes[second] = axes[second], axes[first]
        return dataclasses.replace(self, axes=tuple(axes))

    def result(self, value: Value, shape: tuple[int, ...]) -> _Arranged:
        """The result of an operation on the tensor, with the same axes."""
        named = dict(zip(self.axes, shape, strict=True))
        channels = math.prod(named[axis] for axis in ("c", "heads", "d") if axis in named)
        size = (named["h"], named["w"]) if "h" in named else self.size
        return dataclasses.replace(self, image=value, channels=channels, size=size)


class _Capture:
    """One translation, with the tables that grow while the exported nodes are read in order."""

    def __init__(
        self, program: torch.export.ExportedProgram, name: str, input_channels: int
    ) -> None:
        self.program = program
        self.name = name
        self.input_channels = input_channels
        self.operations: list[Operation] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.values: dict[torch.fx.Node, _Arranged] = {}
        self.taken: set[str] = set()
        signature = program.graph_signature
        self.weight_names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.inputs = set(signature.user_inputs)

    def graph(self) -> Graph:
        input_value: Value = ""
        output: Value = ""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in self.inputs:
                    input_value = self._unique(node.name)
                    size = (EXAMPLE_HEIGHT, EXAMPLE_WIDTH)
                    self.values[node] = _Arranged(input_value, self.input_channels, size)
            elif node.op == "output":
                output = self._result(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                raise self._unsupported(node, f"{node.op} {node.target}")
        operations = tuple(self.operations)
        graph = Graph(
            self.name, (input_value,), self.input_channels, (output,), operations, self.weights
        )
        try:
            return graph.pruned().verify()
        except GraphError as error:
            raise RBLNCompileError(f"The {self.name} gives no valid graph: {error}") from error

    def _result(self, node: torch.fx.Node) -> Value:
        results = torch.utils._pytree.tree_leaves(node.args[0])
        if len(results) != 1 or results[0] not in self.values:
            raise RBLNCompileError(
                f"The {self.name} must give one image, and gives {len(results)} results."
            )
        result = self.values[results[0]]
        if result.axes != _IMAGE:
            raise RBLNCompileError(
                f"The {self.name} must give an image (n, c, h, w), and gives "
                f"({', '.join(result.axes)})."
            )
        return result.image

    def _call(self, node: torch.fx.Node) -> None:
        operation_name = _name_of(node)
        if operation_name in _CHECKS:
            return
        translate = _TRANSLATIONS.get(operation_name)
        if translate is None:
            raise self._unsupported(node, operation_name)
        label = self._label(node, operation_name)
        try:
            found = translate(self, node, label, _arguments(node))
        except GraphError as error:
            raise self._unsupported(node, f"{operation_name}: {error}") from None
        if isinstance(found, Operation):
            value = self.add(found, label)
            first = next(self.values[n] for n in node.all_input_nodes if n in self.values)
            found = first.result(value, tuple(node.meta["val"].shape))
        self.values[node] = found

    def add(self, operation: Operation, label: str) -> Value:
        """Add an operation; returns its output, which is named after the label."""
        value = self._unique(label)
        self.operations.append(dataclasses.replace(operation, output=value))
        return value

    def arranged(self, node: Any) -> _Arranged:
        """The tensor of an argument, which must be computed by the module."""
        if not isinstance(node, torch.fx.Node) or node not in self.values:
            raise GraphError(f"expected a computed tensor, found {node}")
        return self.values[node]

    def image(self, node: Any, *arrangements: tuple[str, ...]) -> Value:
        """The image of an argument, whose axes must be one of `arrangements`.

        Without `arrangements`, the axes must be those of an image.
        """
        found = self.arranged(node)
        if found.axes not in (arrangements or (_IMAGE,)):
            raise GraphError(f"not supported over axes ({', '.join(found.axes)})")
        return found.image

    def weight(self, node: Any, axes: int = 0) -> str:
        """The name of an argument that must be a weight.

        Args:
            node: The argument.
            axes: The least number of axes of the float32 copy; missing axes are added with size
                1. By default, none are added.
        """
        name, source = self._stored(node)
        if name not in self.weights:
            copied = source.detach().to(
                "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
            )
            if copied.dim() == 5:  # of a kernel over frames, with the channels of each in turn
                copied = copied.movedim(2, 1).flatten(1, 2).contiguous()
            self.weights[name] = copied.reshape(*copied.shape, *[1] * (axes - copied.dim()))
        return name

    def constant(self, node: Any) -> list[int]:
        """The whole numbers of an argument that must be a buffer of the model."""
        name, source = self._stored(node)
        if source.is_floating_point() or source.dim() != 1:
            raise GraphError(f"expected a list of whole numbers, found {name!r}")
        return list(source.tolist())

    def _stored(self, node: Any) -> tuple[str, torch.Tensor]:
        """The name and the tensor of an argument that must be stored in the model."""
        if not isinstance(node, torch.fx.Node) or node.name not in self.weight_names:
            raise GraphError(f"expected a weight of the model, found {node}")
        name = str(self.weight_names[node.name])
        source = self.program.state_dict.get(name, self.program.constants.get(name))
        if not isinstance(source, torch.Tensor):
            raise GraphError(f"weight {name!r} is not stored in the model")
        return name, source

    def optional_weight(self, node: Any) -> str | None:
        return None if node is None else self.weight(node)

    def _label(self, node: torch.fx.Node, operation_name: str) -> str:
        path = _module_path(node)
        leaf = operation_name in ("conv2d", "conv3d", "group_norm", "linear")
        return (path or operation_name) if leaf else f"{path}.{operation_name}".lstrip(".")

    def _unique(self, label: str) -> str:
        name, count = label, 1
        while name in self.taken:
            count += 1
            name = f"{label}:{count}"
        self.taken.add(name)
        return name

    def _unsupported(self, node: torch.fx.Node, what: str) -> RBLNCompileError:
        place = _module_path(node) or "the module itself"
        return RBLNCompileError(
            f"Can't compile operation {what!r} in {place!r} of the {self.name}. Supported are: "
            f"{', '.join(sorted(_TRANSLATIONS))}."
        )


def _name_of(node: torch.fx.Node) -> str:
    target = node.target
    schema = getattr(target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else str(target)


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, including defaults."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def _pair(item: Any) -> tuple[int, int]:
    first, second = (item if len(item) == 2 else (*item, *item)) if item else (0, 0)
    return int(first), int(second)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


_Translate = Callable[[_Capture, torch.fx.Node, Value, dict[str, Any]], Operation | _Arranged]
"""Returns an operation, or the rearranged tensor of the argument."""


def _conv2d(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(not isinstance(a["padding"], str), "padding given by name")
    _expect(a["groups"] == 1, f"{a['groups']} groups, only 1 is supported")
    _expect(set(a["dilation"]) == {1}, f"dilation {a['dilation']}, only 1 is supported")
    rows, columns = _pair(a["stride"])
    _expect(rows == columns, f"stride {a['stride']}, only equal ones are supported")
    tall, wide = _pair(a["padding"])
    return Conv2d(
        value,
        c.image(a["input"]),
        c.weight(a["weight"]),
        c.optional_weight(a["bias"]),
        stride=rows,
        padding=(tall, tall, wide, wide),
    )


def _conv3d(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    """A convolution over the frames of a clip, which are the images of the batch."""
    _expect(not isinstance(a["padding"], str), "padding given by name")
    _expect(a["groups"] == 1, f"{a['groups']} groups, only 1 is supported")
    _expect({*a["dilation"], *a["stride"]} == {1}, "only dilation and stride 1 are supported")
    frames, padding = a["weight"].meta["val"].shape[2], [*a["padding"]]
    around, tall, wide = padding if len(padding) == 3 else padding * 3
    _expect(
        (frames, around) in ((1, 0), (3, 1)),
        f"a kernel of {frames} frames with {around} of padding, only 1 and 3 are supported",
    )
    return Conv2d(
        value,
        c.image(a["input"], _CLIP),
        c.weight(a["weight"]),
        c.optional_weight(a["bias"]),
        padding=(tall, tall, wide, wide),
        over_clip=frames > 1,
    )


def _group_norm(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    image = c.image(a["input"], _IMAGE, _CHANNELS_FIRST, _CLIP)
    weight, bias = c.weight(a["weight"]), c.weight(a["bias"])
    over_clip = c.arranged(a["input"]).axes == _CLIP
    norm = Norm(a["num_groups"], float(a["eps"]), weight, bias, over_clip)
    return GroupNorm(value, image, norm)


def _rms_norm(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    source = c.arranged(a["input"])
    _expect(
        source.axes[-1] == "c" and list(a["normalized_shape"]) == [source.channels],
        f"over the last of axes ({', '.join(source.axes)}), only channels are supported",
    )
    _expect(a["eps"] is not None, "an RMS norm without eps")
    return PixelNorm(value, source.image, RMSNorm(float(a["eps"]), c.weight(a["weight"])))


def _activation(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a.get("approximate", "none") == "none", "only the exact gelu is supported")
    return Activation(value, c.arranged(a.get("self", a.get("input"))).image, _name_of(node))


def _add(
    c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]
) -> Operation | _Arranged:
    _expect(a["alpha"] == 1, f"alpha {a['alpha']}, only 1 is supported")
    if isinstance(a["other"], (int, float)):
        return _scaled(c.arranged(a["self"]), value, 1.0, float(a["other"]))
    left, right = c.arranged(a["self"]), c.arranged(a["other"])
    _expect(
        (left.axes, left.shape) == (right.axes, right.shape),
        f"a sum of {left.shape} and {right.shape}",
    )
    return Add(value, left.image, right.image)


def _subtract(
    c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]
) -> Operation | _Arranged:
    other = a["other"]
    _expect(
        isinstance(other, (int, float)) and a["alpha"] == 1,
        "only subtraction of a number is supported",
    )
    return _scaled(c.arranged(a["self"]), value, 1.0, -float(other))


def _multiply(
    c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]
) -> Operation | _Arranged:
    other = a["other"]
    if isinstance(other, torch.fx.Node):
        left, right = c.arranged(a["self"]), c.arranged(other)
        _expect(left.shape == right.shape, f"a product of {left.shape} and {right.shape}")
        return Modulate(value, c.image(a["self"]), c.image(other))
    _expect(isinstance(other, (int, float)), f"a product with {other}")
    return _scaled(c.arranged(a["self"]), value, float(other))


def _divide(
    c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]
) -> Operation | _Arranged:
    other = a["other"]
    _expect(isinstance(other, (int, float)) and other != 0, "only division by a number not zero")
    return _scaled(c.arranged(a["self"]), value, 1.0 / float(other))


def _scaled(
    source: _Arranged, value: Value, factor: float, offset: float = 0.0
) -> Operation | _Arranged:
    _expect(math.isfinite(factor), f"multiplication by {factor}")
    _expect(math.isfinite(offset), f"addition of {offset}")
    if factor == 1.0 and offset == 0.0:
        return source
    return Scale(value, source.image, factor, offset)


def _same(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> _Arranged:
    dtype = node.meta["val"].dtype
    _expect(dtype.is_floating_point, f"a cast to {dtype}, only floating types are supported")
    return c.arranged(a.get("self", a.get("input")))


def _dropout(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> _Arranged:
    _expect(not a["train"] or a["p"] == 0, "dropout of a model in training; call eval() first")
    return c.arranged(a["input"])


def _upsample(
    c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]
) -> Operation | _Arranged:
    source: torch.fx.Node = a["input"] if "input" in a else a["self"]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    factor = after[2] // before[2]
    _expect(
        factor.bit_count() == 1 and after[2:] == (factor * before[2], factor * before[3]),
        "only doubling of height and width, once or several times, is supported",
    )
    if factor == 1:
        return c.arranged(source)
    image = c.image(source)
    for _ in range(factor.bit_length() - 2):
        image = c.add(Upsample("", image), value)
    return Upsample(value, image)


def _take(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a["dim"] == 1, f"elements taken along axis {a['dim']}, only channels are supported")
    image, order = c.image(a["self"]), c.constant(a["index"])
    return Shuffle(value, image, "channels", tuple(map(int, order)))


def _shuffle(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    factor = a.get("upscale_factor", a.get("downscale_factor"))
    _expect(factor == 2, f"a shuffle by {factor}, only by 2 is supported")
    source = c.arranged(a["self"])
    up = "upscale_factor" in a
    channels = source.channels if up else 4 * source.channels
    return Shuffle(value, c.image(a["self"]), "up" if up else "down", tuple(range(channels)))


def _unsqueeze(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> _Arranged:
    _expect(a["dim"] == 0, f"an axis added at {a['dim']}, only one before all is supported")
    return c.arranged(a["self"]).viewed(tuple(node.meta["val"].shape))


def _pad(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a.get("mode", "constant") == "constant", f"padding mode {a.get('mode')!r}")
    _expect(not a.get("value"), f"padding with {a.get('value')}, only 0 is supported")
    amounts = [*a["pad"], 0, 0, 0, 0]
    _expect(not any(amounts[4:]), "only height and width can be padded")
    left, right, above, below = amounts[:4]
    _expect(min(amounts) >= 0, "negative padding")
    return Pad(value, c.image(a["self"]), (above, below, left, right))


def _linear(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    image = c.image(a["input"], _CHANNELS_LAST)
    return Conv2d(value, image, c.weight(a["weight"], axes=4), c.optional_weight(a["bias"]))


def _view(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> _Arranged:
    return c.arranged(a["self"]).viewed(tuple(node.meta["val"].shape))


def _transpose(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> _Arranged:
    rank = len(node.meta["val"].shape)
    return c.arranged(a["self"]).transposed(a["dim0"] % rank, a["dim1"] % rank)


def _permute(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> _Arranged:
    source = c.arranged(a["self"])
    axes = [source.axes[axis] for axis in a["dims"]]
    return dataclasses.replace(source, axes=tuple(axes))


def _attention(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a["attn_mask"] is None, "attention with a mask")
    _expect(not a["is_causal"] and not a["dropout_p"], "causal attention, or one with dropout")
    query, key, of = (c.image(a[name], _BY_HEAD) for name in ("query", "key", "value"))
    _, heads, _, width = a["query"].meta["val"].shape
    scale = width**-0.5 if a["scale"] is None else float(a["scale"])
    return Attention(value, query, key, of, heads, scale)


_CHECKS = frozenset({"_assert_tensor_metadata", "sym_constrain_range_for_size"})
"""Calls that assert something during export and have no result."""

_TRANSLATIONS: dict[str, _Translate] = {
    "conv2d": _conv2d,
    "conv3d": _conv3d,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "silu": _activation,
    "gelu": _activation,
    "mish": _activation,
    "relu": _activation,
    "tanh": _activation,
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "clone": _same,
    "contiguous": _same,
    "detach": _same,
    "alias": _same,
    "to": _same,
    "_to_copy": _same,
    "dropout": _dropout,
    "upsample_nearest2d": _upsample,
    "_upsample_nearest_exact2d": _upsample,
    "index_select": _take,
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _shuffle,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "linear": _linear,
    "view": _view,
    "reshape": _view,
    "flatten": _view,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "permute": _permute,
    "scaled_dot_product_attention": _attention,
}
