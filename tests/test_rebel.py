"""`rbln_vae.rebel`, as a client of Rebellions' compiler sees it."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import rbln_vae.rebel as rebel
from rbln_vae import RBLNArtifactError, RBLNCompileError, RBLNRuntimeError

INPUT = ("x", [1, 3, 8, 8], "float32")


@pytest.fixture
def conv() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 3, padding=1)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(rebel, "_machine", rebel._Machine())
    monkeypatch.delitem(sys.modules, "rebel", raising=False)
    yield
    sys.modules.pop("rebel", None)


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
    dataclasses.replace(compiled.artifact, source={}).save(tmp_path / "other.rbln")
    with pytest.raises(RBLNArtifactError, match="not compiled through rebel"):
        rebel.RBLNCompiledModel(tmp_path / "other.rbln")


def test_the_machine_is_what_install_says():
    rebel.install(npu="RBLN-CR03", devices=2)
    assert sys.modules["rebel"] is rebel
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


def test_it_runs_a_script_or_a_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, rebel; print(rebel.get_npu_name(), *sys.argv[1:])")
    start = [sys.executable, "-m", "rbln_vae.rebel"]
    for command in ([*start, str(script), "one"], [*start, "-m", "script", "one"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert result.stdout.split() == ["RBLN-CA22", "one"]
    result = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode and "usage" in result.stderr
