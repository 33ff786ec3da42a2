"""Between bytes and tensors: the arithmetic of diffusers' pipelines, and clear refusals."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from services import raw
from vaes import noise

from rbln_vae.levels import sample_of
from rbln_vae.models.latents import LatentScaling
from rbln_vae.serving import protocol
from rbln_vae.serving.errors import CODES, RefusedError
from rbln_vae.serving.models import ModelInfo
from rbln_vae.serving.protocol import DecodeQuery, EncodeQuery


def model(**changes: Any) -> ModelInfo:
    facts: dict[str, Any] = {
        "name": "m",
        "class_name": "AutoencoderKL",
        "frames": False,
        "frames_per_latent": None,
        "parts": ("encoder", "decoder"),
        "in_channels": 3,
        "latent_channels": 4,
        "vae_scale_factor": 8,
        "sample_size": (64, 64),
        "scaling": LatentScaling(0.5, 0.25),
        "dtype": "float32",
        "target": "cpu",
    }
    return ModelInfo(**{**facts, **changes})


def prepared(latent: torch.Tensor, info: ModelInfo | None = None, **query: Any) -> torch.Tensor:
    """What the decoder gets for a latent that was sent."""
    info = info or model()
    parsed = DecodeQuery(
        shape=list(latent.shape),
        dtype=str(latent.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        output_type="pt",
        **query,
    )
    expected = protocol.decode_input(parsed, info)
    read = expected.read(bytearray(raw(latent)))
    return protocol.prepare_latent(read, parsed, info, expected)


def refused(code: str) -> Any:
    assert code in CODES
    return pytest.raises(RefusedError, match=code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_latent_arrives_as_it_was_sent(dtype: torch.dtype) -> None:
    latent = noise(2, 4, 3, 5, dtype=dtype)
    assert torch.equal(prepared(latent), latent)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (70, 101), (16, 16)])
def test_packed_latents_are_unpacked_as_flux_does(height: int, width: int) -> None:
    packed = noise(2, (height // 16) * (width // 16), 16)
    expected = FluxPipeline._unpack_latents(packed, height, width, 8)
    assert torch.equal(prepared(packed, height=height, width=width), expected)


def test_scaling_is_that_of_pipelines() -> None:
    latent = noise(1, 4, 2, 2, dtype=torch.float16)
    assert torch.equal(prepared(latent, scaling_factor=0.3), latent / 0.3)
    assert torch.equal(prepared(latent, scaling_factor=0.3, shift_factor=0.1), latent / 0.3 + 0.1)
    assert torch.equal(prepared(latent, do_scaling=True), latent / 0.5 + 0.25)
    assert torch.equal(prepared(latent, do_scaling=True, shift_factor=0.1), latent / 0.5 + 0.1)
    assert torch.equal(prepared(latent, do_scaling=False), latent)


def test_scaling_by_the_model_uses_its_statistics_if_it_has_any() -> None:
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.5, 2.0, 0.5, 1.0)
    info = model(scaling=LatentScaling(0.5, latents_mean=mean, latents_std=std))
    latent = noise(1, 4, 2, 2)
    by_channel = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    expected = latent * by_channel[1] / 0.5 + by_channel[0]
    assert torch.equal(prepared(latent, info, do_scaling=True), expected)


def test_scaling_by_a_model_that_doesnt_know_its_own_is_refused() -> None:
    info = model(scaling=LatentScaling(known=False))
    latent = noise(1, 4, 2, 2)
    with refused("unknown_scaling"):
        prepared(latent, info, do_scaling=True)
    with refused("unknown_scaling"):
        prepared(latent, info, do_scaling=True, shift_factor=0.1)
    assert torch.equal(prepared(latent, info), latent)
    assert torch.equal(prepared(latent, info, do_scaling=True, scaling_factor=0.3), latent / 0.3)


FLUX2 = LatentScaling(
    latents_mean=tuple(0.1 * i for i in range(16)),
    latents_std=tuple(1 + 0.1 * i for i in range(16)),
    patch_size=2,
)


def test_latents_in_patches_are_unscaled_as_flux_2_does() -> None:
    """As they come from the denoiser, whole or packed; unscaled ones have no patches."""
    info, scaled = model(scaling=FLUX2), noise(2, 16, 3, 4)
    mean, std = (torch.tensor(v).view(1, 16, 1, 1) for v in (FLUX2.latents_mean, FLUX2.latents_std))
    expected = Flux2Pipeline._unpatchify_latents(scaled * std + mean)
    torch.testing.assert_close(prepared(scaled, info, do_scaling=True), expected)
    packed = Flux2Pipeline._pack_latents(scaled)
    found = prepared(packed, info, do_scaling=True, height=3 * 16, width=4 * 16)
    torch.testing.assert_close(found, expected)
    assert torch.equal(prepared(expected, info), expected)


def test_latents_without_patches_are_refused_where_scaled_ones_are_said_to_come() -> None:
    query = DecodeQuery(shape=[1, 4, 8, 8], dtype="float32", do_scaling=True)
    with refused("wrong_shape"):
        protocol.decode_input(query, model(scaling=FLUX2))
    expected = protocol.decode_input(
        query.model_copy(update={"shape": [1, 16, 4, 4]}), model(scaling=FLUX2)
    )
    assert expected.model_shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    "shape",
    [(4, 8, 8), (1, 5, 8, 8), (1, 4, 8), (1, 4, 8, 8, 1), (8, 8), (1, 0, 8, 8), (-1, 4, 8, 8)],
)
def test_refuses_latents_of_other_shapes(shape: tuple[int, ...]) -> None:
    with refused("wrong_shape"):
        protocol.decode_input(DecodeQuery(shape=list(shape), dtype="float32"), model())


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [((1, 16, 16), None, None), ((1, 16, 16), 64, None), ((1, 16, 16), 64, 80), ((1, 4, 16), 8, 8)],
)
def test_refuses_packed_latents_that_dont_fit(
    shape: tuple[int, ...], height: int | None, width: int | None
) -> None:
    query = DecodeQuery(shape=list(shape), dtype="float32", height=height, width=width)
    with refused("wrong_shape"):
        protocol.decode_input(query, model())


def test_refuses_a_picture_of_several_images() -> None:
    with pytest.raises(RefusedError, match="output_type=pt"):
        protocol.decode_input(DecodeQuery(shape=[2, 4, 8, 8], dtype="float32"), model())


@pytest.mark.parametrize("length", [0, 1, 1023, 1025, 4096])
def test_refuses_bytes_that_dont_fit_the_shape(length: int) -> None:
    expected = protocol.decode_input(DecodeQuery(shape=[1, 4, 8, 8], dtype="float32"), model())
    assert expected.bytes == 1024
    with pytest.raises(RefusedError, match=f"1,024 bytes, and the body has {length:,}"):
        expected.read(bytearray(length))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_isnt_finite(value: float) -> None:
    latent = noise(1, 4, 2, 2)
    latent[0, 1, 1, 1] = value
    with refused("not_finite"):
        prepared(latent)


def test_a_result_that_isnt_finite_is_no_picture_but_can_be_had() -> None:
    sample = torch.full((1, 3, 8, 8), float("nan"))
    picture = DecodeQuery(shape=[1, 4, 1, 1], dtype="float32")
    pictures = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    with refused("not_finite"):
        protocol.picture_reply(pictures, False, picture)
    with refused("not_finite"):
        protocol.sample_reply(sample, picture)
    tensor = picture.model_copy(update={"output_type": "pt"})
    with refused("not_finite"):
        protocol.picture_reply(pictures, False, tensor)
    assert protocol.sample_reply(sample, tensor).body == raw(sample)


@pytest.mark.parametrize(
    ("output_type", "partial", "accept", "shown"),
    [
        ("pil", False, "", True),
        ("pil", False, "tensor/binary", False),
        ("pt", False, "tensor/binary", False),
        ("pt", True, "tensor/binary", True),
    ],
)
def test_a_model_decodes_to_pictures_where_these_are_shown(
    output_type: Any, partial: bool, accept: str, shown: bool
) -> None:
    query = DecodeQuery(
        shape=[1, 4, 1, 1],
        dtype="float32",
        output_type=output_type,
        partial_postprocess=partial,
    )
    assert protocol.output_of(query, accept) == ("pictures" if shown else "sample")


def test_one_channel_is_a_grey_picture_and_a_fourth_is_the_opacity() -> None:
    query = DecodeQuery(shape=[1, 4, 1, 1], dtype="float32", image_format="png")
    for channels, mode in ((1, "L"), (4, "RGBA")):
        levels = torch.randint(256, (1, 8, 8, channels), dtype=torch.uint8)
        shown = Image.open(io.BytesIO(protocol.picture_reply(levels, True, query).body))
        pixels = torch.tensor(list(shown.tobytes()), dtype=torch.uint8)
        assert shown.mode == mode
        assert torch.equal(pixels, levels.flatten())
    with refused("wrong_shape"):
        protocol.picture_reply(torch.ones(1, 8, 8, 2, dtype=torch.uint8), True, query)
    jpeg = query.model_copy(update={"image_format": "jpg"})
    with pytest.raises(RefusedError, match="image_format=png"):
        protocol.picture_reply(torch.ones(1, 8, 8, 4, dtype=torch.uint8), True, jpeg)


# Models whose latents and images have an axis of frames


def video(**changes: Any) -> ModelInfo:
    return model(class_name="AutoencoderKLQwenImage", frames=True, **changes)


def test_a_latent_of_one_frame_arrives_without_its_axis_and_unscaled_by_the_model() -> None:
    statistics = LatentScaling(latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.5,) * 4)
    latent = noise(2, 4, 1, 3, 5)
    found = prepared(latent, video(scaling=statistics), do_scaling=True)
    expected = latent * 0.5 + torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(found, expected.squeeze(2))
    assert torch.equal(prepared(latent.squeeze(2), video()), latent.squeeze(2))


def test_packed_latents_are_unpacked_as_qwen_image_does() -> None:
    latent = noise(2, 4, 6, 4)
    packed = QwenImagePipeline._pack_latents(latent, 2, 4, 6, 4)
    found = prepared(packed, video(), height=48, width=32)
    assert torch.equal(found, latent)


def test_the_result_has_an_axis_of_frames_if_the_latent_had() -> None:
    sample = noise(1, 3, 8, 8)
    for shape, expected in (([1, 4, 1, 1, 1], "[1, 3, 1, 8, 8]"), ([1, 4, 1, 1], "[1, 3, 8, 8]")):
        query = DecodeQuery(shape=shape, dtype="float32", output_type="pt")
        assert protocol.sample_reply(sample, query).headers["shape"] == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([1, 3, 1, 8, 8], "[1, 4, 1, 1, 1]"),
        ([1, 3, 8, 8], "[1, 4, 1, 1]"),
        (None, "[1, 4, 1, 1, 1]"),
    ],
)
def test_encoded_latents_have_an_axis_of_frames_unless_the_image_has_none(
    shape: list[int] | None, expected: str
) -> None:
    query = EncodeQuery() if shape is None else EncodeQuery(shape=shape, dtype="float32")
    taken = protocol.encode_input(query, video())
    assert taken is None or taken.model_shape == (1, 3, 8, 8)
    reply = protocol.encode_reply(noise(1, 4, 1, 1), query, video())
    assert reply.headers["shape"] == expected


def test_several_frames_are_refused_and_so_is_an_axis_that_the_model_has_not() -> None:
    with pytest.raises(RefusedError, match="one frame"):
        prepared(noise(1, 4, 2, 3, 5), video())
    with pytest.raises(RefusedError, match="one frame"):
        protocol.encode_input(EncodeQuery(shape=[1, 3, 5, 8, 8], dtype="float32"), video())
    with refused("wrong_shape"):
        prepared(noise(1, 4, 1, 3, 5))
    with refused("wrong_shape"):
        protocol.encode_input(EncodeQuery(shape=[1, 3, 1, 8, 8], dtype="float32"), model())


def test_a_picture_is_opaque_for_a_model_with_opacity() -> None:
    file = io.BytesIO()
    Image.effect_noise((8, 8), 90).convert("RGB").save(file, "PNG")
    assert protocol.encode_input(EncodeQuery(), model(in_channels=4)) is None
    found = protocol.read_picture(bytearray(file.getvalue()), model(in_channels=4))
    plain = protocol.read_picture(bytearray(file.getvalue()), model())
    assert torch.equal(found[:, :3], plain)
    assert torch.equal(found[:, 3:], torch.full((1, 1, 8, 8), 255, dtype=torch.uint8))


def test_a_picture_is_scaled_as_by_diffusers() -> None:
    picture = Image.effect_noise((29, 18), 90).convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG")
    found = protocol.read_picture(bytearray(file.getvalue()), model())
    expected = VaeImageProcessor(vae_scale_factor=model().vae_scale_factor).preprocess(picture)
    assert found.dtype == torch.uint8
    assert torch.equal(sample_of(found), expected)


def test_a_tensor_to_encode_needs_shape_and_dtype() -> None:
    with refused("invalid_query"):
        protocol.encode_input(EncodeQuery(shape=[1, 3, 8, 8]), model())
    with refused("invalid_query"):
        protocol.encode_input(EncodeQuery(dtype="float32"), model())


def test_refuses_images_that_the_encoder_doesnt_take() -> None:
    with refused("wrong_shape"):
        protocol.encode_input(EncodeQuery(shape=[1, 4, 8, 8], dtype="float32"), model())
    with pytest.raises(RefusedError, match="16"):
        protocol.encode_input(EncodeQuery(shape=[1, 3, 8, 13], dtype="float32"), model())
    with refused("wrong_shape"):
        protocol.encode_input(EncodeQuery(), model(in_channels=2))


def test_a_picture_is_taken_down_to_a_size_that_the_model_takes() -> None:
    assert protocol.fitted_size((65, 31), model()) == (64, 24)
    with refused("wrong_shape"):
        protocol.fitted_size((64, 7), model())


@pytest.mark.parametrize("body", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(100)])
def test_refuses_what_is_no_picture(body: bytes) -> None:
    with refused("not_an_image"):
        protocol.picture_size(bytearray(body))


def test_refuses_a_picture_that_breaks_off() -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "PNG")
    body = bytearray(file.getvalue()[:-500])
    assert protocol.picture_size(body) == (64, 64)
    with refused("not_an_image"):
        protocol.read_picture(body, model())


def test_encoded_latents_are_scaled_as_pipelines_do() -> None:
    latent = noise(1, 4, 2, 2)
    query = EncodeQuery(scaling_factor=0.3, shift_factor=0.1)
    reply = protocol.encode_reply(latent, query, model())
    assert reply.body == raw((latent - 0.1) * 0.3)
    assert reply.headers == {"shape": "[1, 4, 2, 2]", "dtype": "float32"}
