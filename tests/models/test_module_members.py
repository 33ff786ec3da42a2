"""What code written against a `torch.nn.Module` finds on a compiled model."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import tiny_vaes
import torch
from accelerate.utils import extract_model_from_parallel

from rbln_vae import RBLNAutoencoderKL, RBLNRuntimeError


@pytest.fixture(scope="module")
def compiled() -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_model(tiny_vaes.make(), rbln_target="cpu", rbln_dtype="float32")


@pytest.mark.parametrize(
    "call",
    [
        lambda vae: vae.to("cpu"),
        lambda vae: vae.to(torch.device("cpu")),
        lambda vae: vae.to(torch.float16),
        lambda vae: vae.to("cpu", torch.bfloat16, non_blocking=True),
        lambda vae: vae.to(dtype=torch.float32, memory_format=torch.channels_last),
        lambda vae: vae.to(torch.zeros(1)),
        lambda vae: vae.cpu(),
        lambda vae: vae.half().bfloat16().float(),
        lambda vae: vae.eval(),
        lambda vae: vae.train(False),
        lambda vae: vae.requires_grad_(False),
    ],
)
def test_what_moves_or_converts_modules_gives_the_model_itself(compiled, call):
    copied = copy.copy(compiled)
    latent = torch.randn(1, 4, 2, 2)
    assert call(copied) is copied
    assert torch.equal(copied.decode(latent).sample, compiled.decode(latent).sample)


def test_the_dtype_that_pipelines_see_is_float32_until_another_is_named(compiled):
    model = copy.copy(compiled)
    assert model.dtype is torch.float32
    for call, dtype in (
        (lambda: model.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda: model.half(), torch.float16),
        (lambda: model.to("cpu"), torch.float16),
        (lambda: model.float(), torch.float32),
        (lambda: model.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    ):
        call()
        assert model.dtype is next(model.parameters()).dtype is dtype
        assert next(model.post_quant_conv.parameters()).dtype is dtype
    with pytest.raises(TypeError, match=r"torch\.int32"):
        model.to(torch.int32)
    assert model.dtype is torch.bfloat16
    assert compiled.dtype is torch.float32


def test_dtype_and_device_are_found_in_every_way(compiled):
    for found in (
        compiled,
        next(compiled.parameters()),
        next(compiled.post_quant_conv.parameters()),
    ):
        assert found.dtype == torch.float32
        assert (
            found.device == torch.device("cpu") if found is not compiled.post_quant_conv else True
        )
    assert list(compiled.modules()) == []
    assert compiled.training is False


@pytest.mark.parametrize(
    "method", ["enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing"]
)
def test_tiling_and_slicing_change_no_pixel(compiled, method):
    latent = torch.randn(2, 4, 3, 5)
    before = compiled.decode(latent).sample
    getattr(compiled, method)()
    assert torch.equal(compiled.decode(latent).sample, before)
    assert compiled.use_tiling == (method == "enable_tiling")
    assert compiled.use_slicing == (method == "enable_slicing")
    compiled.disable_tiling()
    compiled.disable_slicing()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta", torch.device("cuda", 0)])
def test_another_device_is_refused_with_the_way_round(compiled, device):
    with pytest.raises(RBLNRuntimeError, match=r"runs on cpu, and can't be moved to .*compile"):
        compiled.to(device)


def test_training_is_refused(compiled):
    with pytest.raises(RBLNRuntimeError, match="can't be trained"):
        compiled.train()
    with pytest.raises(RBLNRuntimeError, match="no gradients"):
        compiled.requires_grad_()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("load_state_dict", "weights are compiled in"),
        ("add_adapter", "adapters can't be added"),
        ("set_attn_processor", "attention is compiled in"),
        ("enable_gradient_checkpointing", "can't be trained"),
    ],
)
def test_a_member_that_cannot_be_is_missing_and_says_why(compiled, name, reason):
    assert not hasattr(compiled, name)
    with pytest.raises(AttributeError, match=f"{name}.*{reason}"):
        getattr(compiled, name)


@pytest.mark.parametrize(
    "name", ["_hf_hook", "_diffusers_hook", "_reset_stateful_cache", "is_loaded_in_4bit", "__len__"]
)
def test_what_pipelines_probe_for_is_missing(compiled, name):
    assert not hasattr(compiled, name)


def test_keys_of_the_configuration_are_attributes_too(compiled):
    assert compiled.sample_size == compiled.config.sample_size
    assert compiled.scaling_factor == 0.18215


def test_accelerate_unwraps_it(compiled):
    assert extract_model_from_parallel(compiled) is compiled


def test_the_configuration_is_a_mapping_with_attributes(compiled):
    assert compiled.config.latent_channels == compiled.config["latent_channels"] == 4
    assert compiled.config.scaling_factor == 0.18215
    with pytest.raises(AttributeError):
        _ = compiled.config.no_such_key


def test_register_to_config_changes_the_configuration_that_is_saved(tmp_path):
    vae = RBLNAutoencoderKL.from_model(tiny_vaes.make(), rbln_target="cpu")
    vae.register_to_config(scaling_factor=0.5)
    assert vae.config.scaling_factor == 0.5
    vae.save_pretrained(tmp_path)
    assert RBLNAutoencoderKL.from_pretrained(tmp_path).config.scaling_factor == 0.5


def test_an_attribute_that_is_set_on_the_configuration_is_read_again():
    original = tiny_vaes.make()
    original.config.scaling_factor = 0.25
    vae = RBLNAutoencoderKL.from_model(original, rbln_target="cpu")
    assert vae.config.scaling_factor == vae.config["scaling_factor"] == 0.25
    vae.config.scaling_factor = 0.5
    assert vae.config.scaling_factor == copy.deepcopy(vae).config.scaling_factor == 0.5


def test_a_shallow_copy_runs(compiled):
    latent = torch.randn(1, 4, 2, 2)
    assert torch.equal(copy.copy(compiled).decode(latent).sample, compiled.decode(latent).sample)


def test_a_deep_copy_has_flags_and_a_configuration_of_its_own_and_shares_the_weights(compiled):
    latent = torch.randn(2, 4, 16, 16)
    needed = compiled.memory_needed("decoder", tuple(latent.shape))
    compiled.enable_slicing()
    copied = copy.deepcopy(compiled)
    compiled.disable_slicing()
    assert copied.use_slicing and not compiled.use_slicing
    assert copied.memory_needed("decoder", tuple(latent.shape)) < needed
    assert compiled.memory_needed("decoder", tuple(latent.shape)) == needed
    copied.register_to_config(scaling_factor=0.5)
    assert compiled.config.scaling_factor == 0.18215
    assert copied.compiled_models["decoder"] is compiled.compiled_models["decoder"]
    assert torch.equal(copied.decode(latent).sample, compiled.decode(latent).sample)


@pytest.mark.parametrize("dumps", [pickle.dumps, ForkingPickler.dumps])
def test_pickling_is_refused_and_leaves_the_model_whole(compiled, dumps):
    """The pickler of torch.multiprocessing would move the weights that the engine reads."""
    latent = torch.randn(1, 4, 2, 2)
    expected = compiled.decode(latent).sample
    with pytest.raises(TypeError, match="save_pretrained"):
        dumps(compiled)
    with pytest.raises(TypeError, match="Save it"):
        dumps(compiled.compiled_models)
    assert torch.equal(compiled.decode(latent).sample, expected)
