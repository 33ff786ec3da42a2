"""diffusers' own remote client gets from a real server what the model itself would give."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_vaes
import torch
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image, ImageChops
from services import make_app, running
from torch import Tensor
from vaes import compile_vae, default_compiled, make_vae, noise

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKL
from rbln_vae.models.autoencoder import RBLNAutoencoderModel
from rbln_vae.models.latents import mode
from rbln_vae.serving.models import ServedModel
from rbln_vae.serving.settings import Limits

SCALE, SHIFT = 0.3611, 0.1159
PROCESSOR = VaeImageProcessor(vae_scale_factor=2)

SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"do_scaling": False},
    "by the model": {"do_scaling": True},
    "scale": {"scaling_factor": 0.5},
    "scale and shift": {"scaling_factor": 0.5, "shift_factor": -0.2},
    "shift": {"shift_factor": -0.2},
}

pytestmark = pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated")


@pytest.fixture(scope="module")
def vae() -> RBLNAutoencoderKL:
    return compile_vae(make_vae(scaling_factor=SCALE, shift_factor=SHIFT))


@pytest.fixture(scope="module")
def server(vae: RBLNAutoencoderKL) -> Iterator[str]:
    models = ServedModel("flux", vae), ServedModel("other", default_compiled())
    with running(make_app(*models)) as address:
        yield address


def scaled(latent: Tensor, how: str) -> Tensor:
    """What a pipeline gives to the decoder."""
    if how == "none":
        return latent
    if how == "scale":
        return latent / 0.5
    if how == "scale and shift":
        return latent / 0.5 + -0.2
    return latent / SCALE + (SHIFT if how == "by the model" else -0.2)


def levels(sample: Tensor) -> Tensor:
    """Pixels as diffusers makes them, (N, H, W, C)."""
    images = PROCESSOR.postprocess(sample, output_type="np")
    return torch.from_numpy((images * 255).round().astype("uint8"))


def picture(sample: Tensor) -> Image.Image:
    (image,) = PROCESSOR.postprocess(sample, output_type="pil")
    return image


def assert_same_picture(found: Image.Image, expected: Image.Image) -> None:
    assert found.size == expected.size
    assert ImageChops.difference(found, expected).getbbox() is None


def as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_decode(
    server: str, vae: RBLNAutoencoderKL, dtype: torch.dtype, scaling: str, packed: bool
) -> None:
    latent = noise(1, 4, 6, 8, dtype=dtype)
    sent, options = latent, dict(SCALINGS[scaling])
    if packed:
        sent = FluxPipeline._pack_latents(latent, 1, 4, 6, 8)
        options |= {"height": 12, "width": 16}
    sample = vae.decode(scaled(latent, scaling)).sample
    assert sample.dtype == dtype

    def ask(**more: Any) -> Any:
        return remote_decode(f"{server}/decode", sent, **options, **more)

    for image_format in ("png", "jpg"):
        for half in (False, True):
            # A picture, which partial_postprocess doesn't change.
            found = ask(image_format=image_format, partial_postprocess=half)
            expected = picture(sample)
            if image_format == "jpg":
                expected = as_jpeg(expected)
                assert found.format == "jpeg"
            assert_same_picture(found, expected)

    whole = ask(output_type="pt", return_type="pt")
    assert whole.dtype == dtype
    assert torch.equal(whole, sample)
    shown = ask(output_type="pt", return_type="pil", processor=PROCESSOR)
    assert_same_picture(shown, picture(sample))

    half_done = ask(output_type="pt", return_type="pt", partial_postprocess=True)
    assert torch.equal(half_done, levels(sample))
    assert_same_picture(ask(output_type="pt", partial_postprocess=True), picture(sample))

    # With a processor as a flag, a picture comes as a tensor in [0, 1].
    (flagged,) = ask(processor=PROCESSOR)
    assert_same_picture(flagged, picture(sample))
    flagged = ask(processor=PROCESSOR, return_type="pt")
    assert torch.equal(flagged, VaeImageProcessor.denormalize(sample))


def test_decode_a_batch(server: str, vae: RBLNAutoencoderKL) -> None:
    latent = noise(3, 4, 6, 8)
    sample = vae.decode(latent).sample
    options: dict[str, Any] = {"do_scaling": False, "output_type": "pt"}
    found = remote_decode(f"{server}/decode", latent, return_type="pt", **options)
    assert torch.equal(found, sample)
    pictures = remote_decode(f"{server}/decode", latent, partial_postprocess=True, **options)
    for index, shown in enumerate(pictures):
        assert_same_picture(shown, picture(sample[index : index + 1]))


def test_decode_at_the_root_and_by_the_name_of_a_model(server: str, vae: RBLNAutoencoderKL) -> None:
    latent = noise(1, 4, 4, 4)
    options: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    for endpoint, model in (
        (f"{server}/", vae),
        (f"{server}/decode?model=flux", vae),
        (f"{server}/decode?model=other", default_compiled()),
    ):
        found = remote_decode(endpoint, latent, **options)
        assert torch.equal(found, model.decode(latent).sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("shift", [None, -0.2])
def test_encode_a_tensor(
    server: str,
    vae: RBLNAutoencoderKL,
    dtype: torch.dtype,
    scale: float | None,
    shift: float | None,
) -> None:
    image = noise(2, 3, 12, 16).clamp(-1, 1).to(dtype)
    latent = vae.encode(image).latent_dist.mode()
    latent = latent if shift is None else latent - shift
    latent = latent if scale is None else latent * scale
    found = remote_encode(f"{server}/encode", image, scaling_factor=scale, shift_factor=shift)
    assert found.dtype == dtype
    assert torch.equal(found, latent)


@pytest.mark.parametrize("size", [(16, 12), (17, 13)])
def test_encode_a_picture(server: str, vae: RBLNAutoencoderKL, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    expected = vae.encode(PROCESSOR.preprocess(image)).latent_dist.mode()
    found = remote_encode(f"{server}/encode", image)
    assert torch.equal(found, expected)
    found = remote_encode(f"{server}/encode", image, scaling_factor=SCALE, shift_factor=SHIFT)
    assert torch.equal(found, (expected - SHIFT) * SCALE)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_other_kinds_are_encoded_as_colour(
    server: str, vae: RBLNAutoencoderKL, mode: str
) -> None:
    image = Image.effect_noise((16, 12), 90).convert(mode)
    expected = vae.encode(PROCESSOR.preprocess(image.convert("RGB"))).latent_dist.mode()
    assert torch.equal(remote_encode(f"{server}/encode", image), expected)


def test_an_error_reads_well(server: str) -> None:
    with pytest.raises(RuntimeError, match=r"'code': 'wrong_shape'.*got \(1, 5, 8, 8\)"):
        remote_decode(f"{server}/decode", noise(1, 5, 8, 8), do_scaling=False)
    with pytest.raises(RuntimeError, match=r"'code': 'unknown_model'.*'flux', 'other'"):
        remote_decode(f"{server}/?model=sdxl", noise(1, 4, 8, 8), do_scaling=False)
    with pytest.raises(RuntimeError, match=r"'code': 'wrong_shape'.*one by one"):
        remote_decode(f"{server}/decode", noise(2, 4, 8, 8), do_scaling=False)
    with pytest.raises(RuntimeError, match="'code': 'wrong_shape'"):
        remote_encode(f"{server}/encode", noise(1, 3, 7, 8))


def test_the_key_goes_into_the_address() -> None:
    latent = noise(1, 4, 4, 4)
    options: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    with running(make_app(limits=Limits(api_key="s3cret"))) as address:
        keyed = address.replace("//", "//:s3cret@")
        found = remote_decode(f"{keyed}/decode", latent, **options)
        assert torch.equal(found, default_compiled().decode(latent).sample)
        with pytest.raises(RuntimeError, match="'code': 'unauthorized'"):
            remote_decode(f"{address}/decode", latent, **options)


# Models of other classes


@pytest.fixture(scope="module")
def families() -> Iterator[tuple[str, dict[str, RBLNAutoencoderModel]]]:
    names = ("AutoencoderKLQwenImage", "AutoencoderTiny", "AutoencoderKLHunyuanImage", "VQModel")
    options = {"target": "cpu", "dtype": "float32", "sample_size": 64}
    models = {
        name: RBLNAutoencoder.from_model(tiny_vaes.make(name), rbln_config=options)
        for name in names
    }
    with running(make_app(*(ServedModel(n, vae) for n, vae in models.items()))) as address:
        yield address, models


@pytest.mark.slow
def test_latents_of_one_frame_are_normalised_and_decoded_as_the_pipeline_does(
    families: tuple[str, dict[str, RBLNAutoencoderModel]],
) -> None:
    address, models = families
    vae: Any = models["AutoencoderKLQwenImage"]
    latent = noise(1, 16, 1, 4, 6)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    expected = vae.decode(latent * std + mean).sample
    where = f"{address}/decode?model=AutoencoderKLQwenImage"
    found = remote_decode(where, latent, do_scaling=True, output_type="pt",
                          return_type="pt")  # fmt: skip
    assert torch.equal(found, expected)
    picture_found = remote_decode(where, latent, do_scaling=True, image_format="png")
    assert_same_picture(picture_found, picture(expected[:, :, 0]))
    encoded = remote_encode(
        f"{address}/encode?model=AutoencoderKLQwenImage", noise(1, 3, 1, 16, 24)
    )
    assert torch.equal(encoded, vae.encode(noise(1, 3, 1, 16, 24)).latent_dist.mode())


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AutoencoderKLHunyuanImage", "VQModel"])
def test_a_model_of_another_class_answers_as_in_python(
    families: tuple[str, dict[str, RBLNAutoencoderModel]], name: str
) -> None:
    address, models = families
    vae = models[name]
    latent = noise(1, vae.resolved_config.latent_channels, 4, 6)
    found = remote_decode(f"{address}/decode?model={name}", latent, do_scaling=False,
                          output_type="pt", return_type="pt")  # fmt: skip
    assert torch.equal(found, vae.decode_latents(latent))
    image = noise(1, 3, 32, 48)
    encoded = remote_encode(f"{address}/encode?model={name}", image)
    assert torch.equal(encoded, mode(vae.encode_images(image)))
