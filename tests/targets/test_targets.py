"""The targets: which there are, which run here, and which one a model is placed on."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from diffusers import AutoencoderKL
from vaes import (
    assert_same_model,
    compile_vae,
    default_compiled,
    default_vae,
    make_vae,
    noise,
    pixels,
)

from rbln_vae import RBLNAutoencoderKL, RBLNModelConfig, RBLNTargetUnavailableError
from rbln_vae.config import DTYPES, TARGETS
from rbln_vae.host import usable_memory
from rbln_vae.metrics import relative_l2
from rbln_vae.models.autoencoder_kl import AutoencoderKLFamily
from rbln_vae.targets.base import Target, all_targets, default_target, get_target

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def place(**options) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_model(default_vae(), rbln_config=options)


# The registry


def test_the_targets_are_those_that_a_configuration_may_name():
    assert {target.name for target in all_targets()} == set(TARGETS)
    assert set(TARGETS) == {"cpu", "cuda", "rbln", "reference"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_found_by_its_name_and_says_what_it_is(name):
    target = get_target(name)
    assert isinstance(target, Target)
    assert target.name == name
    assert target.description
    assert target.best_dtype() in DTYPES
    assert get_target(name) is target


def test_an_unknown_target_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="no target 'tpu'; there are cpu, cuda, rbln, reference"):
        get_target("tpu")


def test_only_the_npu_holds_to_the_compiled_shape():
    assert {target.name for target in all_targets() if target.static_shapes} == {"rbln"}


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_processor_is_always_there(name):
    assert get_target(name).unavailable_reason() is None
    get_target(name).require()


# Memory


@pytest.mark.parametrize("name", ["cpu", "reference", "rbln"])
def test_a_target_without_memory_of_its_own_has_that_of_the_machine(name):
    assert get_target(name).usable_memory(get_target(name).default_device()) == usable_memory()


def test_a_gpu_has_memory_of_its_own(monkeypatch):
    sizes = {"cuda": 8 * 2**30, "cuda:1": 24 * 2**30}
    monkeypatch.setattr(type(get_target("cuda")), "unavailable_reason", lambda self: None)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(total_memory=sizes[device]),
    )
    for device, size in sizes.items():
        assert get_target("cuda").usable_memory(device) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_run_has_the_memory_of_its_device_unless_told(name, monkeypatch):
    vae = place(target=name, dtype="float32")
    needed = vae.memory_needed("decoder", (1, 4, 4, 4))
    assert vae.usable_memory == usable_memory()
    monkeypatch.setattr(type(get_target(name)), "usable_memory", lambda self, device: needed)
    small = place(target=name, dtype="float32")
    assert small.usable_memory == needed
    small.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(MemoryError, match="memory_limit is"):
        small.decode(torch.zeros(1, 4, 16, 16))
    place(target=name, dtype="float32", memory_limit="1GiB").decode(torch.zeros(1, 4, 16, 16))


# Those that can't run here


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without Rebellions' compiler."""
    monkeypatch.setitem(sys.modules, "rebel", None)
    find = "rbln_vae.targets.rbln.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name, *_: None)


@pytest.mark.usefixtures("no_compiler")
def test_without_the_compiler_of_the_npu_the_error_says_what_to_install():
    with pytest.raises(RBLNTargetUnavailableError, match=r"'rbln' can't run here.*rebel-compiler"):
        place(target="rbln")
    assert "target='cpu'" in str(get_target("rbln").unavailable_reason())


@needs_no_gpu
def test_without_a_gpu_the_error_says_what_to_install():
    with pytest.raises(RBLNTargetUnavailableError, match=r"'cuda' can't run here.*Install"):
        place(target="cuda", dtype="float32")
    assert "target='cpu'" in str(get_target("cuda").unavailable_reason())


@pytest.mark.parametrize(
    ("built_for", "expected"), [(None, "CUDA build of torch"), ("13.0", "NVIDIA's driver")]
)
def test_the_reason_tells_a_wrong_torch_from_a_missing_gpu(monkeypatch, built_for, expected):
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert expected in str(get_target("cuda").unavailable_reason())


@pytest.mark.usefixtures("no_compiler")
def test_it_is_said_before_the_work_not_after_it(monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("nothing is captured for a target that can't run")

    monkeypatch.setattr(AutoencoderKLFamily, "module", never)
    with pytest.raises(RBLNTargetUnavailableError):
        place(target="rbln")


@needs_no_gpu
def test_a_model_is_compiled_for_a_gpu_that_is_not_here(tmp_path):
    place(target="cuda", dtype="float32", create_runtimes=False).save_pretrained(tmp_path)
    loaded = RBLNAutoencoderKL.from_pretrained(tmp_path, rbln_create_runtimes=False)
    assert loaded.rbln_config.target == "cuda"
    with pytest.raises(RBLNTargetUnavailableError, match="'cuda' can't run here"):
        RBLNAutoencoderKL.from_pretrained(tmp_path)


# The default


def test_the_default_is_the_processor_where_there_is_no_npu(monkeypatch):
    monkeypatch.setattr(type(get_target("rbln")), "unavailable_reason", lambda self: "none here")
    assert default_target() is get_target("cpu")
    assert place().rbln_config.target == "cpu"


def test_the_default_is_the_npu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(type(get_target("rbln")), "unavailable_reason", lambda self: None)
    assert default_target() is get_target("rbln")


def test_the_compiler_of_the_npu_alone_is_no_npu(monkeypatch):
    rebel = types.ModuleType("rebel")
    rebel.device_count = lambda: 0
    rebel.get_npu_name = lambda *_: None
    monkeypatch.setitem(sys.modules, "rebel", rebel)
    monkeypatch.setattr("rbln_vae.targets.rbln.importlib.util.find_spec", lambda *_: object())
    assert default_target() is get_target("cpu")


# Placement


@pytest.mark.parametrize(
    "options",
    [
        {"device": 0},
        {"device": 3},
        {"device_map": {"encoder": 0, "decoder": 1}},
        {"npu": "RBLN-CA22"},
        {"num_devices": 2},
        {"tensor_parallel_size": 2},
        {"target": "rbln", "device": 1},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_compiler")
def test_what_only_an_npu_has_asks_for_one(options):
    with pytest.raises(RBLNTargetUnavailableError, match="'rbln'"):
        place(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda"},
        {"device": "cuda:1"},
        {"device_map": {"encoder": "cuda:0", "decoder": "cuda:1"}},
    ],
    ids=str,
)
@needs_no_gpu
def test_a_gpu_asks_for_the_target_cuda(options):
    with pytest.raises(RBLNTargetUnavailableError, match="'cuda'"):
        place(**options, dtype="float32")


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"device_map": {"encoder": "cpu", "decoder": "cpu"}},
        {"device_map": {"decoder": "cpu"}},
        {"target": "reference", "device": "cpu"},
    ],
    ids=str,
)
def test_the_processor_is_a_device_too(options):
    model = place(**options, dtype="float32")
    assert model.rbln_config.target == options.get("target", "cpu")
    assert_same_model(model, default_vae())


@pytest.mark.parametrize(
    "options",
    [
        {"target": "cpu", "device": "cuda:0"},
        {"target": "cpu", "device": 0},
        {"target": "reference", "device": 0},
        {"target": "cpu", "device_map": {"encoder": "cpu", "decoder": "cuda"}},
        {"target": "cpu", "device_map": {"decoder": 1}},
    ],
    ids=str,
)
def test_a_device_of_another_target_is_an_error_before_the_work(monkeypatch, options):
    monkeypatch.setattr(AutoencoderKLFamily, "module", None)
    with pytest.raises(ValueError, match=r"is none of the target '(cpu|reference)'.*on 'cpu'"):
        place(**options)


def test_devices_of_two_targets_are_an_error():
    with pytest.raises(ValueError, match="are of several targets"):
        place(device_map={"encoder": "cpu", "decoder": 0})


def test_a_device_of_another_target_is_an_error_while_loading(tmp_path):
    default_compiled().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device=0 is none of the target 'cpu'"):
        RBLNAutoencoderKL.from_pretrained(tmp_path, rbln_device=0)


def test_a_device_for_a_part_that_there_is_not_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'decode' is no compiled part.*'decoder'"):
        place(target="cpu", device_map={"decode": "cpu"})
    with pytest.raises(ValueError, match="'encoder' is no compiled part"):
        place(target="cpu", uses_encoder=False, device_map={"encoder": "cpu"})


@pytest.mark.parametrize(
    ("option", "value"), [("npu", "RBLN-CA22"), ("num_devices", 2), ("tensor_parallel_size", 2)]
)
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_an_option_of_the_npu_is_an_error_elsewhere(target, option, value):
    with pytest.raises(ValueError, match=f"is for target='rbln', not for '{target}'"):
        place(target=target, **{option: value})


def test_one_device_is_no_option_of_the_npu():
    assert place(target="cpu", dtype="float32", num_devices=1).rbln_config == RBLNModelConfig.copy(
        default_compiled().rbln_config
    )


def float16_of_large_values(factor: float) -> tuple[AutoencoderKL, RBLNAutoencoderKL]:
    """A model whose first convolution is multiplied, and the reference in float16."""
    vae = make_vae()
    for weight in vae.decoder.conv_in.parameters():
        weight.data.mul_(factor)
    return vae, compile_vae(vae, target="reference", dtype="float16")


def test_the_reference_runs_images_again_that_float16_cannot_hold():
    vae, model = float16_of_large_values(3e7)
    latents = noise(2, 4, 8, 6)
    latents[1] *= 1e-6
    with pytest.warns(RuntimeWarning, match="beyond the range"):
        found = model.decode(latents).sample
    assert found.isfinite().all()
    assert relative_l2(found[:1], pixels(vae, latents[:1])) < 0.05
    assert torch.equal(found[1:], model.decode(latents[1:]).sample)


def test_the_reference_keeps_images_within_the_range_of_float16(recwarn):
    vae, model = float16_of_large_values(1e5)
    latents = noise(1, 4, 8, 6)
    assert relative_l2(model.decode(latents).sample, pixels(vae, latents)) < 0.005
    assert not [each for each in recwarn if "float16" in str(each.message)]
