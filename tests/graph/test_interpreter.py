"""The interpreter: each operation is that of torch, and a run keeps to itself."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from graphs import captured, evaluate, graph_of_every_kind, small_graph
from torch import Tensor
from vaes import noise

from rbln_vae.graph.interpreter import Interpreter
from rbln_vae.graph.ir import (
    ACTIVATIONS,
    OPERATIONS,
    Activation,
    Add,
    Attention,
    Conv2d,
    GraphError,
    GroupNorm,
    Identity,
    Modulate,
    Norm,
    Operation,
    Pad,
    PixelNorm,
    RMSNorm,
    Scale,
    Shuffle,
    Stack,
    Unstack,
    Upsample,
)
from rbln_vae.graph.passes import optimise
from rbln_vae.metrics import relative_l2

Weights = dict[str, Tensor]
NORM = Norm(2, 1e-3, "scale", "shift")
CLIP_NORM = Norm(2, 1e-3, "scale", "shift", over_clip=True)
RMS = RMSNorm(1e-24, "scale")
CONV = {"w": (6, 4, 3, 2), "b": (6,)}
SQUARE = {"w": (4, 4, 3, 3)}
NORMED = {"scale": (4,), "shift": (4,)}
ONES = (1, 1, 1, 1)


def normal(x: Tensor, w: Weights) -> Tensor:
    return F.group_norm(x, 2, w["scale"], w["shift"], 1e-3)


def clip_of(x: Tensor) -> Tensor:
    """The images of a batch as frames `(1, C, T, H, W)`."""
    return x.transpose(0, 1).unsqueeze(0)


def frames_of(clip: Tensor) -> Tensor:
    return clip.squeeze(0).transpose(0, 1)


def doubled_convolution(x: Tensor, w: Weights) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2), w["w"], w["b"], padding=1)


def normal_pixels(x: Tensor, w: Weights) -> Tensor:
    """As diffusers writes it for Wan."""
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * w["scale"][:, None, None]


def shuffled_convolution(x: Tensor, w: Weights) -> Tensor:
    """One convolution of all phases, and torch's shuffle."""
    kernels = w["p"].permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
    return F.pixel_shuffle(F.conv2d(x, kernels, w["pb"].permute(2, 0, 1).flatten(), padding=1), 2)


def heads_by_hand(x: Tensor, heads: int, scale: float) -> Tensor:
    pixels = x.flatten(2).unflatten(1, (heads, -1))  # n, heads, channels, pixels
    weights = torch.softmax(scale * pixels.transpose(2, 3) @ pixels, dim=-1)
    return (pixels @ weights.transpose(2, 3)).reshape(x.shape)


TABLE: list[tuple[Operation, dict[str, tuple[int, ...]], Callable[[Tensor, Weights], Tensor]]] = [
    (Conv2d("y", "x", "w", "b"), CONV, lambda x, w: F.conv2d(x, w["w"], w["b"])),
    (
        Conv2d("y", "x", "w", None, 2, (1, 1, 2, 2)),
        CONV | {"b": ()},
        lambda x, w: F.conv2d(x, w["w"], None, 2, (1, 2)),
    ),
    (
        Conv2d("y", "x", "w", "b", 2, (0, 1, 2, 3)),
        CONV,
        lambda x, w: F.conv2d(F.pad(x, (2, 3, 0, 1)), w["w"], w["b"], 2),
    ),
    (
        Conv2d("y", "x", "w", None, padding=ONES, norm=NORM, residual="x"),
        SQUARE | NORMED,
        lambda x, w: x + F.conv2d(normal(x, w), w["w"], padding=1),
    ),
    (
        Conv2d("y", "x", "w", None, padding=ONES, norm=NORM, activation="silu"),
        SQUARE | NORMED,
        lambda x, w: F.conv2d(F.silu(normal(x, w)), w["w"], padding=1),
    ),
    (
        Conv2d("y", "x", "w", "b", padding=(1, 1, 0, 0), over_clip=True, norm=CLIP_NORM),
        {"w": (6, 12, 3, 2), "b": (6,)} | NORMED,
        lambda x, w: frames_of(
            F.conv3d(
                F.group_norm(clip_of(x), 2, w["scale"], w["shift"], 1e-3),
                w["w"].unflatten(1, (3, 4)).transpose(1, 2),
                w["b"],
                padding=(1, 1, 0),
            )
        ),
    ),
    (
        GroupNorm("y", "x", CLIP_NORM),
        NORMED,
        lambda x, w: frames_of(F.group_norm(clip_of(x), 2, w["scale"], w["shift"], 1e-3)),
    ),
    (
        Conv2d("y", "x", "w", None, padding=ONES, activation="gelu"),
        SQUARE,
        lambda x, w: F.conv2d(F.gelu(x), w["w"], padding=1),
    ),
    (
        Conv2d("y", "x", "w", "b", padding=ONES, upsample=True),
        {"w": (6, 4, 3, 3), "b": (6,)},
        doubled_convolution,
    ),
    (
        Conv2d("y", "x", "p", "pb", padding=ONES, upsample=True),
        {"p": (2, 2, 3, 4, 3, 3), "pb": (2, 2, 3)},
        shuffled_convolution,
    ),
    (
        Conv2d("y", "x", "w", None, padding=ONES, norm=RMS, activation="silu"),
        SQUARE | {"scale": (4,)},
        lambda x, w: F.conv2d(F.silu(normal_pixels(x, w)), w["w"], padding=1),
    ),
    (
        Conv2d("y", "x", "w", None, padding=ONES, residual="x", output_activation="relu"),
        SQUARE,
        lambda x, w: F.relu(x + F.conv2d(x, w["w"], padding=1)),
    ),
    (GroupNorm("y", "x", NORM), NORMED, normal),
    (PixelNorm("y", "x", RMS), {"scale": (4,)}, normal_pixels),
    *(
        (Activation("y", "x", name), {}, lambda x, w, name=name: getattr(F, name)(x))
        for name in ACTIVATIONS
    ),
    (Shuffle("y", "x", "channels", (3, 1, 1)), {}, lambda x, w: x[:, [3, 1, 1]]),
    (
        Shuffle("y", "x", "up", (0, 1, 2, 3)),
        {},
        lambda x, w: F.pixel_shuffle(x, 2),
    ),
    (
        Shuffle("y", "x", "up", (0, 0, 0, 0, 3, 2, 1, 3)),
        {},
        lambda x, w: F.pixel_shuffle(x[:, [0, 0, 0, 0, 3, 2, 1, 3]], 2),
    ),
    (Add("y", "x", "x"), {}, lambda x, w: 2 * x),
    (Modulate("y", "x", "x"), {}, lambda x, w: x * x),
    (Modulate("y", "x", "x", "x", NORM), NORMED, lambda x, w: normal(x, w) * x + x),
    (Scale("y", "x", -0.3), {}, lambda x, w: -0.3 * x),
    (Scale("y", "x", 2.0, -1.0), {}, lambda x, w: 2 * x - 1),
    (Identity("y", "x"), {}, lambda x, w: x),
    (Stack("y", ("x", "x", "x")), {}, lambda x, w: torch.cat([x, x, x])),
    (Unstack("y", "x", 1, 2), {}, lambda x, w: x[1:]),
    (
        Conv2d("y", "x", "w", "b", padding=(1, 1, 0, 0), earlier=("x", "x")),
        {"w": (6, 12, 3, 2), "b": (6,)},
        lambda x, w: F.conv2d(torch.cat([x, x, x], 1), w["w"], w["b"], padding=(1, 0)),
    ),
    (Upsample("y", "x"), {}, lambda x, w: x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    (Pad("y", "x", (1, 2, 3, 4)), {}, lambda x, w: F.pad(x, (3, 4, 1, 2))),
    (Attention("y", "x", "x", "x", 1, 0.4), {}, lambda x, w: heads_by_hand(x, 1, 0.4)),
    (Attention("y", "x", "x", "x", 2, 0.4, "x"), {}, lambda x, w: x + heads_by_hand(x, 2, 0.4)),
]


def layouts() -> dict[str, Tensor]:
    """One image, in every way in which memory can hold it."""
    image = noise(2, 4, 6, 7)
    return {
        "contiguous": image,
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "turned": image.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": torch.stack([image, image], -1).flatten(3)[..., ::2],
        "a part": F.pad(image, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        "batch last": image.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


def test_the_table_holds_every_operation() -> None:
    assert {operation.kind for operation, _, _ in TABLE} == set(OPERATIONS)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("case", TABLE, ids=lambda case: str(case[0])[5:])
def test_an_operation_is_that_of_torch(
    case: tuple[Operation, dict[str, tuple[int, ...]], Callable[[Tensor, Weights], Tensor]],
    layout: str,
) -> None:
    operation, shapes, expected = case
    graph = small_graph(operation, **{name: s for name, s in shapes.items() if s})
    image = layouts()[layout]
    before = image.clone()
    result = Interpreter(graph).run(image)  # not verified: a view may read a size of its own
    wanted = expected(layouts()["contiguous"], dict(graph.weights))
    assert result.shape == wanted.shape and result.is_contiguous()
    assert relative_l2(result, wanted) < 1e-6
    assert torch.equal(image, before)
    assert result.untyped_storage().data_ptr() != image.untyped_storage().data_ptr()


@pytest.mark.parametrize("factor", [1, 2, 3, 7, 32])
def test_each_pixel_modulates_a_square(factor: int) -> None:
    """By any factor, none of which is a float32 that rounds to the pixel before."""
    graph = small_graph(
        Conv2d("small", "x", "w", "b", factor), Modulate("y", "x", "small", "small"),
        w=(4, 4, 1, 1), b=(4,),
    )  # fmt: skip
    image = noise(1, 4, 3 * factor, 5 * factor)
    small = F.conv2d(image, graph.weights["w"], graph.weights["b"], factor)
    wide = torch.kron(small, torch.ones(factor, factor))
    assert relative_l2(evaluate(graph, image), image * wide + wide) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_of_any_floating_type_is_computed_in_that_of_the_interpreter(
    dtype: torch.dtype,
) -> None:
    image = noise(1, 4, 6, 7)
    graph = graph_of_every_kind()
    result = evaluate(graph, image.to(dtype))
    assert result.dtype == torch.float32
    assert torch.equal(result, evaluate(graph, image.to(dtype).float()))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float64, 1e-6)])
def test_the_interpreter_computes_in_its_own_type(dtype: torch.dtype, error: float) -> None:
    graph, image = optimise(captured("decoder")), noise(1, 4, 6, 7)
    result = evaluate(graph, image, dtype)
    assert result.dtype == dtype
    assert relative_l2(result.float(), evaluate(graph, image)) < error


def test_an_input_that_requires_gradients_gives_a_result_that_does_not() -> None:
    image = noise(1, 4, 6, 6).requires_grad_()
    assert not evaluate(graph_of_every_kind(), image).requires_grad
    assert not evaluate(small_graph(), image).requires_grad


@pytest.mark.parametrize("layout", layouts())
def test_a_graph_that_does_nothing_returns_a_copy(layout: str) -> None:
    image = layouts()[layout]
    result = evaluate(small_graph(), image)
    before = image.clone()
    result.zero_()
    assert torch.equal(image, before)


def test_the_weights_of_the_graph_are_not_written_to() -> None:
    graph = graph_of_every_kind()
    before = {name: weight.clone() for name, weight in graph.weights.items()}
    evaluate(graph, noise(1, 4, 6, 6))
    assert all(torch.equal(graph.weights[name], weight) for name, weight in before.items())


def test_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    evaluate(graph_of_every_kind(), noise(1, 4, 6, 6))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 0, 8)])
def test_an_image_that_does_not_fit_is_refused_before_the_run(shape: tuple[int, ...]) -> None:
    called: list[int] = []
    with pytest.raises(GraphError, match="expected"):
        Interpreter(captured("decoder")).run(
            torch.zeros(shape), lambda index, operation: called.append(index)
        )
    assert not called


def test_the_callback_sees_each_operation_in_order_and_may_end_the_run() -> None:
    graph = graph_of_every_kind()
    seen: list[tuple[int, Operation]] = []
    interpreter, image = Interpreter(graph), noise(1, 4, 6, 6)
    expected = interpreter.run(image, lambda index, operation: seen.append((index, operation)))
    assert seen == list(enumerate(graph.operations))

    def end(index: int, operation: Operation) -> None:
        if index == 5:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        interpreter.run(image, end)
    assert torch.equal(interpreter.run(image), expected)


def test_values_are_freed_after_their_last_use() -> None:
    """A chain of any length holds what one operation reads and makes."""
    names = ["x", *(f"v{i}" for i in range(30))]
    graph = small_graph(*(Scale(b, a, 1.01) for a, b in itertools.pairwise(names)))
    interpreter = Interpreter(graph)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    evaluate_one = interpreter._evaluate

    def watched(operation: Operation, values: dict[str, Tensor]) -> Tensor:
        nonlocal most
        result = evaluate_one(operation, values)
        alive.add(result)
        most = max(most, len(alive))
        return result

    interpreter._evaluate = watched  # type: ignore[method-assign,assignment]
    interpreter.run(noise(1, 4, 8, 8))
    assert most == 2


def test_threads_may_share_an_interpreter() -> None:
    interpreter = Interpreter(optimise(captured("decoder")))
    images = [noise(1, 4, 4 + seed % 3, 5, seed=seed) for seed in range(12)]
    alone = [interpreter.run(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(interpreter.run, images))
    for one, other in zip(alone, together, strict=True):
        assert relative_l2(other, one) < 1e-6
