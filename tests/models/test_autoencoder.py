"""What every compiled autoencoder does, whatever its class, against diffusers."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_vaes
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
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
DTYPES = ("float32", "float16", "bfloat16")
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
def encoded(vae: Any, x: Tensor, **options: Any) -> Tensor:
    """The result of `encode`: moments or latents."""
    (result,) = vae.encode(x, return_dict=False, **options)
    return result if isinstance(result, Tensor) else result.parameters


@torch.no_grad()
def decoded(vae: Any, z: Tensor, **options: Any) -> Tensor:
    if "num_vq_embeddings" in vae.config:
        options["force_not_quantize"] = True
    if type(vae).__name__.endswith("TemporalDecoder"):
        options["num_frames"] = 1
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
@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_what_may_be_given_by_position_is_what_diffusers_takes(name: str, method: str) -> None:
    def by_position(model: Any) -> list[str]:
        parameters = inspect.signature(getattr(model, method)).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    theirs = by_position(original(name))
    assert by_position(compiled(name))[: len(theirs)] == theirs


@by_model
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_images_have_any_size_that_diffusers_encodes(name: str, data: st.DataObject) -> None:
    vae, factor = original(name), compiled(name).resolved_config.vae_scale_factor
    height, width = (data.draw(st.integers(2 * factor, 4 * factor)) for _ in range(2))
    x = noise(*tiny_vaes.image_shape(vae, 1, height, width))
    try:
        expected = encoded(vae, x)
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match=f"{height}x{width} is no image size of this model"):
            encoded(compiled(name), x)
    else:
        found = encoded(compiled(name), x)
        assert found.shape == expected.shape and relative_l2(found, expected) < TOLERANCE


@pytest.mark.slow
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
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_computes_the_same(name: str, dtype: str) -> None:
    z, x = latent(name, 2, 3, 5), image(name, 1, 4, 2)
    limit = {"float32": TOLERANCE, "float16": 0.01, "bfloat16": 0.05}[dtype]
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
    vae, options = compiled(name), dict[str, Any]()
    if "num_vq_embeddings" in vae.config:
        options = {"force_not_quantize": True}
    if name == "AutoencoderKLTemporalDecoder":
        options = {"num_frames": 1}
    z = latent(name, 1, 2, 2)
    result = vae.decode(z, return_dict=False, **options)  # type: ignore[attr-defined]
    assert isinstance(result, tuple) and torch.equal(result[0], decoded(vae, z))


# Pictures


def processed(sample: Tensor) -> Tensor:
    """What diffusers' image processor shows of a result: uint8, channels last."""
    with_frames = sample.dim() == 5
    images = VaeImageProcessor().postprocess(
        sample[:, :, 0] if with_frames else sample, output_type="pil"
    )
    levels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    return levels.unsqueeze(1) if with_frames else levels


@by_model
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_pictures_are_those_of_diffusers_image_processor(
    name: str, target: str, dtype: str
) -> None:
    vae = compiled(name, target=target, dtype=dtype)
    for given_ in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        z = latent(name, 2, 3, 4).to(given_)
        found = vae.decode_images(z)
        assert found.is_contiguous()
        assert torch.equal(found, processed(decoded(vae, z)))
        if vae.frames:
            assert torch.equal(vae.decode_images(z[:, :, 0]), found[:, 0])


@by_model
def test_pictures_are_written_where_the_caller_says(name: str) -> None:
    vae, z = compiled(name), latent(name, 2, 2, 3)
    expected = vae.decode_images(z)
    out = torch.zeros_like(expected)
    assert vae.decode_images(z, out=out) is out or torch.equal(out, expected)
    array = np.zeros((*expected.shape[:-1], 5), np.uint8)[..., 1:-1]
    if expected.shape[-1] == 3:
        vae.decode_images(z, out=array)
        assert np.array_equal(array, expected.numpy())
    with pytest.raises(ValueError, match="out must have the shape"):
        vae.decode_images(z, out=torch.empty(1, 2, 3, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="out must hold uint8"):
        vae.decode_images(z, out=expected.float())
    with pytest.raises(TypeError, match="out must hold uint8"):
        vae.decode_images(z, out=np.zeros(expected.shape, np.int8))  # type: ignore[arg-type]


@pytest.mark.slow
@by_model
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_rows_of_pictures_come_once_and_from_the_top(name: str, target: str) -> None:
    vae, z, came = compiled(name, target=target), latent(name, 2, 16, 3), list[Tensor]()
    expected, firsts = vae.decode_images(z), list[int]()

    def on_rows(first: int, rows: Tensor) -> None:
        firsts.append(first)
        came.append(rows.clone())

    vae.enable_tiling()
    try:
        vae.decode_images(z, on_rows=on_rows)
    finally:
        vae.disable_tiling()
    assert torch.equal(torch.cat(came, dim=-3), expected)
    assert firsts == [sum(rows.shape[-3] for rows in came[:i]) for i in range(len(came))]


@by_model
def test_a_run_for_pictures_can_be_stopped(name: str) -> None:
    def refuse(first: int, rows: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(RBLNCancelledError):
        compiled(name).decode_images(latent(name, 1, 32, 32), should_stop=lambda: True)
    for target in ("cpu", "reference"):
        with pytest.raises(ZeroDivisionError):
            compiled(name, target=target).decode_images(latent(name, 1, 2, 2), on_rows=refuse)
    with pytest.raises(TypeError, match="on_rows must be a function"):
        compiled(name).decode_images(latent(name, 1, 2, 2), on_rows=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_values_that_are_not_finite_are_told(target: str) -> None:
    vae, z = compiled("AutoencoderKL", target=target), latent("AutoencoderKL", 2, 2, 2)
    z[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="aren't finite"):
        found = vae.decode_images(z)
    assert not found[1].any()
    assert torch.equal(found[:1], vae.decode_images(z[:1]))
    finite = torch.zeros(2, dtype=torch.bool)
    assert torch.equal(vae.decode_images(z, finite=finite), found)
    assert finite.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"bool tensor of the shape \(2,\)"):
        vae.decode_images(z, finite=torch.ones(2))


def test_pictures_may_have_a_condition() -> None:
    vae: Any = compiled("AsymmetricAutoencoderKL")
    z, picture = latent("AsymmetricAutoencoderKL", 1, 2, 3), noise(1, 3, 16, 24)
    mask = (noise(1, 1, 16, 24, seed=2) > 0).float()
    expected = processed(vae.decode(z, image=picture, mask=mask).sample)
    assert torch.equal(vae.decode_images(z, image=picture, mask=mask), expected)
    assert not torch.equal(vae.decode_images(z), expected)


def pictures(name: str, batch: int, height: int, width: int) -> Tensor:
    """Pictures as `encode` takes them, with sides in latent cells."""
    shape = image(name, batch, height, width).shape
    return torch.randint(256, (shape[0], *shape[2:], shape[1]), dtype=torch.uint8)


@by_model
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_pictures_are_encoded_as_diffusers_image_processor_takes_them(
    name: str, target: str, dtype: str
) -> None:
    vae, given_ = compiled(name, target=target, dtype=dtype), pictures(name, 2, 2, 3)
    levels = given_[:, 0] if vae.frames else given_
    files = [Image.fromarray(each.numpy()) for each in levels]
    sample = VaeImageProcessor(vae_scale_factor=1).preprocess(files)
    found, expected = (
        encoded(vae, given_),
        encoded(vae, sample.unsqueeze(2) if vae.frames else sample),
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(mode(vae.encode_images(levels)), mode(vae.encode_images(sample)))


@by_model
def test_pictures_in_another_order_are_refused_with_the_right_one(name: str) -> None:
    vae, x = compiled(name), pictures(name, 1, 2, 2)
    order = (0, 4, 1, 2, 3) if vae.frames else (0, 3, 1, 2)
    back = r"permute\(0, 2, 3, 4, 1\)" if vae.frames else r"permute\(0, 2, 3, 1\)"
    with pytest.raises(ValueError, match=rf"channels last.*x\.{back} moves"):
        encoded(vae, x.permute(order))
    with pytest.raises(ValueError, match="channels last"):
        encoded(vae, x[..., :2])
    advice = r"unsqueeze\(1\) adds" if vae.frames else r"squeeze\(1\) removes"
    with pytest.raises(ValueError, match=advice):
        encoded(vae, x[:, 0] if vae.frames else x.unsqueeze(1))
    if vae.frames and not vae.resolved_config.videos:
        with pytest.raises(ValueError, match="has 2 frames"):
            encoded(vae, x.expand(-1, 2, -1, -1, -1))


# Memory and place


@pytest.mark.slow
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
    # The limit of one run.
    assert torch.equal(decoded(vae, z, memory_limit=least), pixels)
    assert torch.equal(encoded(vae, x, memory_limit="1GiB"), moments)
    if name in ("AutoencoderKL", "AutoencoderKLWan"):  # with statistics of the image, and without
        with pytest.raises(MemoryError, match="at least"):
            decoded(vae, z, memory_limit=least // 2)


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


@by_model
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_a_run_tells_how_far_it_is(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbln_vae.targets.watch._PATIENCE", 0.0)
    vae, z, x = compiled(name, target=target), latent(name, 2, 8, 8), image(name, 2, 8, 8)
    runs = [
        lambda progress: decoded(vae, z, progress=progress),
        lambda progress: encoded(vae, x, progress=progress),
        lambda progress: vae.decode_images(z, progress=progress),
    ]
    for run in runs:
        told: list[tuple[int, int]] = []
        run(lambda *work, told=told: told.append(work))
        assert told[0] == (0, 2000) and told[-1] == (2000, 2000)
        assert told == sorted(told)
        assert {total for _, total in told} == {2000}
        assert target == "cpu" or len(set(told)) > 10  # each step of each image
    with pytest.raises(TypeError, match="progress must be a function, and is a int"):
        decoded(vae, z, progress=1)
    with pytest.raises(ZeroDivisionError):
        decoded(vae, z, progress=lambda done, total: done // 0)


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


@pytest.mark.slow
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
