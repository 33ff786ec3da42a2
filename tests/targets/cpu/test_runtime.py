"""Whole graphs on the engine: against diffusers, from many threads, and when all goes wrong."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from diffusers import AutoencoderKL
from vaes import capture_part, make_vae, part_of

from rbln_vae import _engine
from rbln_vae.errors import RBLNTargetUnavailableError
from rbln_vae.graph.interpreter import Interpreter
from rbln_vae.graph.ir import (
    Activation,
    Add,
    Conv2d,
    Graph,
    GroupNorm,
    Identity,
    Modulate,
    Norm,
    Operation,
    Pad,
    Scale,
    Upsample,
)
from rbln_vae.graph.passes import optimise
from rbln_vae.targets.cpu.kernels import best_dtype, usable_kernels, warn_of_left_out
from rbln_vae.targets.cpu.packing import pack
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import Convolution

PARTS = ("encoder", "decoder")
DTYPES = ("float32", "float16", "bfloat16")


def optimised(vae: AutoencoderKL, part: str) -> Graph:
    return optimise(capture_part(vae, part))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compare(vae: AutoencoderKL, part: str, image: torch.Tensor) -> None:
    """With the kernels of every instruction set but the portable ones, if there are others."""
    expected = part_of(vae, part, image)
    graph = optimised(vae, part)
    theirs = part_of(vae.to(torch.bfloat16), part, image.to(torch.bfloat16))
    own = difference(theirs.float(), expected)
    limits = {"float32": 1e-5, "float16": own / 4, "bfloat16": own}
    isas = {each.isa for each in usable_kernels()}
    for isa in isas - {"generic"} or isas:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RBLN_VAE_ISA", isa)
            for dtype, limit in limits.items():
                found = CpuRuntime(graph, dtype=dtype).run(image)
                assert difference(found, expected) <= limit, (isa, dtype)


ARCHITECTURES = [
    ((8, 16), {}, (6, 10)),
    ((24, 40, 96), {"norm_num_groups": 8, "layers_per_block": 2}, (9, 7)),
    ((32, 64, 64), {"latent_channels": 16, "act_fn": "mish"}, (5, 12)),
    ((16, 32), {"mid_block_add_attention": False, "act_fn": "gelu"}, (20, 8)),
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("channels", "changes", "size"), ARCHITECTURES)
def test_as_exact_as_diffusers(
    part: str, channels: tuple[int, ...], changes: dict[str, object], size: tuple[int, int]
) -> None:
    vae = make_vae(block_out_channels=channels, **changes)
    scale = 2 ** (len(channels) - 1) if part == "encoder" else 1
    depth = 3 if part == "encoder" else vae.config.latent_channels
    # Whose errors are larger is a matter of luck for one small image.
    compare(vae, part, torch.randn(8, depth, size[0] * scale, size[1] * scale))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_model_of_full_size(part: str) -> None:
    vae = make_vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    compare(vae, part, torch.randn(1, *((4, 16, 24) if part == "decoder" else (3, 128, 192))))


@pytest.fixture(scope="module")
def decoder() -> Graph:
    return optimised(make_vae(block_out_channels=(16, 48), norm_num_groups=8), "decoder")


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(decoder: Graph, dtype: str) -> None:
    image = torch.randn(2, 4, 30, 21)
    results = [CpuRuntime(decoder, dtype=dtype, num_threads=n).run(image) for n in (1, 2, 3, 5)]
    assert all(torch.equal(results[0], each) for each in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_with_and_without_doubling_share_a_weight(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(8, 8, 3, 3, generator=generator) / 8}
    ones = (1, 1, 1, 1)
    operations = (
        Conv2d("a", "x", "w", None, padding=ones),
        Conv2d("y", "a", "w", None, padding=ones, upsample=True),
    )
    graph = Graph("case", ("x",), 8, ("y",), operations, weights).verify()
    image = torch.randn(1, 8, 9, 11, generator=generator)
    found = CpuRuntime(graph, dtype=dtype).run(image)
    limit = {"float32": 1e-6, "float16": 1.5e-3, "bfloat16": 1e-2}[dtype]
    assert difference(found, Interpreter(graph).run(image)) < limit


def test_many_threads_share_a_runtime(decoder: Graph) -> None:
    native = CpuRuntime(decoder, num_threads=2)
    images = [torch.randn(1, 4, 3 + i, 9 - i) for i in range(7)]
    expected = [native.run(image) for image in images]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for i in range(20):
            which = (i + offset) % len(images)
            if not torch.equal(native.run(images[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_strides_and_dtypes(decoder: Graph, dtype: torch.dtype) -> None:
    native = CpuRuntime(decoder, dtype="float32")
    image = torch.randn(2, 4, 8, 6).to(dtype)
    expected = Interpreter(decoder).run(image.float())
    wide = torch.zeros(2, 8, 16, 6, dtype=dtype)
    wide[:, ::2, ::2] = image
    for each in (image, image.to(memory_format=torch.channels_last), wide[:, ::2, ::2]):
        found = native.run(each)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert difference(found.float(), expected) < (4e-3 if dtype.itemsize == 2 else 1e-5)


def test_views_that_stand_for_the_negative_of_their_memory(decoder: Graph) -> None:
    native = CpuRuntime(decoder, dtype="float32")
    image = torch.fft.fft2(torch.randn(1, 4, 8, 6)).conj().imag
    assert image.is_neg()
    expected = native.run(image.clone())
    assert torch.equal(native.run(image), expected)
    out = torch._neg_view(torch.empty(1, 3, 16, 12))
    assert torch.equal(native.run(image, out), expected)


def test_half_precision_is_rounded_to_the_nearest() -> None:
    graph = Graph(
        "case", ("x",), 1, ("y",), (Conv2d("y", "x", "w", None),), {"w": torch.ones(1, 1, 1, 1)}
    )
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    image = torch.nan_to_num(every).view(1, 1, 256, 256)
    assert torch.equal(CpuRuntime(graph, dtype="float32").run(image), image)
    image = torch.cat([torch.randn(30_000), torch.randn(30_000) * 1e-6, torch.randn(5536) * 1e5])
    graph.weights["w"].fill_(1.0)
    rounded = image.to(torch.float16)
    found = CpuRuntime(graph, dtype="float32").run(rounded.view(1, 1, 256, 256))
    assert torch.equal(found.view(-1), rounded)


def rare_operations() -> Graph:
    torch.manual_seed(3)
    weights = {"g": torch.randn(6), "h": torch.randn(6), "w": torch.randn(6, 3, 1, 1)}
    norm = Norm(3, 1e-5, "g", "h")
    operations = (
        Identity("i", "x"),
        Conv2d("a", "i", "w", None),
        GroupNorm("b", "a", norm),
        Activation("c", "b", "gelu"),
        Scale("d", "c", 0.7, -0.2),
        Pad("e", "d", (0, 1, 2, 3)),
        Upsample("f", "e"),
        Add("g", "f", "f"),
        Modulate("h", "g", "e", None, norm),
        Modulate("j", "h", "e", "e"),
        Modulate("y", "j", "g", "f", norm),
    )
    return Graph("rare", ("x",), 3, ("y",), operations, weights).verify()


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-6), ("float16", 1.5e-3), ("bfloat16", 1e-2)]
)
def test_operations_that_no_convolution_took_in(dtype: str, limit: float) -> None:
    graph, image = rare_operations(), torch.randn(2, 3, 5, 4)
    expected = Interpreter(graph).run(image)
    assert difference(CpuRuntime(graph, dtype=dtype).run(image), expected) < limit


def modulated(factor: int, *, read_later: bool) -> Graph:
    """40 channels, with a norm, modulated by an image smaller by a factor."""
    torch.manual_seed(4)
    shapes = {"a": (40, 5, 3, 3), "s": (40, 5, 1, 1), "t": (40, 5, 1, 1), "y": (3, 40, 3, 3)}
    weights = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    weights |= {"g": torch.randn(40), "h": torch.randn(40), "z": torch.randn(40, 40, 1, 1) * 0.2}
    operations: tuple[Operation, ...] = (
        Conv2d("small", "x", "s", None, stride=factor),
        Conv2d("shift", "x", "t", None, stride=factor),
        Conv2d("a", "x", "a", None, padding=(1, 1, 1, 1)),
        Modulate("m", "a", "small", "shift", Norm(8, 1e-6, "g", "h")),
        Conv2d("z", "m", "z", None, activation="silu", residual="a" if read_later else None),
        Conv2d("y", "z", "y", None, padding=(1, 1, 1, 1)),
    )
    return Graph("modulated", ("x",), 5, ("y",), operations, weights).verify()


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 2e-6), ("float16", 1.5e-3), ("bfloat16", 1e-2)]
)
@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("read_later", [False, True])
def test_each_pixel_of_a_smaller_image_modulates_a_square(
    dtype: str, limit: float, factor: int, read_later: bool
) -> None:
    graph, image = modulated(factor, read_later=read_later), torch.randn(2, 5, 3 * factor, 24)
    runtime = CpuRuntime(graph, dtype=dtype)
    assert difference(runtime.run(image), Interpreter(graph).run(image)) < limit
    (step,) = (
        step.native
        for step in runtime.planned(tuple(image.shape)).program.steps
        if isinstance(step.native, _engine.ModulateStep)
    )
    in_place = step.output.offset == step.input.offset
    assert in_place is not read_later


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_far_from_zero(dtype: str) -> None:
    # A spread of 1 about 1000: the sum of squares alone would lose it in float32. Types of two
    # bytes can't store it, but one of a tenth of that.
    weights = {"w": torch.eye(32).view(32, 32, 1, 1), "b": torch.full((32,), 1000.0)}
    weights |= {"g": torch.ones(32), "h": torch.zeros(32)}
    norm = Norm(4, 1e-6, "g", "h")
    operations = (Conv2d("a", "x", "w", "b"), GroupNorm("y", "a", norm))
    graph = Graph("case", ("x",), 32, ("y",), operations, weights).verify()
    image = torch.randn(1, 32, 40, 40) * (1 if dtype == "float32" else 100)
    expected = torch.nn.functional.group_norm(image.double() + 1000, 4, eps=1e-6)
    assert difference(CpuRuntime(graph, dtype=dtype).run(image), expected) < (
        1e-4 if dtype == "float32" else 3e-2
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_visible(decoder: Graph, dtype: str, value: float) -> None:
    image = torch.randn(1, 4, 8, 8)
    image[0, 1, 2, 3] = value
    native = CpuRuntime(decoder, dtype=dtype)
    assert native.run(image).isnan().all()
    assert native.run(torch.randn(1, 4, 8, 8)).isfinite().all()


def test_a_run_that_takes_too_long_is_stopped(decoder: Graph) -> None:
    native = CpuRuntime(decoder, timeout=0.0)
    with pytest.raises(TimeoutError, match="timeout"):
        native.run(torch.randn(1, 4, 8, 8))
    native.timeout = 60
    assert native.run(torch.randn(1, 4, 8, 8)).isfinite().all()


def test_memory_that_is_not_there_is_an_error(decoder: Graph) -> None:
    native = CpuRuntime(decoder, memory_limit=1_000_000)
    with pytest.raises(MemoryError, match=r"memory_limit is 976\.6 KiB\. Raise it to '\d+MiB'"):
        native.run(torch.randn(1, 4, 64, 64))
    native = CpuRuntime(decoder)
    with pytest.raises(MemoryError, match=r"needs at least [\d,.]+ GiB"):
        native.run(torch.empty(1).expand(1, 4, 2**17, 2**17))
    with pytest.raises((MemoryError, ValueError)):
        native.run(torch.empty(1).expand(1, 4, 2**29, 2**29))
    assert native.run(torch.randn(1, 4, 8, 8)).isfinite().all()


def test_wrong_inputs_are_refused(decoder: Graph) -> None:
    native = CpuRuntime(decoder)
    for shape in ((4, 8, 8), (1, 3, 8, 8), (1, 4, 0, 8)):
        with pytest.raises(ValueError, match="shape"):
            native.run(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating"):
        native.run(torch.zeros(1, 4, 8, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="num_threads"):
        CpuRuntime(decoder, num_threads=0)


def test_weights_packed_before_need_no_weights(decoder: Graph) -> None:
    import dataclasses

    image = torch.randn(1, 4, 8, 8)
    bare = dataclasses.replace(
        decoder, weights={name: w.to("meta") for name, w in decoder.weights.items()}
    )
    native = CpuRuntime(bare, pack(decoder, "float32"), dtype="float32")
    assert torch.equal(native.run(image), CpuRuntime(decoder, dtype="float32").run(image))


def test_tiles_that_would_change_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": torch.randn(32, 32, 3, 3)}
    conv = Conv2d("y", "x", "w", None, padding=(1, 1, 1, 1))
    graph = Graph("case", ("x",), 32, ("y",), (conv,), weights).verify()
    monkeypatch.setattr(Convolution, "tile", lambda *_: (8, 10))
    with pytest.raises(ValueError, match="cells that don't begin"):
        CpuRuntime(graph, dtype="float32").run(torch.randn(1, 32, 40, 40))


def test_an_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in dict.fromkeys(each.isa for each in usable_kernels()):
        monkeypatch.setenv("RBLN_VAE_ISA", isa)
        assert {each.isa for each in usable_kernels()} >= {"generic", isa}
        # Where bfloat16 is only widened, float32 is as fast.
        multiplied = usable_kernels()[-1].multiplies_bfloat16
        assert best_dtype() == ("bfloat16" if multiplied else "float32")
    monkeypatch.setenv("RBLN_VAE_ISA", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        usable_kernels()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_of_float32_take_every_dtype(
    decoder: Graph, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in {each.isa for each in usable_kernels()}:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("RBLN_VAE_ISA", isa)
    machine = CpuRuntime(decoder, dtype=dtype).machine
    assert (machine.isa, machine.dtype) == (isa, dtype)
    assert machine.kernels.winograd is not None


def test_profile_has_every_step(decoder: Graph) -> None:
    native = CpuRuntime(decoder, activate_profiler=True)
    native.run(torch.randn(1, 4, 8, 8))
    (profile,) = native.profiles
    assert profile.part == "decoder"
    assert len(profile.steps) == len(native.planned((1, 4, 8, 8)).program.steps)
    assert sum(s.flops for s in profile.steps) == decoder.flops((1, 4, 8, 8))
    assert all(step.seconds >= 0 and step.bytes > 0 for step in profile.steps)


def test_unavailable_instruction_sets_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {each.isa for each in usable_kernels()}
    missing = set(_engine.instruction_sets()) - present
    if not missing:
        pytest.skip("this machine has every instruction set")
    monkeypatch.setenv("RBLN_VAE_ISA", missing.pop())
    with pytest.raises(RBLNTargetUnavailableError, match="only have"):
        usable_kernels()


def test_every_instruction_set_tells_the_limit_of_the_machine() -> None:
    for kernels in _engine.all_kernels():
        # Millions with emulated tiles under a sanitizer.
        assert 1e6 < kernels.measure_limit(1, 0.02) < 1e14


def test_a_result_may_not_overlap_itself(decoder: Graph) -> None:
    native = CpuRuntime(decoder)
    image = torch.randn(1, 4, 8, 8)
    expected = native.run(image)
    for out in (
        torch.empty(1, 3, 1, 16).expand(1, 3, 16, 16),
        torch.empty(300).as_strided((1, 3, 16, 16), (0, 16, 8, 1)),
    ):
        with pytest.raises(ValueError, match="share memory"):
            native.run(image, out)
    # Strides that lie apart, in whatever order, are taken.
    for out in (
        torch.empty(16, 3, 16, 1).permute(3, 1, 0, 2),
        torch.empty(1, 3, 32, 40)[:, :, ::2, 3:19],
    ):
        assert torch.equal(native.run(image, out), expected)


def test_a_result_may_not_overlap_the_input(decoder: Graph) -> None:
    native = CpuRuntime(decoder)
    room = torch.randn(3000)
    image = room[:256].view(1, 4, 8, 8)
    expected = native.run(image)
    with pytest.raises(ValueError, match="shares memory with the input"):
        native.run(image, room[255 : 255 + 768].view(1, 3, 16, 16))
    assert torch.equal(native.run(image, room[256 : 256 + 768].view(1, 3, 16, 16)), expected)


def test_a_build_without_kernels_for_this_processor_warns_once(
    decoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "left_out", lambda: ["abacus", "slide_rule"])
    warn_of_left_out.cache_clear()
    with pytest.warns(RuntimeWarning, match="no kernels for abacus, slide_rule, which this proc"):
        CpuRuntime(decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CpuRuntime(decoder)


def test_this_build_leaves_out_what_the_machine_has_and_no_kernels_are_for() -> None:
    known = _engine.instruction_sets()
    built = {each.isa for each in _engine.built_kernels()}
    assert set(_engine.left_out()).isdisjoint(built)
    assert set(_engine.left_out()) <= set(known)
    assert {each.isa for each in _engine.all_kernels()} <= built
