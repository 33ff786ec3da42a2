"""Graphs as JSON values, in the format of docs/artifact.md."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .ir import OPERATIONS, Graph, GraphError, Operation, Slot, Value, Weights, require


def store(graph: Graph) -> dict[str, Any]:
    """A graph without its weights, as JSON values.

    The graph of the first run is not included.
    """
    return {
        "name": graph.name,
        "inputs": [{"name": name, "channels": graph.input_channels} for name in graph.inputs],
        "outputs": list(graph.outputs),
        "state": [dataclasses.asdict(slot) for slot in graph.state],
        "operations": [
            {"kind": operation.kind, **dataclasses.asdict(operation, dict_factory=_json_object)}
            for operation in graph.operations
        ],
    }


def restore(stored: Any, weights: Weights) -> Graph:
    """Rebuild and verify the graphs of a part.

    Args:
        stored: The results of `store` in the order of runs, one or two in a list; any other
            JSON value raises.
        weights: The weights that the graphs name.

    Returns:
        The last graph, with the one before as its `first`.

    Raises:
        GraphError: `stored` is not the graphs of a part, or does not fit the weights.
    """
    require(isinstance(stored, list) and len(stored) in (1, 2), "a part has one or two graphs")
    try:
        graphs = [_graph(item, weights) for item in stored]
    except RecursionError:  # in a message that shows deeply nested brackets
        raise GraphError("brackets are nested too deeply") from None
    unused = sorted(weights.keys() - {name for each in graphs for name in each.weights})
    require(not unused, f"weights that no operation uses: {unused}")
    first = graphs[0] if len(graphs) == 2 else None
    single = len(graphs[-1].inputs) == len(graphs[-1].outputs) == 1 and not graphs[-1].state
    require(first is not None or single, "a single graph maps an image to an image")
    return dataclasses.replace(graphs[-1], first=first).verify()


@dataclass(frozen=True)
class _StoredInput:
    name: Value
    channels: int


@dataclass(frozen=True)
class _StoredGraph:
    """The fields of a graph in a file."""

    name: str
    inputs: tuple[_StoredInput, ...]
    outputs: tuple[Value, ...]
    state: tuple[Slot, ...]
    operations: tuple[Any, ...]


def _json_object(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a dataclass, with tuples as lists, as in JSON."""
    return {name: list(item) if isinstance(item, tuple) else item for name, item in fields}


def _graph(stored: Any, weights: Weights) -> Graph:
    """A graph with its own weights, not verified."""
    graph: _StoredGraph = _build(_StoredGraph, stored)
    channels = {each.channels for each in graph.inputs}
    require(len(channels) == 1, f"inputs of {sorted(channels)} channels")
    operations = tuple(_operation(item) for item in graph.operations)
    used = {name for operation in operations for name in operation.weights}
    return Graph(
        graph.name,
        tuple(each.name for each in graph.inputs),
        channels.pop(),
        graph.outputs,
        operations,
        {name: weights[name] for name in used if name in weights},
        graph.state,
    )


def _operation(stored: Any) -> Operation:
    require(isinstance(stored, dict), f"an operation isn't an object: {stored!r}")
    fields = dict(stored)
    kind = fields.pop("kind", None)
    require(isinstance(kind, str) and kind in OPERATIONS, f"unknown operation {kind!r}")
    return typing.cast(Operation, _build(OPERATIONS[kind], fields))


_hints = functools.cache(typing.get_type_hints)


def _build(cls: type[Any], stored: Any) -> Any:
    """A dataclass from JSON; each field is checked against its type."""
    require(isinstance(stored, dict), f"{stored!r} for a {cls.__name__}, expected an object")
    hints = _hints(cls)  # type: ignore[arg-type]  # classes are hashable
    names = {f.name for f in dataclasses.fields(cls)}
    require(
        stored.keys() == names,
        f"{cls.__name__} has the fields {sorted(names)}, found {sorted(stored)}",
    )
    return cls(**{name: _decode(hints[name], stored[name], name) for name in names})


def _alternative(hint: Any, item: Any) -> Any:
    """The type of a union that an item can have: the one with its fields, if there are several."""
    types_of = [each for each in typing.get_args(hint) if each is not type(None)]
    for each in types_of[1:]:
        if isinstance(item, dict) and item.keys() == {f.name for f in dataclasses.fields(each)}:
            return each
    return types_of[0]


def _decode(hint: Any, item: Any, name: str) -> Any:
    if typing.get_origin(hint) is types.UnionType:
        if item is None:
            return None
        return _decode(_alternative(hint, item), item, name)
    if hint is Any:
        return item
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        require(isinstance(item, dict), f"{name} is {item!r}, expected an object")
        return _build(hint, item)
    if typing.get_origin(hint) is tuple and isinstance(item, list):
        element = typing.get_args(hint)[0]
        return tuple(_decode(element, each, name) for each in item)
    if hint is float and type(item) is int:
        try:
            return float(item)
        except OverflowError:
            raise GraphError(f"{name} is larger than any float") from None
    wanted = typing.get_origin(hint) or hint
    if not isinstance(item, wanted) or (isinstance(item, bool) and wanted is not bool):
        # Not with `require`: it would format the message for every item.
        raise GraphError(f"{name} is {item!r}, expected {getattr(wanted, '__name__', wanted)}")
    return item
