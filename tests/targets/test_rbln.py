"""The target `rbln`, compiled and run by the stand-in for Rebellions' compiler."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from vaes import TOLERANCE, assert_same_model, make_vae, make_vq, moments, noise, pixels

import rbln_vae.rebel
from rbln_vae import (
    RBLNArtifactError,
    RBLNAutoencoderKL,
    RBLNCancelledError,
    RBLNCompileError,
    RBLNRuntimeError,
    RBLNTargetUnavailableError,
    RBLNVQModel,
)
from rbln_vae.levels import levels_of, sample_of
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.base import default_target, get_target


@pytest.fixture
def npus(monkeypatch):
    """A machine that seems to have two NPUs."""
    monkeypatch.delitem(sys.modules, "rebel", raising=False)
    monkeypatch.setattr(rbln_vae.rebel, "_machine", rbln_vae.rebel._Machine())
    rbln_vae.rebel.install(devices=2)
    yield
    del sys.modules["rebel"]


def compile_for_npu(vae: Any, **options: Any) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_model(vae, rbln_config={"target": "rbln", **options})


def test_without_the_compiler_it_says_what_to_install():
    with pytest.raises(RBLNTargetUnavailableError, match="rebel-compiler, is not installed"):
        compile_for_npu(make_vae())
    with pytest.raises(RBLNTargetUnavailableError, match="rebel-compiler, is not installed"):
        compile_for_npu(make_vae(), create_runtimes=False)


@pytest.mark.usefixtures("npus")
def test_a_machine_with_an_npu_uses_it():
    assert default_target() is get_target("rbln")
    assert RBLNAutoencoderKL.from_model(make_vae()).rbln_config.target == "rbln"


@pytest.mark.usefixtures("npus")
def test_it_computes_what_diffusers_does_for_the_shape_it_was_compiled_for():
    vae = make_vae()
    model = compile_for_npu(vae, sample_size=(10, 8))
    assert_same_model(model, vae)
    with pytest.raises(
        ValueError, match=r"compiled for the shape \(1, 4, 5, 4\).*rbln_sample_size"
    ):
        model.decode(noise(1, 4, 4, 4))
    with pytest.raises(ValueError, match="rbln_batch_size"):
        model.decode(noise(2, 4, 5, 4))


@pytest.mark.usefixtures("npus")
def test_a_vq_model_is_compiled_too(tmp_path):
    movq, latent, image = make_vq(), noise(1, 4, 8, 8), noise(1, 3, 16, 16)
    options = {"target": "rbln", "sample_size": 16}
    model = RBLNVQModel.from_model(movq, rbln_config=options)
    model.save_pretrained(tmp_path)
    for found in (model, RBLNVQModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            expected = movq.decode(latent, force_not_quantize=True).sample
            assert relative_l2(found.encode(image).latents, movq.encode(image).latents) < TOLERANCE
        decoded = found.decode(latent, force_not_quantize=True).sample
        assert relative_l2(decoded, expected) < TOLERANCE


@pytest.mark.usefixtures("npus")
def test_the_original_is_not_changed():
    vae = make_vae().to(torch.bfloat16).train()
    compile_for_npu(vae)
    assert vae.dtype == torch.bfloat16 and vae.training


@pytest.mark.usefixtures("npus")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_input(dtype):
    model = compile_for_npu(make_vae())
    assert pixels(model, noise(1, 4, 8, 8, dtype=dtype)).dtype == dtype


@pytest.mark.usefixtures("npus")
def test_a_model_in_bfloat16_is_as_close_as_diffusers_own(monkeypatch, tmp_path):
    seen: list[Any] = []
    compile_from_torch = rbln_vae.rebel.compile_from_torch

    def compile_(module: Any, *, input_info: Any, **options: Any) -> Any:
        seen.append((input_info[0][2], {weight.dtype for weight in module.parameters()}))
        return compile_from_torch(module, input_info=input_info, **options)

    monkeypatch.setattr(rbln_vae.rebel, "compile_from_torch", compile_)
    vae, latent = make_vae(), noise(1, 4, 8, 8)
    model = compile_for_npu(vae, dtype="bfloat16")
    assert seen == [("bfloat16", {torch.bfloat16})] * 2
    vae.to(torch.bfloat16)
    expected = pixels(make_vae(), latent)
    own = relative_l2(pixels(vae, latent.bfloat16()).float(), expected)
    found = pixels(model, latent)
    assert found.dtype == torch.float32 and relative_l2(found, expected) <= own
    model.save_pretrained(tmp_path)
    loaded = RBLNAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.resolved_config.dtype == "bfloat16"
    assert torch.equal(pixels(loaded, latent), found)


@pytest.mark.usefixtures("npus")
def test_saving_and_loading(tmp_path):
    model = compile_for_npu(make_vae())
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "rbln_config.json", "encoder.rbln", "decoder.rbln"}
    again = RBLNAutoencoderKL.from_pretrained(tmp_path)
    latent = noise(1, 4, 8, 8)
    assert torch.equal(pixels(again, latent), pixels(model, latent))


@pytest.mark.usefixtures("npus")
def test_a_file_of_another_compiler_is_refused(tmp_path):
    compile_for_npu(make_vae()).save_pretrained(tmp_path / "npu")
    RBLNAutoencoderKL.from_model(make_vae(), rbln_target="cpu").save_pretrained(tmp_path / "cpu")
    file = tmp_path / "npu" / "decoder.rbln"
    file.write_bytes((tmp_path / "cpu" / "decoder.rbln").read_bytes())
    with pytest.raises(RBLNArtifactError, match="can't be read by Rebellions' compiler"):
        RBLNAutoencoderKL.from_pretrained(tmp_path / "npu")


@pytest.mark.usefixtures("npus")
def test_options_reach_the_compiler(monkeypatch):
    compiled: list[dict[str, Any]] = []
    run: list[dict[str, Any]] = []
    compile_from_torch, runtime = rbln_vae.rebel.compile_from_torch, rbln_vae.rebel.Runtime

    def compile_(module: Any, **options: Any) -> Any:
        compiled.append(options)
        return compile_from_torch(module, **options)

    def start(model: Any, **options: Any) -> Any:
        run.append(options)
        return runtime(model, **options)

    monkeypatch.setattr(rbln_vae.rebel, "compile_from_torch", compile_)
    monkeypatch.setattr(rbln_vae.rebel, "Runtime", start)
    compile_for_npu(
        make_vae(),
        batch_size=2,
        npu="RBLN-CA22",
        num_devices=2,
        device_map={"encoder": 0, "decoder": 1},
        timeout=30,
        activate_profiler=True,
    )
    shared = {"npu": "RBLN-CA22", "num_devices": 2}
    assert compiled == [
        {"input_info": [("x", [2, 3, 16, 16], "float32")], **shared},
        {"input_info": [("z", [2, 4, 8, 8], "float32")], **shared},
    ]
    common = {"tensor_type": "pt", "activate_profiler": True, "timeout": 30}
    assert run == [{"device": 0, **common}, {"device": 1, **common}]


@pytest.mark.usefixtures("npus")
def test_an_older_compiler_is_told_the_number_of_devices_by_its_name(monkeypatch):
    seen: list[dict[str, Any]] = []
    compile_from_torch = rbln_vae.rebel.compile_from_torch

    def compile_(module: Any, *, tensor_parallel_size: int, **options: Any) -> Any:
        seen.append({"tensor_parallel_size": tensor_parallel_size})
        return compile_from_torch(module, **options)

    def older(mod: Any, npu: str | None = None, tensor_parallel_size: int = 1) -> None: ...

    monkeypatch.setattr(rbln_vae.rebel, "compile", older)
    monkeypatch.setattr(rbln_vae.rebel, "compile_from_torch", compile_)
    compile_for_npu(make_vae(), uses_encoder=False)
    assert seen == [{"tensor_parallel_size": 1}]


@pytest.mark.usefixtures("npus")
def test_a_model_without_runtimes_is_compiled_where_there_is_no_npu(monkeypatch, tmp_path):
    monkeypatch.setattr(rbln_vae.rebel._machine, "devices", 0)
    vae = make_vae()
    with pytest.raises(RBLNTargetUnavailableError, match=r"finds no NPU.*create_runtimes=False"):
        compile_for_npu(vae)
    compile_for_npu(vae, create_runtimes=False, npu="RBLN-CA22").save_pretrained(tmp_path)
    monkeypatch.setattr(rbln_vae.rebel._machine, "devices", 1)
    latent = noise(1, 4, 8, 8)
    found = pixels(RBLNAutoencoderKL.from_pretrained(tmp_path), latent)
    assert relative_l2(found, pixels(vae, latent)) < TOLERANCE


@pytest.mark.usefixtures("npus")
def test_a_device_that_cannot_be_is_refused():
    with pytest.raises(RBLNRuntimeError, match=r"There is no NPU 5.*rbln-smi"):
        compile_for_npu(make_vae(), device=5)
    with pytest.raises(ValueError, match=r"device='cpu' is none of the target 'rbln'"):
        compile_for_npu(make_vae(), device="cpu")


@pytest.mark.usefixtures("npus")
def test_what_the_compiler_refuses_is_an_error_of_ours():
    vae = make_vae()
    vae.decoder.conv_act = torch.nn.Softplus()
    with pytest.raises(RBLNCompileError, match=r"can't compile the decoder.*softplus"):
        compile_for_npu(vae)


@pytest.mark.usefixtures("npus")
@pytest.mark.parametrize(("given", "expected"), [({}, 60), ({"timeout": 5}, 5)], ids=str)
def test_an_npu_that_hangs_is_given_up_after_a_minute_unless_told(monkeypatch, given, expected):
    seen: list[Any] = []
    runtime = rbln_vae.rebel.Runtime

    def start(model: Any, **options: Any) -> Any:
        seen.append(options["timeout"])
        return runtime(model, **options)

    monkeypatch.setattr(rbln_vae.rebel, "Runtime", start)
    compile_for_npu(make_vae(), uses_encoder=False, **given)
    assert seen == [expected]


@pytest.mark.usefixtures("npus")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pictures_come_and_go_as_on_other_targets(dtype):
    model = compile_for_npu(make_vae(), sample_size=(10, 8))
    latent, came = noise(1, 4, 5, 4).to(dtype), []
    found = model.decode_images(latent, on_rows=lambda first, rows: came.append((first, rows)))
    assert torch.equal(found, levels_of(pixels(model, latent)).permute(0, 2, 3, 1))
    ((first, rows),) = came
    assert first == 0
    assert torch.equal(rows, found)
    image = torch.randint(256, (1, 10, 8, 3), dtype=torch.uint8)
    sample = sample_of(image.permute(0, 3, 1, 2))
    assert torch.equal(moments(model, image), moments(model, sample))


@pytest.mark.usefixtures("npus")
def test_a_run_that_nobody_wants_is_not_begun():
    model = compile_for_npu(make_vae())
    with pytest.raises(RBLNCancelledError):
        model.decode(noise(1, 4, 8, 8), should_stop=lambda: True)


@pytest.mark.usefixtures("npus")
def test_progress_is_known_before_and_after_a_run():
    model, told = compile_for_npu(make_vae()), []
    model.decode(noise(1, 4, 8, 8), progress=lambda *work: told.append(work), memory_limit=1)
    assert told == [(0, 1000), (1000, 1000)]


@pytest.mark.usefixtures("npus")
def test_a_run_that_takes_too_long_is_given_up():
    model = compile_for_npu(make_vae(), timeout=1e-9)
    with pytest.raises(TimeoutError):
        model.decode(noise(1, 4, 8, 8))


@pytest.mark.usefixtures("npus")
def test_it_is_moved_nowhere():
    model = compile_for_npu(make_vae())
    assert model.to("cpu") is model
    with pytest.raises(RBLNRuntimeError, match="runs on NPU 0"):
        model.to("cuda")
