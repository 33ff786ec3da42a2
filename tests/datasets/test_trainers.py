"""Caches of trainers: names, keys, types, and the pixels that each trainer would encode."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny_vaes
import torch
from pictures import digests, photograph
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from vaes import compile_vae

from rbln_vae import RBLNAutoencoderKLFlux2
from rbln_vae.datasets import Options, Summary, TooManyRejectedError, encode_dataset, estimate
from rbln_vae.datasets.seeds import seed_of
from rbln_vae.datasets.trainers import TRAINERS
from rbln_vae.errors import RBLNDatasetError
from rbln_vae.metrics import relative_l2

SD = {"format": "sd-scripts", "aspect": True, "bucket_step": 16, "min_bucket": 32}
MUSUBI = {"format": "musubi", "aspect": True, "architecture": "z-image"}
TOOLKIT = {"format": "ai-toolkit", "aspect": True}
SIZE = (96, 96)
SCALING = {
    "sd": (4, 0.18215, None),
    "sdxl": (4, 0.13025, None),
    "sd3": (16, 1.5305, 0.0609),
    "flux": (16, 0.3611, 0.1159),
    "lumina": (16, 0.3611, 0.1159),
    "z-image": (16, 0.3611, 0.1159),
}


def make(architecture: str) -> Any:
    """A diffusers model as that of an architecture, but for its size."""
    if architecture.startswith("flux2"):
        return tiny_vaes.make("AutoencoderKLFlux2", 0, latent_channels=32)
    channels, factor, shift = SCALING[architecture]
    options = {"scaling_factor": factor, "shift_factor": shift}
    return tiny_vaes.make("AutoencoderKL", 0, latent_channels=channels, **options)


def compiled(architecture: str) -> Any:
    vae = make(architecture)
    if architecture.startswith("flux2"):
        config = {"target": "cpu", "dtype": "float32"}
        return RBLNAutoencoderKLFlux2.from_model(vae, rbln_config=config)
    return compile_vae(vae)


def run(folder: Path, out: Path | None = None, model: Any = None, **options: Any) -> Summary:
    made = Options(**{"sizes": (SIZE,), **options})
    model = model or compiled(str(made.architecture))
    return encode_dataset(folder, out or folder, model, made)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in folders: one to shrink, one to enlarge."""
    (tmp_path / "in" / "more").mkdir(parents=True)
    photograph().crop((0, 0, 210, 130)).save(tmp_path / "in" / "wide.png")
    photograph().crop((100, 50, 151, 133)).save(tmp_path / "in" / "more" / "tall.png")
    return tmp_path / "in"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118


def distribution(vae: Any, pixels: np.ndarray) -> Any:
    """What diffusers gives for levels `(H, W, 3)` in float32."""
    sample = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(sample).latent_dist


def drawn(found: Any, key: str, suffix: str = "", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed, "sample" + suffix, key))
    noise = torch.randn(found.mean.shape[1:], generator=generator)
    return (found.mean + found.std * noise)[0]


def center(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width, :3])


def covering(path: Path, bucket: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    """An image scaled and cropped as sd-scripts and musubi-tuner do it; `bucket` is `(w, h)`."""
    image = Image.open(path).convert(mode)
    ratio = max(bucket[0] / image.width, bucket[1] / image.height)
    size = int(image.width * ratio + 0.5), int(image.height * ratio + 0.5)
    if ratio > 1:
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_AREA)


# sd-scripts


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd", "sdxl"])
def test_sd_scripts_reads_plain_keys_of_unscaled_draws(folder: Path, architecture: str) -> None:
    run(folder, architecture=architecture, **SD)
    vae = make(architecture)
    for key, name, size, bucket in (
        ("wide.png", "wide_0210x0130", (210, 130), (112, 80)),
        ("more/tall.png", "more/tall_0051x0083", (51, 83), (80, 112)),
    ):
        found = arrays(folder / f"{name}_{architecture}.npz")
        assert set(found) == {"latents", "original_size", "crop_ltrb"}
        latents = found["latents"]
        assert latents.dtype == np.float32 and found["crop_ltrb"].dtype == np.float64
        assert latents.shape == (4, bucket[1] // 8, bucket[0] // 8)
        assert found["original_size"].dtype == np.int64
        assert found["original_size"].tolist() == list(size)
        pixels = center(covering(folder / key, bucket), *bucket)
        expected = drawn(distribution(vae, pixels), key)
        assert relative_l2(torch.from_numpy(latents), expected) < 1e-4


def test_sd_scripts_conditions_on_the_border_around_the_image_in_its_bucket(folder: Path) -> None:
    run(folder, architecture="sdxl", **SD)
    # 80 * 210 / 130 = 129.23 is wider than the bucket, so width decides: 112 * 130 / 210 = 69.33.
    crop = arrays(folder / "wide_0210x0130_sdxl.npz")["crop_ltrb"]
    assert crop.tolist() == [0.0, 5.0, 112.0, 5.0 + 112 / (210 / 130)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd3", "flux", "lumina"])
def test_sd_scripts_keeps_resolutions_beside_each_other(folder: Path, architecture: str) -> None:
    model, options = compiled(architecture), {**SD, "architecture": architecture}
    run(folder, model=model, **options, flip=True, alpha_mask=True)
    first = arrays(folder / f"wide_0210x0130_{architecture}.npz")
    names = {"latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask"}
    assert set(first) == {f"{name}_10x14" for name in names}
    assert first["alpha_mask_10x14"].dtype == np.float32
    assert (first["alpha_mask_10x14"] == np.ones((80, 112))).all()
    run(folder, model=model, **options, sizes=((64, 64),))
    both = arrays(folder / f"wide_0210x0130_{architecture}.npz")
    assert all((both[name] == first[name]).all() for name in first)
    assert "latents_6x10" in both and "latents_flipped_6x10" not in both
    # Without masks, none is left: one that is there switches the masked loss on.
    run(folder, model=model, **options)
    last = arrays(folder / f"wide_0210x0130_{architecture}.npz")
    assert "alpha_mask_10x14" not in last and "latents_6x10" in last


@pytest.mark.parametrize(("architecture", "scaled"), [("sd3", False), ("flux", True)])
def test_sd_scripts_wants_latents_of_flux_scaled_and_of_sd3_not(
    folder: Path, architecture: str, scaled: bool
) -> None:
    run(folder, architecture=architecture, **SD, flip=True)
    found = arrays(folder / f"wide_0210x0130_{architecture}.npz")
    vae = make(architecture)
    pixels = center(covering(folder / "wide.png", (112, 80)), 112, 80)
    for name, suffix in (("latents", ""), ("latents_flipped", "_flipped")):
        shown = np.ascontiguousarray(pixels[:, ::-1]) if suffix else pixels
        expected = drawn(distribution(vae, shown), "wide.png", suffix)
        if scaled:
            expected = (expected - 0.1159) * 0.3611
        assert relative_l2(torch.from_numpy(found[f"{name}_10x14"]), expected) < 1e-4


def test_sd_scripts_scales_opacity_with_the_image_if_it_keeps_it(tmp_path: Path) -> None:
    image = np.array(photograph().crop((0, 0, 200, 200)).convert("RGBA"))
    image[..., 3] = np.linspace(0, 255, 200).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[:60, :60]).save(tmp_path / "b.png")  # enlarged, by another filter
    for masked in (True, False):
        run(tmp_path, architecture="sd", **SD, alpha_mask=masked)
        for name, size in (("a", 200), ("b", 60)):
            found = arrays(tmp_path / f"{name}_{size:04d}x{size:04d}_sd.npz")
            scaled = covering(tmp_path / f"{name}.png", SIZE, "RGBA" if masked else "RGB")
            expected = drawn(distribution(make("sd"), center(scaled, *SIZE)), f"{name}.png")
            assert relative_l2(torch.from_numpy(found["latents"]), expected) < 1e-4
            assert ("alpha_mask" in found) == masked
            if masked:
                assert (found["alpha_mask"] == scaled[..., 3].astype(np.float32) / 255).all()


@pytest.mark.parametrize(
    ("size", "scaled", "bucket"),
    [
        ((100, 50), (100, 50), (96, 48)),  # small enough: its own size, rounded down
        ((300, 100), (144, 48), (144, 48)),
        ((100, 300), (48, 144), (48, 144)),
        ((210, 130), (103, 64), (96, 64)),
    ],
)
def test_sd_scripts_without_enlarging_rounds_the_side_that_is_nearer(
    size: tuple[int, int], scaled: tuple[int, int], bucket: tuple[int, int]
) -> None:
    options = Options(sizes=((80, 96),), architecture="sd", upscale=False, **SD)
    assert options.trainer is not None
    place = options.trainer.place(size[::-1])
    assert (place.scaled[::-1], place.size[::-1]) == (scaled, bucket)


def test_sd_scripts_prefers_an_old_file_and_a_warning_says_so(folder: Path) -> None:
    (folder / "wide.npz").touch()
    with pytest.warns(UserWarning, match=r"prefers wide\.npz"):
        run(folder, architecture="sd", **SD)


# musubi-tuner


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_musubi_names_size_and_dtype_in_the_key(folder: Path, dtype: str) -> None:
    run(folder, latent_dtype=dtype, **MUSUBI)
    found, metadata = tensors(folder / "wide_0210x0130_zi.safetensors")
    latent = found.pop(f"latents_1x10x14_{dtype}")
    assert not found and latent.shape == (16, 10, 14) and str(latent.dtype) == f"torch.{dtype}"
    assert metadata == {
        "architecture": "z_image",
        "width": "210",
        "height": "130",
        "format_version": "1.0.1",
    }
    pixels = center(covering(folder / "wide.png", (112, 80)), 112, 80)
    expected = distribution(make("z-image"), pixels).mean[0]
    assert relative_l2(latent.float(), expected) < (1e-4 if dtype == "float32" else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "short", "full"),
    [
        ("flux2-dev", "f2d", "flux_2_dev"),
        ("flux2-klein-4b", "f2k4b", "flux_2_klein_4b"),
        ("flux2-klein-9b", "f2k9b", "flux_2_klein_9b"),
    ],
)
def test_musubi_keeps_means_of_flux2_in_patches_and_normalised(
    folder: Path, architecture: str, short: str, full: str
) -> None:
    run(folder, **{**MUSUBI, "architecture": architecture})
    found, metadata = tensors(folder / f"more/tall_0051x0083_{short}.safetensors")
    assert metadata["architecture"] == full and set(found) == {"latents_7x5_float32"}
    vae = make(architecture)
    mean = distribution(vae, center(covering(folder / "more/tall.png", (80, 112)), 80, 112)).mean
    patches = torch.nn.functional.pixel_unshuffle(mean, 2)[0]
    average, variance = (
        values.view(-1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var)
    )
    expected = (patches - average) / torch.sqrt(variance + vae.config.batch_norm_eps)
    assert relative_l2(found["latents_7x5_float32"], expected) < 1e-4


def test_musubi_scales_with_opacity_and_drops_it_then(tmp_path: Path) -> None:
    image = np.array(photograph().crop((0, 0, 60, 60)).convert("RGBA"))
    image[..., 3] = np.linspace(0, 255, 60).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    run(tmp_path, **MUSUBI)
    found, _ = tensors(tmp_path / "a_0060x0060_zi.safetensors")
    pixels = center(covering(tmp_path / "a.png", SIZE, "RGBA"), *SIZE)
    expected = distribution(make("z-image"), pixels).mean[0]
    assert relative_l2(found["latents_1x12x12_float32"], expected) < 1e-4


def test_musubi_without_enlarging_keeps_small_images(folder: Path) -> None:
    run(folder, **MUSUBI, upscale=False)
    found, _ = tensors(folder / "more/tall_0051x0083_zi.safetensors")
    assert set(found) == {"latents_1x10x6_float32"}


# AI Toolkit


def toolkit_name(stem: str, info: dict[str, Any]) -> str:
    digest = hashlib.md5(json.dumps(info, sort_keys=True).encode()).digest()
    code = base64.urlsafe_b64encode(digest).decode().replace("=", "")
    return f"_latent_cache/{stem}_{code}.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "version", "step"),
    [
        ("sd", "sd1", 16),
        ("sdxl", "sdxl", 16),
        ("sd3", "sd3", 32),
        ("flux", "flux1", 32),
        ("z-image", "zimage", 16),
        ("flux2-dev", "flux2", 16),
        ("flux2-klein-4b", "flux2_klein_4b", 16),
        ("flux2-klein-9b", "flux2_klein_9b", 16),
    ],
)
def test_toolkit_finds_a_cache_by_the_hash_of_its_settings(
    folder: Path, architecture: str, version: str, step: int
) -> None:
    run(folder, architecture=architecture, flip=True, **TOOLKIT)
    width, height = (112, 80) if step == 16 else (96, 96)
    scaled = (130, 80) if step == 16 else (156, 96)
    info: dict[str, Any] = {
        "filename": "wide.png",
        "scale_to_width": scaled[0],
        "scale_to_height": scaled[1],
        "crop_x": (scaled[0] - width) // 2,
        "crop_y": (scaled[1] - height) // 2,
        "crop_width": width,
        "crop_height": height,
        "latent_space_version": version,
        "latent_version": 1,
    }
    vae = make(architecture)
    image = Image.open(folder / "wide.png")
    for suffix, more in (("", {}), ("_flipped", {"flip_x": True})):
        found, metadata = tensors(folder / toolkit_name("wide", {**info, **more}))
        assert set(found) == {"latent"} and found["latent"].dtype == torch.float32
        assert metadata.pop("format") == "pt"
        assert metadata.pop("filename") == "wide.png"
        assert metadata.pop("latent_space_version") == version
        assert {k: json.loads(v) for k, v in metadata.items()} == {
            k: v for k, v in {**info, **more}.items() if k in metadata
        }
        shown = ImageOps.mirror(image) if suffix else image
        pixels = np.asarray(shown.resize(scaled, Image.Resampling.BICUBIC))
        left, top = info["crop_x"], info["crop_y"]
        pixels = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        latents = distribution(vae, pixels)
        if architecture.startswith("flux2"):
            patches = torch.nn.functional.pixel_unshuffle(latents.mean, 2)[0]
            average, variance = (
                v.view(-1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var)
            )
            expected = (patches - average) / torch.sqrt(variance + vae.config.batch_norm_eps)
        else:
            _, factor, shift = SCALING[architecture]
            expected = (drawn(latents, "wide.png", suffix) - (shift or 0)) * factor
        assert relative_l2(found["latent"], expected) < 1e-4


def test_toolkit_turns_images_upright_and_others_do_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().crop((0, 0, 210, 130)).save(tmp_path / "a.jpg", exif=exif)
    run(tmp_path, architecture="sd", **TOOLKIT)
    (file,) = tmp_path.glob("_latent_cache/*")
    assert tensors(file)[0]["latent"].shape == (4, 14, 10)
    run(tmp_path, architecture="sd", **SD)
    assert arrays(tmp_path / "a_0210x0130_sd.npz")["latents"].shape == (4, 10, 14)


# What all have in common


@pytest.mark.parametrize("options", [{**SD, "architecture": "flux"}, MUSUBI])
def test_images_that_would_share_a_cache_are_named(folder: Path, options: dict[str, Any]) -> None:
    photograph().crop((0, 0, 50, 50)).save(folder / "wide.jpg")
    with pytest.raises(RBLNDatasetError, match=r"wide\.jpg and wide\.png"):
        run(folder, **options)
    assert not (folder / ".rbln-vae").exists()


def test_images_of_one_stem_have_caches_of_their_own_in_toolkit(folder: Path) -> None:
    photograph().crop((0, 0, 210, 130)).save(folder / "wide.jpg")
    run(folder, architecture="sd", **TOOLKIT)
    assert len(list(folder.glob("_latent_cache/wide_*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({**SD, "architecture": "sd"}, {"a.PNG", "b.bmp"}),
        (MUSUBI, {"a.PNG", "b.bmp"}),
        ({**TOOLKIT, "architecture": "sd"}, {"a.PNG", "c.Jpg"}),
    ],
)
def test_only_images_that_the_trainer_takes_are_encoded(
    tmp_path: Path, options: dict[str, Any], taken: set[str]
) -> None:
    for name, kind in (("a.PNG", "PNG"), ("b.bmp", "BMP"), ("c.Jpg", "JPEG"), ("d.gif", "GIF")):
        photograph().crop((0, 0, 80, 80)).save(tmp_path / name, kind)
    with pytest.warns(UserWarning, match="left out: 2 images"):
        assert run(tmp_path, tmp_path / "out", **options).samples == 2
    written = {p.name[0] for p in (tmp_path / "out").rglob("*.npz")}
    written |= {p.name[0] for p in (tmp_path / "out").rglob("*.safetensors")}
    assert written == {name[0] for name in taken}


def test_a_broken_sidecar_does_not_matter(folder: Path) -> None:
    (folder / "wide.json").write_text("{")
    assert run(folder, **MUSUBI).samples == 2


def test_what_cannot_be_read_is_listed_in_the_hidden_folder(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    photograph().crop((0, 0, 90, 40)).save(folder / "flat.png")
    with pytest.raises(TooManyRejectedError, match="rejected: 2"):
        run(folder, **MUSUBI, upscale=False, min_side=45)
    listed = (folder / ".rbln-vae" / "musubi-z-image" / "rejected.jsonl").read_text()
    assert [json.loads(line)["key"] for line in listed.splitlines()] == ["broken.png", "flat.png"]


def test_an_image_below_a_step_is_rejected(folder: Path) -> None:
    photograph().crop((0, 0, 90, 10)).save(folder / "flat.png")
    options = Options(sizes=(SIZE,), upscale=False, min_side=1, **MUSUBI)
    with pytest.raises(TooManyRejectedError) as caught:
        encode_dataset(folder, folder, compiled("z-image"), options)
    assert caught.value.summary.rejected == 1
    listed = (folder / ".rbln-vae" / "musubi-z-image" / "rejected.jsonl").read_text()
    assert "too small for its bucket" in listed


ALL = [
    pytest.param({**SD, "architecture": "sdxl", "flip": True}, id="sd-scripts sdxl"),
    pytest.param({**SD, "architecture": "flux"}, id="sd-scripts flux"),
    pytest.param(MUSUBI, id="musubi"),
    pytest.param({**TOOLKIT, "architecture": "z-image", "flip": True}, id="ai-toolkit"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", ALL)
def test_only_what_is_missing_is_encoded_again(folder: Path, options: dict[str, Any]) -> None:
    model = compiled(options["architecture"])
    assert run(folder, model=model, **options).encoded == 2
    before = digests(folder)
    assert run(folder, model=model, **options).encoded == 0
    made = Options(sizes=(SIZE,), **options)
    assert estimate(folder, folder, model, made).done == 2
    caches = [n for n in before if n.endswith((".npz", ".safetensors"))]
    (folder / caches[0]).unlink()
    assert run(folder, model=model, **options).encoded == 2
    assert digests(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("options", ALL)
def test_images_may_come_and_go(folder: Path, options: dict[str, Any]) -> None:
    model = compiled(options["architecture"])
    run(folder, model=model, **options)
    photograph().crop((0, 0, 130, 130)).save(folder / "new.png")
    assert run(folder, model=model, **options).samples == 3
    (folder / "new.png").unlink()
    assert run(folder, model=model, **options).samples == 2


def test_a_folder_that_shrinks_by_a_part_is_counted_anew(tmp_path: Path) -> None:
    for number in range(34):
        photograph().crop((number, 0, number + 48, 48)).save(tmp_path / f"{number:02d}.png")
    model = compiled("z-image")
    options = {**MUSUBI, "sizes": ((48, 48),)}
    assert run(tmp_path, model=model, **options).samples == 34
    for number in range(10):
        (tmp_path / f"{number:02d}.png").unlink()
    assert run(tmp_path, model=model, **options).samples == 24


def test_other_options_replace_caches_of_the_same_name(folder: Path) -> None:
    model = compiled("sd")
    options = {**SD, "architecture": "sd"}
    run(folder, model=model, **options)
    before = digests(folder, ["*.npz"])
    assert run(folder, model=model, **options, seed=1).encoded == 2
    assert set(digests(folder, ["*.npz"])) == set(before)
    assert not set(digests(folder, ["*.npz"]).values()) & set(before.values())
    assert run(folder, model=model, **options).encoded == 2
    assert digests(folder, ["*.npz"]) == before


def test_a_damaged_cache_is_replaced(folder: Path) -> None:
    model, options = compiled("flux"), {**SD, "architecture": "flux"}
    run(folder, model=model, **options)
    before = digests(folder)
    (folder / "wide_0210x0130_flux.npz").write_bytes(b"PK\x03\x04 damaged")
    assert run(folder, model=model, **options).encoded == 2
    assert digests(folder) == before


def test_another_model_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="16 latent channels"):
        run(folder, model=compiled("sd"), **SD, architecture="flux")
    with pytest.warns(UserWarning, match=r"scaling_factor 0\.18215 .* is it the right model"):
        run(folder, model=compiled("sd"), **SD, architecture="sdxl")


def test_a_model_is_compiled_in_float32(folder: Path, tmp_path: Path) -> None:
    make("sd").save_pretrained(tmp_path / "vae")
    run(folder, model=tmp_path / "vae", **SD, architecture="sd")
    record = json.loads((folder / ".rbln-vae" / "sd-scripts-sd" / "job.json").read_text())
    assert record["model"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**SD}, "architecture is None, expected one of sd, sdxl"),
        ({**SD, "architecture": "z-image"}, "expected one of sd, sdxl"),
        ({**SD, "architecture": "sd", "crop": "random"}, "crop has no place"),
        ({**SD, "architecture": "sd", "sample": True}, "sample has no place"),
        ({**SD, "architecture": "sd", "scale": True}, "scale has no place"),
        ({**SD, "architecture": "sd", "max_aspect": 3.0}, "max_aspect has no place"),
        ({**SD, "architecture": "sd", "shard_size": 100}, "shard_size is 100"),
        ({**SD, "architecture": "sd", "latent_dtype": "float16"}, "takes only float32"),
        ({**SD, "architecture": "sd", "sizes": ((2048, 2048),)}, "refuses 2048x2048"),
        ({**SD, "architecture": "sd", "sizes": (SIZE, (64, 64))}, "one size at a time"),
        ({**MUSUBI, "flip": True}, "flip has no place"),
        ({**MUSUBI, "alpha_mask": True}, "alpha_mask has no place"),
        ({**MUSUBI, "bucket_step": 64}, "takes only 16"),
        ({**MUSUBI, "min_bucket": 64}, "min_bucket has no place"),
        ({**MUSUBI, "sizes": ((30, 30),)}, "at least 32"),
        ({**MUSUBI, "aspect": False, "sizes": ((100, 96),)}, "multiples of 16"),
        ({**MUSUBI, "aspect": False, "upscale": False}, "set aspect"),
        ({**TOOLKIT, "architecture": "sd", "aspect": False}, "set aspect"),
        ({**TOOLKIT, "architecture": "sd", "sizes": ((64, 96),)}, "one number"),
        ({"architecture": "sd"}, "architecture has no place in format 'safetensors'"),
        ({"upscale": False}, "upscale has no place"),
    ],
)
def test_options_that_a_format_has_no_place_for_are_named(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**{"sizes": (SIZE,), **options})


@pytest.mark.parametrize("name", TRAINERS)
def test_options_are_stored_whole(name: str) -> None:
    architecture = next(iter(TRAINERS[name].architectures))
    options = Options(format=name, architecture=architecture, aspect=True)  # type: ignore[arg-type]
    assert Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_other_sources_are_refused(tmp_path: Path) -> None:
    for source in ("s3://bucket/photos", [1, 2], tmp_path / "a.tar"):
        (tmp_path / "a.tar").touch()
        with pytest.raises(ValueError, match="a folder of images on this machine"):
            encode_dataset(source, tmp_path, "model", Options(sizes=(SIZE,), **MUSUBI))


COMMON = ["--format", "musubi", "--architecture", "z-image", "--aspect", "--size", "96"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_command(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(200):
        photograph().crop((number, 0, number + 128, 128)).save(source / f"{number:03d}.png")
    model = tmp_path / "model"
    compiled("z-image").save_pretrained(model)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(source, whole, model=model, **MUSUBI)
    command = [sys.executable, "-m", "rbln_vae", "encode-dataset", str(source), str(out)]
    command += ["--model", str(model), *COMMON]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(out.glob("*.safetensors"))) < 40:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (out / ".000_0128x0128_zi.safetensors.abcdefgh.tmp").touch()  # as a killed process leaves it
    assert 0 < run(source, out, model=model, **MUSUBI).encoded < 200
    assert digests(out) == digests(whole)


def test_the_files_are_what_the_libraries_write(folder: Path, tmp_path: Path) -> None:
    """So that trainers read them with the usual functions, also after copying."""
    run(folder, **MUSUBI)
    found, metadata = tensors(folder / "wide_0210x0130_zi.safetensors")
    save_file(found, tmp_path / "again", metadata)
    ours = (folder / "wide_0210x0130_zi.safetensors").stat().st_size
    assert abs((tmp_path / "again").stat().st_size - ours) <= 16
