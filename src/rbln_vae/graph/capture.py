"""From a torch module to a Graph, by way of `torch.export`.

The module is exported once on an input of an odd, large size that no channel count
resembles; the sizes that appear in views are then read back as what they stand for,
and the graph is free of them.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import RBLNCompileError
from .ir import (
    Activation,
    Add,
    Conv2d,
    DotProductAttention,
    Graph,
    GraphError,
    GroupNorm,
    Identity,
    Linear,
    Norm,
    Operation,
    Pad,
    Scale,
    Transpose,
    Upsample,
    Value,
    View,
)

# Two primes, so that height, width and their product are told apart from channels, times
# a power of two, so that up to six downsamplings leave no remainder. They are not larger
# because torch computes the bytes of attention's matrix, pixels times pixels, in 63 bits.
EXAMPLE_HEIGHT, EXAMPLE_WIDTH = 64 * 241, 64 * 251
EXAMPLE_BATCH = 2  # not 1, which a model that mixes images could not be told from


_EXPORTING = threading.Lock()
"""torch.export patches `torch.nn.Module` and keeps its state in globals while it traces."""


def capture(module: torch.nn.Module, name: str, input_channels: int) -> Graph:
    """Capture what a module does to an image.

    Several threads may capture at once; they take turns.

    Args:
        module: Takes an image `(N, input_channels, H, W)` and gives an image. It is not
            changed, not even meanwhile, so other threads may run it. Its weights are copied.
        name: The name of the graph.
        input_channels: Channels of the input.

    Returns:
        The graph as captured, with float32 weights; `passes.optimise` makes it fast.

    Raises:
        RBLNCompileError: The module can't be exported, or does something that no
            operation of the representation expresses; the message names the operation
            and the submodule in which it stands.

    Example:
        >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        >>> print(capture(conv, "conv", 3))
        graph conv(%x: 3 channels)
          %conv2d = Conv2d(%x) weight, padding (1, 1, 1, 1)
          return %conv2d
    """
    return _Capture(_export(replica(module), input_channels), name, input_channels).graph()


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module and its submodules, but not the weights, which both then share.

    Args:
        module: What to copy; it is not changed.

    Returns:
        Modules of the same classes, hooks and attributes, around the same tensors.

    Raises:
        RBLNCompileError: A hook or an attribute can't be copied.
    """
    weights = itertools.chain(module.parameters(), module.buffers())
    try:
        return copy.deepcopy(module, {id(weight): weight for weight in weights})
    except Exception as error:  # an attribute's own code is run
        raise RBLNCompileError(
            f"{type(module).__name__} can't be copied: {error}. Remove the hooks and attributes "
            "that hold what can't be copied, such as locks and open files."
        ) from error


def _export(module: torch.nn.Module, channels: int) -> torch.export.ExportedProgram:
    parameter = next(module.parameters(), torch.empty(0))
    # One element seen as a whole image: export reads its shape, never its memory.
    example = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(
        EXAMPLE_BATCH, channels, EXAMPLE_HEIGHT, EXAMPLE_WIDTH
    )
    try:
        with _EXPORTING, torch.no_grad():
            return torch.export.export(module, (example,), strict=False)
    except Exception as error:
        # Export runs the model's own Python code, so anything can be raised.
        raise RBLNCompileError(
            f"{type(module).__name__} can't be exported as one graph: {error}. A model must run "
            "the same operations for every input to be compiled."
        ) from error


class _Capture:
    """One translation: the tables that grow while the exported nodes are read in order."""

    def __init__(
        self, program: torch.export.ExportedProgram, name: str, input_channels: int
    ) -> None:
        self.program = program
        self.name = name
        self.input_channels = input_channels
        self.operations: list[Operation] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.values: dict[torch.fx.Node, Value] = {}
        self.images: dict[torch.fx.Node, torch.fx.Node] = {}  # whose height and width it has
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
                    input_value = self.values[node] = self._unique(node.name)
                    self.images[node] = node
            elif node.op == "output":
                output = self._result(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                raise self._unsupported(node, f"{node.op} {node.target}")
        operations = tuple(self.operations)
        graph = Graph(self.name, input_value, self.input_channels, output, operations, self.weights)
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
        return self.values[results[0]]

    def _call(self, node: torch.fx.Node) -> None:
        operation_name = _name_of(node)
        if operation_name in _CHECKS:
            return
        translate = _TRANSLATIONS.get(operation_name)
        if translate is None:
            raise self._unsupported(node, operation_name)
        arguments = _arguments(node)
        value = self._unique(self._label(node, operation_name))
        try:
            operation = translate(self, node, value, arguments)
        except GraphError as error:
            raise self._unsupported(node, f"{operation_name}: {error}") from None
        self.operations.append(operation)
        self.values[node] = value
        self._remember_image(node, operation)

    def _remember_image(self, node: torch.fx.Node, operation: Operation) -> None:
        if isinstance(operation, View) and operation.axes[2:] != ("h", "w"):
            self.images[node] = self.images[node.all_input_nodes[0]]
            return
        sources = [n for n in node.all_input_nodes if n in self.images]
        rowed = [n for n in sources if self.images[n] is not n]
        if rowed and not isinstance(operation, View):  # still pixels in a row
            self.images[node] = self.images[rowed[0]]
        else:
            self.images[node] = node

    def value(self, node: Any) -> Value:
        """The value of an argument that must be a tensor computed here."""
        if not isinstance(node, torch.fx.Node) or node not in self.values:
            raise GraphError(f"expected a computed tensor, found {node}")
        return self.values[node]

    def weight(self, node: Any) -> str:
        """The name of an argument that must be a weight, which is copied in float32."""
        if not isinstance(node, torch.fx.Node) or node.name not in self.weight_names:
            raise GraphError(f"expected a weight of the model, found {node}")
        name = str(self.weight_names[node.name])
        if name not in self.weights:
            source = self.program.state_dict.get(name, self.program.constants.get(name))
            if not isinstance(source, torch.Tensor):
                raise GraphError(f"weight {name!r} is not stored in the model")
            self.weights[name] = source.detach().to(
                "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
            )
        return name

    def optional_weight(self, node: Any) -> str | None:
        return None if node is None else self.weight(node)

    def axes(self, node: torch.fx.Node) -> tuple[int | str, ...]:
        """The shape of a view, with the sizes of its image by name."""
        batch, _, height, width = self.images[node.all_input_nodes[0]].meta["val"].shape
        names = {height: "h", width: "w", height * width: "hw"}
        shape = node.meta["val"].shape
        return tuple(
            "n" if axis == 0 and size == batch else names.get(size, int(size))
            for axis, size in enumerate(shape)
        )

    def like(self, node: torch.fx.Node) -> Value:
        return self.values[self.images[node.all_input_nodes[0]]]

    def _label(self, node: torch.fx.Node, operation_name: str) -> str:
        path = _module_path(node)
        leaf = operation_name in ("conv2d", "group_norm", "linear")
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
    """All arguments of a call by their names, defaults included."""
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


_Translate = Callable[[_Capture, torch.fx.Node, Value, dict[str, Any]], Operation]


def _conv2d(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(not isinstance(a["padding"], str), "padding given by name")
    _expect(a["groups"] == 1, f"{a['groups']} groups, only 1 is supported")
    _expect(set(a["dilation"]) == {1}, f"dilation {a['dilation']}, only 1 is supported")
    rows, columns = _pair(a["stride"])
    _expect(rows == columns, f"stride {a['stride']}, only equal ones are supported")
    tall, wide = _pair(a["padding"])
    return Conv2d(
        value,
        c.value(a["input"]),
        c.weight(a["weight"]),
        c.optional_weight(a["bias"]),
        stride=rows,
        padding=(tall, tall, wide, wide),
    )


def _group_norm(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    norm = Norm(a["num_groups"], float(a["eps"]), c.weight(a["weight"]), c.weight(a["bias"]))
    return GroupNorm(value, c.value(a["input"]), norm)


def _activation(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a.get("approximate", "none") == "none", "only the exact gelu is supported")
    return Activation(value, c.value(a.get("self", a.get("input"))), _name_of(node))


def _add(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a["alpha"] == 1, f"alpha {a['alpha']}, only 1 is supported")
    return Add(value, c.value(a["self"]), c.value(a["other"]))


def _multiply(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    other = a["other"]
    _expect(isinstance(other, (int, float)), "only multiplication by a number is supported")
    _expect(math.isfinite(other), f"multiplication by {other}")
    return Scale(value, c.value(a["self"]), float(other))


def _divide(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    other = a["other"]
    _expect(isinstance(other, (int, float)) and other != 0, "only division by a number not zero")
    return Scale(value, c.value(a["self"]), 1.0 / float(other))


def _identity(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    dtype = node.meta["val"].dtype
    _expect(dtype.is_floating_point, f"a cast to {dtype}, only floating types are supported")
    return Identity(value, c.value(a.get("self", a.get("input"))))


def _dropout(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(not a["train"] or a["p"] == 0, "dropout of a model in training; call eval() first")
    return Identity(value, c.value(a["input"]))


def _upsample(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    source: torch.fx.Node = a["input"] if "input" in a else a["self"]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    _expect(
        after[2:] == (2 * before[2], 2 * before[3]),
        "only doubling of height and width is supported",
    )
    return Upsample(value, c.value(source))


def _pad(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a.get("mode", "constant") == "constant", f"padding mode {a.get('mode')!r}")
    _expect(not a.get("value"), f"padding with {a.get('value')}, only 0 is supported")
    amounts = [*a["pad"], 0, 0, 0, 0]
    _expect(not any(amounts[4:]), "only height and width can be padded")
    left, right, above, below = amounts[:4]
    _expect(min(amounts) >= 0, "negative padding")
    return Pad(value, c.value(a["self"]), (above, below, left, right))


def _linear(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    return Linear(value, c.value(a["input"]), c.weight(a["weight"]), c.optional_weight(a["bias"]))


def _view(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    return View(value, c.value(a["self"]), c.axes(node), c.like(node))


def _transpose(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    rank = len(node.meta["val"].shape)
    first, second = sorted((a["dim0"] % rank, a["dim1"] % rank))
    return Transpose(value, c.value(a["self"]), first, second)


def _permute(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    axes = [axis % len(a["dims"]) for axis in a["dims"]]
    moved = [axis for axis, source in enumerate(axes) if axis != source]
    if not moved:
        return Identity(value, c.value(a["self"]))
    _expect(len(moved) == 2, f"permutation {axes}, only two axes can be exchanged")
    return Transpose(value, c.value(a["self"]), *moved)


def _attention(c: _Capture, node: torch.fx.Node, value: Value, a: dict[str, Any]) -> Operation:
    _expect(a["attn_mask"] is None, "attention with a mask")
    _expect(not a["is_causal"] and not a["dropout_p"], "causal attention, or one with dropout")
    query = a["query"].meta["val"]
    _expect(query.dim() == 4, f"attention over {query.dim()} axes, expected 4")
    scale = query.shape[-1] ** -0.5 if a["scale"] is None else float(a["scale"])
    return DotProductAttention(
        value, c.value(a["query"]), c.value(a["key"]), c.value(a["value"]), scale
    )


_CHECKS = frozenset({"_assert_tensor_metadata", "sym_constrain_range_for_size"})
"""Calls that assert something at export and give nothing."""

_TRANSLATIONS: dict[str, _Translate] = {
    "conv2d": _conv2d,
    "group_norm": _group_norm,
    "silu": _activation,
    "gelu": _activation,
    "mish": _activation,
    "relu": _activation,
    "add": _add,
    "mul": _multiply,
    "div": _divide,
    "clone": _identity,
    "contiguous": _identity,
    "detach": _identity,
    "alias": _identity,
    "to": _identity,
    "_to_copy": _identity,
    "dropout": _dropout,
    "upsample_nearest2d": _upsample,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "linear": _linear,
    "view": _view,
    "reshape": _view,
    "flatten": _view,
    "transpose": _transpose,
    "permute": _permute,
    "scaled_dot_product_attention": _attention,
}
