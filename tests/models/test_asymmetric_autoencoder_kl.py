"""Inpainting decoders: with and without image and mask, in pipelines that look at the class."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_vaes
import torch
from diffusers import AsymmetricAutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vaes import TOLERANCE, noise

from rbln_vae import RBLNAsymmetricAutoencoderKL
from rbln_vae.metrics import relative_l2

OPTIONS = {"target": "cpu", "dtype": "float32"}


def compile_asymmetric(vae: Any, **options: Any) -> RBLNAsymmetricAutoencoderKL:
    return RBLNAsymmetricAutoencoderKL.from_model(vae, rbln_config={**OPTIONS, **options})


ORIGINAL = tiny_vaes.make("AsymmetricAutoencoderKL")


@functools.cache
def ours() -> RBLNAsymmetricAutoencoderKL:
    return compile_asymmetric(ORIGINAL)


def condition(batch: int, height: int, width: int) -> dict[str, Tensor]:
    mask = (noise(batch, 1, 8 * height, 8 * width, seed=3) > 0).float()
    return {"image": noise(batch, 3, 8 * height, 8 * width, seed=2), "mask": mask}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), height=st.integers(1, 7), width=st.integers(1, 7))
def test_the_condition_is_that_of_diffusers(batch: int, height: int, width: int) -> None:
    z, given_ = noise(batch, 4, height, width), condition(batch, height, width)
    expected = ORIGINAL.decode(z, **given_).sample
    assert relative_l2(ours().decode(z, **given_).sample, expected) < TOLERANCE
    assert relative_l2(ours().decode(z).sample, expected) > 0.1, "the condition changes nothing"


def test_a_mask_may_be_between_0_and_1() -> None:
    z, given_ = noise(1, 4, 4, 4), condition(1, 4, 4)
    given_["mask"] = noise(1, 1, 32, 32).sigmoid()
    expected = ORIGINAL.decode(z, **given_).sample
    assert relative_l2(ours().decode(z, **given_).sample, expected) < TOLERANCE


@pytest.mark.parametrize("left_out", ["image", "mask"])
def test_half_a_condition_is_none_as_in_diffusers(left_out: str) -> None:
    z, given_ = noise(1, 4, 4, 4), condition(1, 4, 4)
    del given_[left_out]
    assert torch.equal(ours().decode(z, **given_).sample, ours().decode(z).sample)


def test_one_condition_serves_a_batch() -> None:
    z, given_ = noise(2, 4, 3, 4), condition(1, 3, 4)
    both = ours().decode(z, **given_).sample
    for i in range(2):
        assert torch.equal(both[i : i + 1], ours().decode(z[i : i + 1], **given_).sample)


def test_arguments_have_the_order_of_diffusers() -> None:
    z, given_ = noise(1, 4, 2, 2), condition(1, 2, 2)
    (found,) = ours().decode(z, None, given_["image"], given_["mask"], False)
    assert torch.equal(found, ours().decode(z, **given_).sample)


def test_a_result_with_a_condition_is_written_where_the_caller_says() -> None:
    z, given_ = noise(1, 4, 2, 2), condition(1, 2, 2)
    out = torch.empty(1, 3, 16, 16)
    ours().decode(z, **given_, out=out)
    assert torch.equal(out, ours().decode(z, **given_).sample)


@pytest.mark.parametrize("changes", [{"image": (1, 3, 16, 24)}, {"mask": (1, 3, 16, 16)}])
def test_conditions_of_other_shapes_are_refused(changes: dict[str, tuple[int, ...]]) -> None:
    given_ = {**condition(1, 2, 2), **{name: noise(*shape) for name, shape in changes.items()}}
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must have the shape"):
        ours().decode(noise(1, 4, 2, 2), **given_)


def test_pipelines_take_it_for_the_class_of_diffusers() -> None:
    assert isinstance(ours(), AsymmetricAutoencoderKL)
    assert type(ours()).__name__ == "RBLNAsymmetricAutoencoderKL"
    assert ours().config.block_out_channels == ORIGINAL.config.block_out_channels
    assert ours().dtype == torch.float32 and ours().device == torch.device("cpu")
    assert list(ours().modules()) == []
    assert ours().to("cpu", torch.float32) is ours()
    assert "decode" in dir(ours())


def test_an_image_is_encoded_and_decoded_again_with_its_mask() -> None:
    given_ = condition(1, 3, 3)
    with torch.no_grad():
        expected = ORIGINAL(given_["image"], given_["mask"]).sample
    assert relative_l2(ours()(given_["image"], given_["mask"]).sample, expected) < TOLERANCE


def test_every_part_is_saved_and_loaded(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    assert {f.stem for f in tmp_path.glob("*.rbln")} == {
        "encoder",
        "decoder",
        "conditioned_decoder",
    }
    loaded = RBLNAsymmetricAutoencoderKL.from_pretrained(tmp_path)
    z, given_ = noise(1, 4, 3, 3), condition(1, 3, 3)
    assert torch.equal(loaded.decode(z, **given_).sample, ours().decode(z, **given_).sample)


def test_a_decoder_of_other_levels_runs_without_a_condition() -> None:
    options = {
        **tiny_vaes.DEFAULTS["AsymmetricAutoencoderKL"],
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "up_block_out_channels": (8, 12, 16),
    }
    vae = AsymmetricAutoencoderKL(**options).eval().requires_grad_(False)
    found = compile_asymmetric(vae)
    z = noise(1, 4, 3, 4)
    expected = vae.decode(z).sample
    assert expected.shape == (1, 3, 12, 16)  # the encoder halves three times
    assert relative_l2(found.decode(z).sample, expected) < TOLERANCE
    with pytest.raises(ValueError, match="takes no image and mask"):
        found.decode(z, image=noise(1, 3, 12, 16), mask=noise(1, 1, 12, 16))
