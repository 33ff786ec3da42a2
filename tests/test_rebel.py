"""`rbln_vae.rebel`, as a client of Rebellions' compiler sees it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import rbln_vae.rebel as rebel
from rbln_vae import RBLNArtifactError, RBLNCompileError, RBLNRuntimeError
from rbln_vae.artifact import Artifact

INPUT = ("x", [1, 3, 8, 8], "float32")


@pytest.fixture
def conv() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 3, padding=1)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(rebel, "_machine", rebel._Machine())
    names = ("rebel", "rebel.compile_context")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in names:
        sys.modules.pop(name, None)


def test_a_model_is_compiled_saved_loaded_and_run(conv, tmp_path):
    compiled = rebel.compile_from_torch(conv, input_info=[INPUT], npu="RBLN-CA22", num_devices=1)
    assert isinstance(compiled, rebel.RBLNCompiledModel)
    compiled.save(tmp_path / "conv.rbln")
    image = torch.randn(1, 8, 8, 3).permute(0, 3, 1, 2)
    for source in (compiled, rebel.RBLNCompiledModel(tmp_path / "conv.rbln")):
        runtime = rebel.Runtime(source, tensor_type="pt", device=0, timeout=10)
        assert torch.allclose(runtime(image), conv(image), atol=1e-6)
    arrays = rebel.Runtime(tmp_path / "conv.rbln")
    assert np.allclose(arrays.run(image.numpy()), conv(image).detach().numpy(), atol=1e-6)


def test_a_result_that_stands_in_a_tuple_is_one_tensor(conv):
    class Tuple(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.conv(x),)

    runtime = rebel.Runtime(rebel.compile_from_torch(Tuple(), [INPUT]), tensor_type="pt")
    assert isinstance(runtime(torch.randn(1, 3, 8, 8)), torch.Tensor)


@pytest.mark.parametrize(
    "image", [torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.float64)]
)
def test_another_shape_or_dtype_is_refused(conv, image):
    runtime = rebel.Runtime(rebel.compile_from_torch(conv, [INPUT]), tensor_type="pt")
    with pytest.raises(RBLNRuntimeError, match=r"compiled for the shape \(1, 3, 8, 8\)"):
        runtime(image)


@pytest.mark.parametrize(
    "info",
    [
        [],
        [INPUT, INPUT],
        [("x", [1, 3], "float32")],
        [("x", [1, 3, 8, 8], "int64")],
    ],
    ids=["none", "two", "two axes", "integers"],
)
def test_what_is_no_image_is_not_compiled(conv, info):
    with pytest.raises(RBLNCompileError, match="one input"):
        rebel.compile_from_torch(conv, input_info=info)


class Start(torch.nn.Module):
    """Keeps an input, and doesn't read another."""

    def forward(self, x: torch.Tensor, unread: torch.Tensor, kept: torch.Tensor) -> object:
        return x, [write(kept, x)], kept


class Add(torch.nn.Module):
    """Adds what is kept, weighted, and keeps the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> object:
        total = x + kept * self.weight
        return total, [write(kept, total)]


def write(cache: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    place, axis = torch.tensor(0, dtype=torch.int16), torch.tensor(1, dtype=torch.int16)
    return torch.ops.rbln_custom_ops.rbln_cache_update(cache, state, place, axis)


X, KEPT = ("x", [1, 3], "float32"), ("kept", [1, 3], "float32")


@pytest.fixture
def pair() -> list[rebel.RBLNCompiledModel]:
    """`Start` and `Add`, whose `kept` is the same memory."""
    context = rebel.CompileContext(use_weight_sharing=True)
    kept, x = torch.zeros(1, 3), torch.zeros(1, 3)
    context.mark_static_address(kept, "kept")
    context.mark_static_address(kept)
    start = rebel.compile_from_torch(
        Start(), [X, X, KEPT], example_inputs=(x, x, kept), compile_context=context
    )
    module = Add()
    add = rebel.compile_from_torch(
        module, [X, KEPT], npu=None, example_inputs=(x, kept), compile_context=context
    )
    with torch.no_grad():
        module.weight.zero_()  # what is compiled keeps the weights that it was compiled with
    return [start, add]


def runtimes(models: list[rebel.RBLNCompiledModel]) -> list[rebel.Runtime]:
    return [rebel.Runtime(model, tensor_type="pt") for model in models]


@pytest.mark.parametrize("loaded", [False, True])
def test_modules_of_a_context_share_memory_that_lasts_from_run_to_run(pair, loaded, tmp_path):
    if loaded:
        rebel.install(trust_files=True)
        for name, model in zip(["start", "add"], pair, strict=True):
            model.save(tmp_path / name)
        pair = [rebel.RBLNCompiledModel(tmp_path / name) for name in ("start", "add")]
    start, add = runtimes(pair)
    one = torch.ones(1, 3)
    assert torch.equal(add(one)[0], one), "memory begins as zeros"
    assert torch.equal(start(5 * one)[0], 5 * one)
    assert torch.equal(add(one)[0], 11 * one)
    result, written = add(one)
    assert torch.equal(result, 23 * one)
    assert written.numel() == 0


def test_runtimes_of_the_same_models_have_memory_of_their_own(pair):
    start, add = runtimes(pair)
    other_start, other_add = runtimes(pair)
    one = torch.ones(1, 3)
    start(one)
    other_start(2 * one)
    assert torch.equal(add(one)[0], 3 * one)
    assert torch.equal(other_add(one)[0], 5 * one)


def test_results_do_not_change_with_what_they_are_views_of(pair):
    start, add = runtimes(pair)
    image = torch.ones(1, 3)
    same, _, kept = start(image)
    image.zero_()
    add(torch.ones(1, 3))
    assert same.unique() == 1 and kept.unique() == 1


class Rows(torch.nn.Module):
    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(6) + kept  # traced without contiguous(), as the example is


def test_strides_of_an_input_of_a_context_do_not_matter():
    inputs = (torch.zeros(2, 3), torch.zeros(6))
    info = [("x", [2, 3], "float32"), ("kept", [6], "float32")]
    context = rebel.CompileContext()
    compiled = rebel.compile_from_torch(
        Rows(), info, example_inputs=inputs, compile_context=context
    )
    turned = torch.arange(6.0).view(3, 2).T
    found = rebel.Runtime(compiled, tensor_type="pt")(turned, torch.zeros(6))
    assert torch.equal(found, turned.reshape(6))


def test_a_run_is_given_what_is_read_and_not_static(pair):
    start, _ = runtimes(pair)
    assert pair[0].inputs == [((1, 3), torch.float32)]
    with pytest.raises(RBLNRuntimeError, match=r"Start for 1x3 torch.float32> takes 1 inputs.*3"):
        start(*[torch.ones(1, 3)] * 3)
    with pytest.raises(RBLNRuntimeError, match="compiled for the shape"):
        start(torch.ones(2, 3))


def test_a_module_of_a_context_has_no_timeout_and_no_profiler(pair):
    for options in ({"timeout": 1.0}, {"activate_profiler": True}):
        with pytest.raises(RBLNRuntimeError, match="CompileContext"):
            rebel.Runtime(pair[0], **options)
    assert rebel.Runtime(pair[0]).profiles == []


class Paged(torch.nn.Module):
    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> object:
        return torch.ops.rbln_custom_ops.paged_attn_decode(x, kept)


class Wide(torch.nn.Module):
    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> object:
        return write(kept, torch.cat([x, x]).tile(2))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Paged(), "paged_attn_decode"),
        (Wide(), r"a state of shape \(2, 6\) into a cache of shape \(1, 3\)"),
    ],
    ids=["an operation of the compiler", "a state that does not fit"],
)
def test_what_a_context_has_not_is_refused_by_name(module, message):
    inputs = (torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(RBLNCompileError, match=message):
        rebel.compile_from_torch(
            module, [X, KEPT], example_inputs=inputs, compile_context=rebel.CompileContext()
        )


def test_a_module_of_a_context_needs_examples():
    with pytest.raises(RBLNCompileError, match="example_inputs"):
        rebel.compile_from_torch(Add(), [X, KEPT], compile_context=rebel.CompileContext())


def test_a_damaged_file_of_a_context_is_refused(pair, tmp_path):
    file = tmp_path / "add.rbln"
    pair[1].save(file)
    data = bytearray(file.read_bytes())
    weight = torch.full((3,), 2.0).numpy().tobytes()
    data[data.index(weight)] ^= 1
    file.write_bytes(data)
    rebel.install(trust_files=True)
    with pytest.raises(RBLNArtifactError, match="damaged"):
        rebel.RBLNCompiledModel(file)


def test_a_file_that_can_hold_code_is_read_only_if_files_are_trusted(pair, tmp_path):
    pair[1].save(tmp_path / "add.rbln")
    with pytest.raises(RBLNArtifactError, match=r"install\(trust_files=True\)"):
        rebel.RBLNCompiledModel(tmp_path / "add.rbln")


def test_errors_are_runtime_errors_that_optimum_rbln_catches(conv):
    with pytest.raises(RuntimeError, match="softplus"):
        rebel.compile_from_torch(torch.nn.Sequential(conv, torch.nn.Softplus()), [INPUT])
    compiled = rebel.compile_from_torch(conv, [INPUT])
    with pytest.raises(RuntimeError, match="There is no NPU 1"):
        rebel.Runtime(compiled, device=1)
    with pytest.raises(RuntimeError, match="There is no NPU 1"):
        rebel.Runtime(compiled, device=[0, 1])


def test_a_file_that_was_not_compiled_through_rebel_is_refused(conv, tmp_path):
    compiled = rebel.compile_from_torch(conv, [INPUT])
    assert isinstance(compiled.artifact, Artifact)
    dataclasses.replace(compiled.artifact, source={}).save(tmp_path / "other.rbln")
    with pytest.raises(RBLNArtifactError, match="not compiled through rebel"):
        rebel.RBLNCompiledModel(tmp_path / "other.rbln")


def test_the_machine_is_what_install_says():
    rebel.install(npu="RBLN-CR03", devices=2)
    assert sys.modules["rebel"] is rebel
    context = importlib.import_module("rebel.compile_context")
    assert context.CompileContext is rebel.CompileContext
    assert (rebel.device_count(), rebel.get_npu_name(), rebel.get_npu_name(1)) == (
        2,
        "RBLN-CR03",
        "RBLN-CR03",
    )
    assert rebel.get_npu_name(2) is None and not rebel.npu_is_available(2)
    rebel.install(devices=0)
    assert rebel.get_npu_name() is None


def test_install_refuses_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="rbln"):
        rebel.install(target="rbln")
    monkeypatch.setitem(sys.modules, "rebel", types.ModuleType("rebel"))
    with pytest.raises(RuntimeError, match="imported already"):
        rebel.install()


def test_the_number_of_devices_has_the_name_that_clients_look_for():
    assert "num_devices" in inspect.signature(rebel.compile).parameters


@pytest.mark.slow
def test_it_runs_a_script_or_a_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, rebel; print(rebel.get_npu_name(), *sys.argv[1:])")
    start = [sys.executable, "-m", "rbln_vae.rebel"]
    for command in ([*start, str(script), "one"], [*start, "-m", "script", "one"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert result.stdout.split() == ["RBLN-CA22", "one"]
    result = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode and "usage" in result.stderr
