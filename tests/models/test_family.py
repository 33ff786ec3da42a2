"""What a model is compiled for, once nothing is left open."""

from __future__ import annotations

import dataclasses

import pytest
from vaes import default_compiled

from rbln_vae.models.family import ResolvedConfig

RESOLVED = ResolvedConfig(
    target="cpu",
    dtype="bfloat16",
    batch_size=2,
    sample_size=(64, 32),
    uses_encoder=True,
    in_channels=3,
    out_channels=4,
    latent_channels=16,
    vae_scale_factor=8,
    decoder_scale_factor=8,
)


def test_each_part_has_the_shape_that_the_model_is_compiled_for() -> None:
    assert RESOLVED.parts == ("encoder", "decoder")
    assert RESOLVED.input_shapes() == {"encoder": (2, 3, 64, 32), "decoder": (2, 16, 8, 4)}


def test_a_model_without_an_encoder_has_one_part() -> None:
    decoder_alone = dataclasses.replace(RESOLVED, uses_encoder=False)
    assert decoder_alone.parts == ("decoder",)
    assert decoder_alone.input_shapes() == {"decoder": (2, 16, 8, 4)}


def test_shapes_of_another_image_and_batch() -> None:
    shapes = RESOLVED.input_shapes((16, 40), batch_size=5)
    assert shapes == {"encoder": (5, 3, 16, 40), "decoder": (5, 16, 2, 5)}


def test_an_image_that_is_no_multiple_of_the_scale_factor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"60.*8"):
        RESOLVED.input_shapes((60, 64))


def test_an_image_is_as_much_larger_than_its_latent_as_the_scale_factor_says() -> None:
    assert RESOLVED.image_shape((3, 16, 5, 7)) == (3, 4, 40, 56)


def test_parts_have_one_dtype_or_each_its_own() -> None:
    assert RESOLVED.dtype_of("encoder") == RESOLVED.dtype_of("decoder") == "bfloat16"
    own = {"encoder": "float32", "decoder": "float16"}
    assert dataclasses.replace(RESOLVED, dtype=own).dtype_of("decoder") == "float16"


def test_a_compiled_model_says_what_it_was_compiled_for() -> None:
    vae = default_compiled()
    found, config = vae.resolved_config, vae.rbln_config
    facts = (
        "out_channels",
        "decoder_scale_factor",
        "condition_channels",
        "videos",
        "decode_chunk_size",
    )
    for field in dataclasses.fields(found):
        if field.name not in facts:
            assert getattr(found, field.name) == getattr(config, field.name)
    assert found.out_channels == vae.config.out_channels
    assert found.decoder_scale_factor == found.vae_scale_factor and found.condition_channels == 0
    assert not found.videos and not found.decode_chunk_size
    assert tuple(vae.compiled_models) == found.parts
    for part, compiled in vae.compiled_models.items():
        assert compiled.part == part
        assert compiled.dtype == found.dtype
        assert compiled.in_channels == found.input_shapes()[part][1]
        assert len(compiled.source["sha256"]) == 64
