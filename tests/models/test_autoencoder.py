"""What every compiled autoencoder does, whatever its class, against diffusers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_vaes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vaes import TOLERANCE, noise

from rbln_vae import (
    RBLNAutoConfig,
    RBLNAutoencoder,
    RBLNCancelledError,
    RBLNCompileError,
    RBLNRuntimeError,
)
from rbln_vae.metrics import relative_l2
from rbln_vae.models.auto import class_for
from rbln_vae.models.autoencoder import RBLNAutoencoderModel
from rbln_vae.models.family import CLASSES
from rbln_vae.models.latents import mode

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CLASSES},
    "Wan 2.2": ("AutoencoderKLWan", tiny_vaes.WAN_2_2),
}
PLAIN = (torch.nn.Conv2d, torch.nn.SiLU, torch.nn.ReLU)
by_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def original(name: str) -> Any:
    class_name, options = MODELS[name]
    return tiny_vaes.make(class_name, **options)


@functools.cache
def compiled(name: str, **options: Any) -> RBLNAutoencoderModel:
    usual = {"target": "cpu", "dtype": "float32", "sample_size": 64}
    return RBLNAutoencoder.from_model(original(name), rbln_config={**usual, **options})


def image(name: str, batch: int, height: int, width: int) -> Tensor:
    """An image as diffusers' class takes it, with sides in latent cells."""
    factor = compiled(name).resolved_config.vae_scale_factor
    return noise(*tiny_vaes.image_shape(original(name), batch, factor * height, factor * width))


def latent(name: str, batch: int, height: int, width: int) -> Tensor:
    frames = (1,) if compiled(name).frames else ()
    return noise(
        batch, compiled(name).resolved_config.latent_channels, *frames, height, width, seed=1
    )


@torch.no_grad()
def encoded(vae: Any, x: Tensor) -> Tensor:
    """The result of `encode`: moments or latents."""
    (result,) = vae.encode(x, return_dict=False)
    return result if isinstance(result, Tensor) else result.parameters


@torch.no_grad()
def decoded(vae: Any, z: Tensor, **options: Any) -> Tensor:
    if "num_vq_embeddings" in vae.config:
        options["force_not_quantize"] = True
    return vae.decode(z, **options).sample


def test_every_class_has_a_model_in_these_tests() -> None:
    assert {class_name for class_name, _ in MODELS.values()} == set(CLASSES)
    for name in CLASSES:
        cls = class_for(name, name)
        assert cls.__name__ == f"RBLN{name}"
        assert cls.config_class.__name__ == f"RBLN{name}Config"
        assert cls.family.original_class_name == name
        assert cls.family.original_class() is getattr(diffusers, name)


# Results


@by_model
def test_the_models_of_these_tests_are_lively(name: str) -> None:
    """Else an error could be smaller than the tolerance."""
    pixels = decoded(original(name), latent(name, 1, 8, 8))
    assert pixels.std() > 0.05
    assert encoded(original(name), image(name, 1, 2, 2)).std() > 0.3


@by_model
@settings(max_examples=5, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), height=st.integers(2, 9), width=st.integers(2, 9))
def test_results_are_those_of_diffusers(name: str, batch: int, height: int, width: int) -> None:
    z = latent(name, batch, height, width)
    expected = decoded(original(name), z)
    found = decoded(compiled(name), z)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert relative_l2(found, expected) < TOLERANCE
    x = image(name, batch, height, width)
    assert relative_l2(encoded(compiled(name), x), encoded(original(name), x)) < TOLERANCE


@by_model
def test_bfloat16_is_no_further_from_float32_than_diffusers_own(name: str) -> None:
    vae, narrow = original(name), tiny_vaes.make(MODELS[name][0], **MODELS[name][1])
    narrow.to(torch.bfloat16)
    # Large enough for errors of rounding, which come by chance, to have their mean.
    z, x = latent(name, 2, 16, 16).bfloat16(), image(name, 2, 8, 8).bfloat16()
    for run, given_ in ((decoded, z), (encoded, x)):
        expected = run(vae, given_.float())
        found = run(compiled(name, dtype="bfloat16"), given_)
        assert found.dtype == torch.bfloat16
        own = relative_l2(run(narrow, given_).float(), expected)
        assert relative_l2(found.float(), expected) <= own


@by_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_computes_the_same(name: str, dtype: str) -> None:
    z, x = latent(name, 2, 3, 5), image(name, 1, 4, 2)
    limit = TOLERANCE if dtype == "float32" else 0.05
    found = compiled(name, target="reference", dtype=dtype)
    assert relative_l2(decoded(found, z), decoded(original(name), z)) < limit
    assert relative_l2(encoded(found, x), encoded(original(name), x)) < limit


@by_model
def test_images_and_latents_go_in_without_an_axis_of_frames_by_one_way_for_all(name: str) -> None:
    vae, x, z = compiled(name), image(name, 2, 2, 3), latent(name, 2, 2, 3)
    if vae.frames:
        found = vae.encode_images(x[:, :, 0])
        expected = vae.encode(x).latent_dist.mode()[:, :, 0]  # type: ignore[attr-defined]
        assert torch.equal(vae.decode_latents(z[:, :, 0]), decoded(vae, z)[:, :, 0])
    else:
        found = vae.encode_images(x)
        (result,) = vae.encode(x, return_dict=False)  # type: ignore[attr-defined]
        expected = mode(result)
        assert torch.equal(vae.decode_latents(z), decoded(vae, z))
    assert isinstance(found, Tensor) is not vae.draws
    assert torch.equal(mode(found), expected)


@by_model
def test_results_are_tuples_where_these_are_asked_for(name: str) -> None:
    vae, options = compiled(name), {}
    if "num_vq_embeddings" in vae.config:
        options = {"force_not_quantize": True}
    z = latent(name, 1, 2, 2)
    result = vae.decode(z, return_dict=False, **options)  # type: ignore[attr-defined]
    assert isinstance(result, tuple) and torch.equal(result[0], decoded(vae, z))


# Memory and place


@by_model
def test_least_memory_changes_no_bit_and_is_known_before(name: str) -> None:
    vae, z, x = compiled(name, num_threads=2), latent(name, 1, 24, 16), image(name, 1, 16, 24)
    shape = (1, z.shape[1], 24, 16)
    pixels, moments, needed = decoded(vae, z), encoded(vae, x), vae.memory_needed("decoder", shape)
    vae.enable_tiling()
    try:
        least = vae.memory_needed("decoder", shape)
        assert least <= needed
        assert torch.equal(decoded(vae, z), pixels)
        assert torch.equal(encoded(vae, x), moments)
    finally:
        vae.disable_tiling()
    assert torch.equal(decoded(vae.with_runtimes(memory_limit=least), z), pixels)
    with pytest.raises(MemoryError, match="at least"):
        decoded(vae.with_runtimes(memory_limit=least // 2), z)


@by_model
def test_images_are_written_where_the_caller_says(name: str) -> None:
    vae, z = compiled(name), latent(name, 2, 2, 3)
    expected = decoded(vae, z)
    to = torch.full_like(expected, torch.nan)
    decoded(vae, z, out=to)
    assert torch.equal(to, expected)
    array = np.zeros(expected.shape, np.float16)
    decoded(vae, z, out=array)
    assert np.array_equal(array, expected.half().numpy())
    with pytest.raises(ValueError, match="out must have the shape"):
        decoded(vae, z, out=torch.empty(1, 2, 3, 4))


@by_model
def test_a_run_can_be_stopped(name: str) -> None:
    with pytest.raises(RBLNCancelledError):
        decoded(compiled(name), latent(name, 1, 32, 32), should_stop=lambda: True)


# Keeping


@by_model
def test_a_saved_model_is_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    vae, z, x = compiled(name), latent(name, 1, 3, 4), image(name, 1, 2, 3)
    vae.save_pretrained(tmp_path)
    loaded = RBLNAutoencoder.from_pretrained(tmp_path)
    assert type(loaded) is type(vae)
    assert torch.equal(decoded(loaded, z), decoded(vae, z))
    assert torch.equal(encoded(loaded, x), encoded(vae, x))
    assert loaded.resolved_config == vae.resolved_config
    for key, value in vae.config.items():
        assert json.dumps(loaded.config[key]) == json.dumps(value)
    assert type(RBLNAutoConfig.load(tmp_path)) is type(vae).config_class


@by_model
def test_a_decoder_alone_says_that_it_cant_encode(name: str) -> None:
    vae = compiled(name, uses_encoder=False)
    assert "encoder" not in vae.compiled_models
    z = latent(name, 1, 2, 2)
    assert torch.equal(decoded(vae, z), decoded(compiled(name), z))
    with pytest.raises(RBLNRuntimeError, match="rbln_uses_encoder=True"):
        encoded(vae, image(name, 1, 1, 1))


# What is refused


@by_model
def test_an_axis_of_frames_too_many_or_too_few_is_named(name: str) -> None:
    vae, z, x = compiled(name), latent(name, 1, 2, 2), image(name, 1, 2, 2)
    advice = r"\w\.unsqueeze\(2\) adds" if vae.frames else r"\w\.squeeze\(2\) removes"
    with pytest.raises(ValueError, match=advice):
        decoded(vae, z[:, :, 0] if vae.frames else z.unsqueeze(2))
    with pytest.raises(ValueError, match=advice):
        encoded(vae, x[:, :, 0] if vae.frames else x.unsqueeze(2))


@by_model
def test_other_channels_and_types_are_refused(name: str) -> None:
    vae, z, x = compiled(name), latent(name, 1, 2, 2), image(name, 1, 2, 2)
    for run, given_ in ((decoded, z), (encoded, x)):
        with pytest.raises(ValueError, match="must have the shape"):
            run(vae, torch.cat([given_, given_], dim=1))
        with pytest.raises(ValueError, match="must have the shape"):
            run(vae, given_[:0])
        with pytest.raises(TypeError, match="floating"):
            run(vae, given_.int())
        with pytest.raises(TypeError, match="torch tensor"):
            run(vae, given_.numpy())


@by_model
def test_unknown_options_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        compiled(name, batchsize=2)


@by_model
def test_a_class_that_is_given_another_model_says_what_finds_the_right_one(name: str) -> None:
    cls = type(compiled(name))
    other = "AutoencoderTiny" if MODELS[name][0] != "AutoencoderTiny" else "VQModel"
    with pytest.raises(TypeError, match=f"RBLN{other} compiles that, and RBLNAutoencoder finds"):
        cls.from_model(original(other))
    with pytest.raises(TypeError, match=r"got Conv2d\. RBLNAutoencoder finds"):
        cls.from_model(torch.nn.Conv2d(1, 1, 1))


@by_model
def test_layers_that_cant_be_compiled_are_named_when_compiling(name: str) -> None:
    class_name, options = MODELS[name]
    vae = tiny_vaes.make(class_name, **options)
    last = [m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)][
        -1
    ]
    last.register_forward_hook(lambda module, args, output: output.sigmoid())
    where = [n for n, m in vae.decoder.named_modules() if m is last]
    if type(last).__name__.endswith("CausalConv3d"):
        return  # replaced when compiling, with what was hooked to it
    with pytest.raises(RBLNCompileError, match=f"'sigmoid' in .*{where[0]}"):
        RBLNAutoencoder.from_model(vae, rbln_target="cpu", rbln_sample_size=64)
