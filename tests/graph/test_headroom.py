"""Images that are kept within the range of float16."""

from __future__ import annotations

import pytest
import tiny_vaes
import torch
from graphs import PARTS, captured, evaluate, graph_of_every_kind, small_graph
from vaes import noise

import rbln_vae
from rbln_vae.graph.capture import capture
from rbln_vae.graph.headroom import HEADROOM, give_headroom
from rbln_vae.graph.interpreter import Interpreter
from rbln_vae.graph.ir import Activation, Add, Conv2d, Graph, Norm, Operation, RMSNorm
from rbln_vae.graph.passes import optimise
from rbln_vae.metrics import relative_l2


def largest_values(graph: Graph, image: torch.Tensor) -> dict[str, float]:
    """The largest magnitude of every value in a run."""
    found: dict[str, float] = {}

    class Watching(Interpreter):
        def _evaluate(self, operation: Operation, values: object) -> torch.Tensor:  # type: ignore[override]
            result: torch.Tensor = super()._evaluate(operation, values)  # type: ignore[arg-type]
            found[operation.output] = float(result.abs().max())
            return result

    Watching(graph).run(image)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_all_values_of_a_model_become_smaller_but_its_result(part: str) -> None:
    graph = optimise(captured(part))
    scaled = give_headroom(graph)
    image = noise(2, graph.input_channels, 16, 12)
    assert relative_l2(evaluate(scaled, image), evaluate(graph, image)) < 1e-6
    before, after = largest_values(graph, image), largest_values(scaled, image)
    for value, largest in after.items():
        factor = 1 if value == graph.output else HEADROOM
        assert largest == pytest.approx(before[value] * factor, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_vaes.DEFAULTS)
def test_the_parts_of_every_class_give_the_same(name: str) -> None:
    model = tiny_vaes.make(name)
    family = getattr(rbln_vae, f"RBLN{name}").family
    for part in PARTS:
        channels = family.facts(model.config)[
            "in_channels" if part == "encoder" else "latent_channels"
        ]
        graph = optimise(capture(family.module(model, part), part, channels))
        scaled = give_headroom(graph)
        image = noise(1, channels, 32, 32)
        assert relative_l2(evaluate(scaled, image), evaluate(graph, image)) < 1e-6
        assert any(name.endswith(".scaled") for name in scaled.weights)


def test_every_operation_is_told_of_the_factors_of_its_inputs() -> None:
    graph = graph_of_every_kind()
    image = noise(1, 4, 24, 24)
    for factor in (0.25, 2.0):
        found = evaluate(give_headroom(graph, factor), image)
        assert relative_l2(found, evaluate(graph, image)) < 1e-6


STREAM = (
    Conv2d("a", "x", "first", "shift"),
    Conv2d("b", "a", "second", None, norm=RMSNorm(1e-6, "scale"), residual="a"),
)
SHAPES = {"first": (8, 4, 1, 1), "second": (8, 8, 1, 1), "shift": (8,), "scale": (8,)}


@pytest.mark.parametrize(
    ("reader", "scaled"),
    [
        (Conv2d("y", "b", "last", None, norm=Norm(2, 1e-6, "scale", "shift")), True),
        (Conv2d("y", "b", "last", None), True),
        (Conv2d("y", "b", "last", None, activation="relu"), True),
        (Conv2d("y", "b", "last", None, activation="silu"), False),
        (Activation("y", "b", "silu"), False),
        (Add("y", "b", "x"), False),
    ],
)
def test_an_image_is_scaled_if_all_that_read_it_can_undo_it(
    reader: Operation, scaled: bool
) -> None:
    shapes = dict(SHAPES)
    operations = STREAM
    if isinstance(reader, Conv2d):
        shapes["last"] = (3, 8, 1, 1)
    channels = 8 if isinstance(reader, Add) else 4
    shapes["first"] = (8, channels, 1, 1)
    graph = small_graph(*operations, reader, channels=channels, **shapes).verify()
    found = give_headroom(graph)
    image = noise(1, channels, 6, 5)
    assert relative_l2(evaluate(found, image), evaluate(graph, image)) < 1e-6
    assert (found != graph) is scaled


def test_weights_that_are_shared_keep_their_values_for_others() -> None:
    graph = small_graph(
        Conv2d("a", "x", "same", None),
        Conv2d("b", "a", "same", None, norm=RMSNorm(1e-6, "scale"), residual="a"),
        Conv2d("y", "b", "same", None, norm=RMSNorm(1e-6, "scale")),
        same=(4, 4, 1, 1),
        scale=(4,),
    ).verify()
    image = noise(1, 4, 6, 5)
    assert relative_l2(evaluate(give_headroom(graph), image), evaluate(graph, image)) < 1e-6
