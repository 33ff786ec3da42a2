"""Graphs as JSON: what is stored, and that only graphs are rebuilt."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from graphs import PARTS, captured, graph_of_every_kind, paths, small_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from rbln_vae.graph.ir import Conv2d, Graph, GraphError
from rbln_vae.graph.passes import optimise
from rbln_vae.graph.stored import restore, store


def at(item: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        item = item[key]
    return item


GRAPHS = {
    "every kind": graph_of_every_kind,
    "captured": lambda: captured("decoder"),
    "optimised": lambda: optimise(captured("encoder")),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("optimised", [False, True])
def test_what_is_stored_holds_no_spatial_size(part: str, optimised: bool) -> None:
    graph = optimise(captured(part)) if optimised else captured(part)
    stored = store(graph)
    numbers = {
        item
        for path in paths(stored)
        if isinstance(item := at(stored, path), int) and not isinstance(item, bool)
    }
    assert max(numbers) <= 16  # the most channels of the model


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_stored_gives_an_equal_graph(name: str) -> None:
    graph = GRAPHS[name]()
    stored = store(graph)
    assert json.loads(json.dumps(stored)) == stored
    again = restore([stored], graph.weights)
    assert again == graph
    assert stored == store(graph) == store(again)
    assert all(type(a) is type(b) for a, b in zip(again.operations, graph.operations, strict=True))


def test_no_weights_are_stored_with_a_graph() -> None:
    graph = small_graph(Conv2d("y", "x", "weight", None), weight=(4, 4, 64, 64))
    assert len(json.dumps(store(graph))) < 500


def stored_graph() -> Any:
    return store(graph_of_every_kind())


def loaded(stored: Any) -> Graph:
    return restore([stored], graph_of_every_kind().weights)


def replaced(path: tuple[Any, ...], value: Any) -> Any:
    stored = stored_graph()
    at(stored, path[:-1])[path[-1]] = value
    return stored


def without(*path: Any) -> Any:
    stored = stored_graph()
    del at(stored, path[:-1])[path[-1]]
    return stored


def nested(depth: int, key: str | None = None) -> Any:
    """A list in a list in a list, or with a key an object in an object."""
    item: Any = 0
    for _ in range(depth):
        item = [item] if key is None else {key: item}
    return item


ONE_OF_EACH = "a single graph maps an image to an image"
MALFORMED: dict[str, tuple[Any, str]] = {
    "a text": ("{}", "expected an object"),
    "a list": ([], "expected an object"),
    "null": (None, "expected an object"),
    "no operations": (without("operations"), "found"),
    "operations that are an object": (replaced(("operations",), {}), "expected tuple"),
    "an operation that is a text": (replaced(("operations", 0), "Conv2d"), "isn't an object"),
    "no name": (without("name"), "found"),
    "a further field": (replaced(("colour",), "red"), "found"),
    "weights in it": (replaced(("weights",), {}), "found"),
    "no input": (replaced(("inputs",), []), "inputs of [] channels"),
    "two inputs": (replaced(("inputs",), [{"name": "x", "channels": 4}] * 2), ONE_OF_EACH),
    "two outputs": (replaced(("outputs",), ["result", "down"]), ONE_OF_EACH),
    "a slot without values": (replaced(("state",), [{"name": "history"}]), "Slot has the fields"),
    "an input that is a text": (replaced(("inputs", 0), "x"), "expected an object"),
    "an output that is an object": (replaced(("outputs", 0), {"name": "result"}), "expected str"),
    "state that is null": (replaced(("state",), None), "expected tuple"),
    "a name that is a number": (replaced(("name",), 7), "expected str"),
    "channels that are a text": (replaced(("inputs", 0, "channels"), "4"), "expected int"),
    "channels that are a float": (replaced(("inputs", 0, "channels"), 4.0), "expected int"),
    "channels that are a boolean": (replaced(("inputs", 0, "channels"), True), "expected int"),
    "an unknown kind": (replaced(("operations", 0, "kind"), "Eval"), "unknown operation 'Eval'"),
    "the kind that all kinds are": (
        replaced(("operations", 0, "kind"), "Operation"),
        "unknown operation 'Operation'",
    ),
    "a kind that is a list": (replaced(("operations", 0, "kind"), ["Pad"]), "unknown operation"),
    "no kind": (without("operations", 0, "kind"), "unknown operation None"),
    "an operation without an attribute": (without("operations", 0, "padding"), "Pad has the"),
    "an operation with one too many": (
        replaced(("operations", 0, "groups"), 1),
        "Pad has the fields",
    ),
    "padding that is a number": (replaced(("operations", 0, "padding"), 1), "expected tuple"),
    "padding with a text": (
        replaced(("operations", 0, "padding"), [0, 0, 0, "0"]),
        "expected int",
    ),
    "padding on three sides": (replaced(("operations", 0, "padding"), [0, 0, 0]), "padding"),
    "a stride that is a boolean": (replaced(("operations", 1, "stride"), True), "expected int"),
    "a flag that is a number": (replaced(("operations", 1, "upsample"), 0), "expected bool"),
    "a norm that is a list": (replaced(("operations", 2, "norm"), [4]), "expected an object"),
    "a norm that is missing": (replaced(("operations", 2, "norm"), None), "expected an object"),
    "a norm with an own kind": (
        replaced(("operations", 2, "norm", "kind"), "Norm"),
        "Norm has the fields",
    ),
    "an eps that is a text": (replaced(("operations", 2, "norm", "eps"), "0"), "expected float"),
    "an eps that is a boolean": (
        replaced(("operations", 2, "norm", "eps"), True),
        "expected float",
    ),
    "an eps larger than any float": (
        replaced(("operations", 2, "norm", "eps"), 10**400),
        "eps",
    ),
    "padding that is a boolean": (
        replaced(("operations", 0, "padding"), [1, 0, True, 0]),
        "expected int",
    ),
    "padding that is a float": (
        replaced(("operations", 0, "padding"), [1, 0, 2.0, 0]),
        "expected",
    ),
    "padding that is a list": (replaced(("operations", 0, "padding"), [1, 0, [2], 0]), "expected"),
    "brackets in brackets": (nested(50_000), "nested too deeply"),
    "brackets for operations": (replaced(("operations",), nested(500)), "isn't an object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_graph_is_refused(name: str) -> None:
    stored, message = MALFORMED[name]
    with pytest.raises(GraphError, match=re.escape(message)):
        loaded(stored)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [10, 100, 900, 990, 2_000, 20_000, 200_000])
@pytest.mark.parametrize(
    "path", [("state",), ("name",), ("operations", 0), ("operations", 0, "padding")], ids=str
)
@pytest.mark.parametrize("key", [None, "a"])
def test_nesting_of_any_depth_is_refused(
    depth: int, path: tuple[Any, ...], key: str | None
) -> None:
    with pytest.raises(GraphError):
        loaded(replaced(path, nested(depth, key)))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["x", "n", "h", "hw", "silu", "Conv2d", "conv", "first", "", "\ud800"])
    | st.text(max_size=4),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children)
    ),
    max_leaves=4,
)
PLACES = [path for path in paths(stored_graph()) if path]


@settings(max_examples=600)
@given(place=st.sampled_from(PLACES), value=ANYTHING, delete=st.booleans())
def test_a_graph_with_anything_anywhere_is_valid_or_refused(
    place: tuple[Any, ...], value: Any, delete: bool
) -> None:
    stored = without(*place) if delete else replaced(place, value)
    try:
        graph = loaded(stored)
    except GraphError:
        return
    assert graph.verify() == restore([store(graph)], graph.weights)


@pytest.mark.parametrize("name", sorted(graph_of_every_kind().weights))
def test_weights_are_refused_that_do_not_fit(name: str) -> None:
    graph = graph_of_every_kind()
    for other in (
        {k: v for k, v in graph.weights.items() if k != name},
        {**graph.weights, name: graph.weights[name].flatten()[:-1]},
        {**graph.weights, name: graph.weights[name][None]},
        {**graph.weights, name + "2": graph.weights[name]},
    ):
        with pytest.raises(GraphError):
            restore([store(graph)], other)
