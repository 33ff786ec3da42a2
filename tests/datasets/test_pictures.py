"""Samples made ready for the encoder, and those that are rejected."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from pictures import encoded, photograph, picture
from PIL import Image, ImageOps

from rbln_vae.datasets.options import Options
from rbln_vae.datasets.pictures import Clip, Prepared, Rejected, prepare, quiet
from rbln_vae.datasets.sources import Sample

OPTIONS = Options(sizes=((64, 64),), prescale=False)


def prepared(content: bytes | str, options: Options = OPTIONS, **sample) -> Prepared | Rejected:
    found = prepare(Sample("key", content, **sample), options, options.sizing(8))
    assert not isinstance(found, Clip)
    return found


def image_of(content: bytes | str, options: Options = OPTIONS) -> Prepared:
    found = prepared(content, options)
    assert isinstance(found, Prepared), found
    return found


def test_an_image_is_scaled_by_lanczos_and_cropped_at_the_centre() -> None:
    image = photograph().crop((0, 0, 300, 200))
    expected = image.resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64))
    found = image_of(encoded(image))
    np.testing.assert_array_equal(found.pixels, np.asarray(expected))
    assert found.placement.original == (200, 300)
    assert found.placement.scaled == (64, 96) and found.placement.offset == (0, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("prescale", [False, True])
def test_an_image_is_upright_whatever_its_exif_says(
    kind: str, orientation: int, prescale: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph().crop((0, 0, 400, 200))
    content = encoded(image, kind, exif=exif, **({} if kind == "TIFF" else {"quality": 95}))
    options = Options(sizes=((64, 64),), prescale=prescale)
    found = image_of(content, options)
    turned = image.copy()
    turned.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(turned)
    assert found.placement.original == (upright.height, upright.width)
    expected = np.asarray(ImageOps.fit(upright, (64, 64), Image.Resampling.LANCZOS), float)
    assert np.abs(found.pixels - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(2000, 1500), (1003, 801), (600, 1210)])
def test_a_jpeg_that_is_decoded_at_a_fraction_looks_the_same(
    size: tuple[int, int], orientation: int
) -> None:
    """To half a level, and not shifted where its sides are no multiples of the fraction."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph().resize(size), "JPEG", quality=95, exif=exif)
    quickly = Options(sizes=((64, 64),), prescale=True)
    whole, quick = image_of(content), image_of(content, quickly)
    assert quick.placement == whole.placement
    assert 0 < np.abs(quick.pixels - whole.pixels.astype(float)).mean() < 0.6
    np.testing.assert_array_equal(image_of(content, quickly).pixels, quick.pixels)


SQUARE = picture(0).resize((80, 80))


def animated(kind: str) -> bytes:
    frames = [picture(n).resize((80, 80)) for n in range(1, 4)]
    return encoded(SQUARE, kind, save_all=True, append_images=frames, lossless=True)


def of_16_bits() -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, np.asarray(SQUARE).astype(np.uint16) * 257)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (encoded(SQUARE.convert("CMYK"), "JPEG", quality=95), 12),
        (encoded(SQUARE.convert("CMYK"), "TIFF"), 0.01),
        (encoded(SQUARE.convert("RGBA"), "PNG"), 0.01),
        (encoded(SQUARE.convert("P"), "PNG"), 60),
        (of_16_bits(), 0.01),
        (animated("GIF"), 60),
        (animated("WEBP"), 0.01),
        (animated("PNG"), 0.01),
    ],
    ids=["CMYK JPEG", "CMYK", "alpha", "palette", "16 bits", "animated GIF", "WebP", "PNG"],
)
def test_other_kinds_of_image_are_converted(content: bytes, tolerance: float) -> None:
    expected = image_of(encoded(SQUARE)).pixels.astype(float)
    assert np.abs(image_of(content).pixels - expected).mean() < tolerance


def test_grey_levels_of_16_bits_are_converted() -> None:
    levels = np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16)
    pixels = image_of(encoded(Image.fromarray(levels), "PNG")).pixels
    assert pixels.min() < 3 and pixels.max() > 252
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture"),
        (b"GIF89a, not quite", "can't be read|not a picture"),
        (encoded(photograph(), "JPEG")[:9000], "truncated"),
        (encoded(photograph(), "PNG")[:9000], "truncated"),
        (encoded(Image.new("RGB", (20, 500))), "less than min_side"),
    ],
    ids=["empty", "nonsense", "half a JPEG", "half a PNG", "too small"],
)
def test_what_is_of_no_use_is_rejected_with_the_reason(content: bytes, reason: str) -> None:
    found = prepared(content)
    assert isinstance(found, Rejected)
    import re

    assert re.search(reason, found.reason)


def test_an_image_that_is_too_large_is_rejected_before_it_is_decoded(monkeypatch) -> None:
    content = encoded(Image.new("L", (400, 300)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    found = prepared(content, Options(sizes=((64, 64),), max_pixels=100_000))
    assert isinstance(found, Rejected) and "300x400" in found.reason


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_long_image_takes_no_more_memory_than_others(monkeypatch, crop) -> None:
    row = np.asarray(photograph())[200:240, :, :]
    image = Image.fromarray(np.tile(row, (1, 5, 1)))  # 40 x 2560
    options = Options(sizes=((64, 64),), crop=crop)
    resize, made = Image.Image.resize, []

    def recording(self, size, *args, **kwargs):
        made.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", recording)
    found = image_of(encoded(image), options)
    assert made == [(64, 64)]
    monkeypatch.undo()
    whole = image.resize(found.placement.scaled[::-1], Image.Resampling.LANCZOS)
    left = found.placement.offset[1]
    expected = np.asarray(whole.crop((left, 0, left + 64, 64)), float)
    assert found.placement.scaled == (64, 4096) and np.abs(found.pixels - expected).max() <= 12
    assert np.abs(found.pixels - expected).mean() < 0.2


def test_a_decoder_that_fails_in_an_odd_way_ends_no_job(monkeypatch) -> None:
    def failing(self):
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(Image.Image, "getexif", failing)
    found = prepared(encoded(photograph(), "JPEG"))
    assert isinstance(found, Rejected) and "ZeroDivisionError: odd" in found.reason


def test_captions_and_columns_stand_beside(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    (tmp_path / "a.txt").write_text(" a caption\n")
    (tmp_path / "a.json").write_text('{"caption": "another", "score": 3}')
    names = [str(tmp_path / f"a.{suffix}") for suffix in ("json", "txt")]
    for order in (names, names[::-1]):
        found = prepared(str(tmp_path / "a.png"), sidecars=tuple(order))
        assert isinstance(found, Prepared)
        assert found.caption == "a caption"  # the .txt wins
        assert found.columns == {"caption": "another", "score": 3}


def test_a_file_that_is_gone_is_rejected_and_one_that_fails_is_an_error(
    tmp_path: Path, monkeypatch
) -> None:
    found = prepared(str(tmp_path / "gone.png"))
    assert isinstance(found, Rejected) and "No such file" in found.reason

    def failing(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match="Input/output"):
        prepared(str(tmp_path / "there.png"))


def test_a_sidecar_that_is_no_json_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    found = prepared(encoded(picture(1)), sidecars=(str(tmp_path / "a.json"),))
    assert isinstance(found, Rejected) and "no object" in found.reason


def test_warnings_of_pillow_are_silenced_and_come_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)
        with pytest.raises(Image.DecompressionBombWarning):
            warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)
