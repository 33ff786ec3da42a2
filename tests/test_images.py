"""Every kind of picture becomes RGB of a size that fits, and comes back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from rbln_vae.images import (
    FIT_MODES,
    FitMode,
    Fitting,
    error_image,
    from_levels,
    load_image,
    side_by_side,
    to_image,
    to_levels,
    to_tensor,
    with_opacity,
)
from rbln_vae.levels import sample_of

SIDES = st.integers(1, 90)


def ramp(height: int = 20, width: int = 30) -> Image.Image:
    """A picture in which no two places look alike."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 7, columns * 5, (rows + columns) * 3], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)
    return found


# Colours


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, ".png", (255, 255, 255)),
        ("L", 100, ".png", (100, 100, 100)),
        ("LA", (0, 0), ".png", (255, 255, 255)),
        ("LA", (0, 255), ".png", (0, 0, 0)),
        ("RGB", (1, 2, 3), ".png", (1, 2, 3)),
        ("RGBA", (255, 0, 0, 0), ".png", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), ".png", (255, 0, 0)),
        ("RGBA", (200, 0, 0, 51), ".png", (244, 204, 204)),
        ("CMYK", (0, 255, 255, 0), ".tiff", (255, 0, 0)),
        ("YCbCr", (128, 128, 128), ".tiff", (128, 128, 128)),
        ("I;16", 65535, ".png", (255, 255, 255)),
        ("I;16", 257 * 40, ".png", (40, 40, 40)),
        ("I", 257 * 40, ".tiff", (40, 40, 40)),
        ("F", 0.2, ".tiff", (51, 51, 51)),
        ("F", 200.0, ".tiff", (200, 200, 200)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, suffix, expected) -> None:
    image = load_image(saved(tmp_path / f"picture{suffix}", Image.new(mode, (4, 3), colour)))
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert pixel(image) == expected


def test_a_palette_gives_its_colours(tmp_path) -> None:
    source = Image.new("RGB", (4, 3), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(load_image(saved(tmp_path / "p.png", source))) == (10, 200, 30)


def test_the_transparent_colour_of_a_palette_is_white(tmp_path) -> None:
    source = Image.new("P", (4, 3), 0)
    source.putpalette([10, 200, 30, 40, 50, 60])
    source.putpixel((1, 0), 1)
    image = load_image(saved(tmp_path / "p.png", source, transparency=0))
    assert pixel(image) == (255, 255, 255)
    assert pixel(image, 1) == (40, 50, 60)


def test_the_transparent_colour_of_an_rgb_file_is_white(tmp_path) -> None:
    source = Image.new("RGB", (4, 3), (1, 2, 3))
    assert pixel(load_image(saved(tmp_path / "t.png", source, transparency=(1, 2, 3)))) == (
        255,
        255,
        255,
    )


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    path = tmp_path / f"moves{suffix}"
    red.save(path, save_all=True, append_images=[blue], lossless=True)
    assert pixel(load_image(path), 8, 8) == (255, 0, 0)


@pytest.mark.parametrize(
    ("orientation", "height", "width", "corner"),
    [
        (1, 20, 30, (0, 0)),
        (2, 20, 30, (29, 0)),
        (3, 20, 30, (29, 19)),
        (4, 20, 30, (0, 19)),
        (5, 30, 20, (0, 0)),
        (6, 30, 20, (19, 0)),
        (7, 30, 20, (19, 29)),
        (8, 30, 20, (0, 29)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, height, width, corner) -> None:
    source = ramp()
    source.putpixel((0, 0), (255, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(tmp_path / "turned.png", source, exif=exif))
    assert (image.height, image.width) == (height, width)
    assert pixel(image, *corner) == (255, 0, 255)


def test_an_open_file_is_read() -> None:
    file = io.BytesIO()
    ramp().save(file, "PNG")
    assert np.array_equal(np.asarray(load_image(file)), np.asarray(ramp()))


# Files that can't be read


def test_a_file_that_is_no_picture_is_named(tmp_path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(UnidentifiedImageError, match=r"notes\.png is not a picture .* convert"):
        load_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp"])
def test_a_truncated_file_is_named(tmp_path, suffix) -> None:
    path = saved(tmp_path / f"cut{suffix}", ramp(200, 300))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnidentifiedImageError, match=rf"cut\{suffix}"):
        load_image(path)


def test_a_missing_file_stays_a_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("level", [-1.0, 300.0, float("nan"), float("inf")])
def test_levels_without_a_meaning_are_an_error(tmp_path, level) -> None:
    path = saved(tmp_path / "odd.tiff", Image.new("F", (4, 3), level))
    with pytest.raises(UnidentifiedImageError, match="levels go from"):
        load_image(path)


def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path / "huge.png", Image.new("L", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnidentifiedImageError, match="decompression bomb"):
        load_image(path)


# Tensors


def test_a_tensor_is_minus_one_at_black_and_one_at_white() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    x = to_tensor(image)
    assert x.shape == (1, 3, 2, 3)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_a_tensor_is_made_of_rgb_alone() -> None:
    with pytest.raises(ValueError, match="expected an RGB picture, found L"):
        to_tensor(Image.new("L", (4, 4)))


def test_every_level_survives_the_way_to_a_tensor_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels] * 3, axis=-1))
    assert np.array_equal(np.asarray(to_image(to_tensor(image))), np.asarray(image))


def test_what_lies_outside_is_clipped() -> None:
    assert pixel(to_image(torch.tensor([-9.0, 9.0, 0.0]).view(3, 1, 1))) == (0, 255, 128)


def test_low_precision_samples_are_shown() -> None:
    assert pixel(to_image(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16))) == (255, 255, 255)


@pytest.mark.parametrize("shape", [(1, 2, 2), (5, 2, 2), (2, 3, 2, 2), (2, 2)])
def test_only_one_sample_makes_a_picture(shape) -> None:
    with pytest.raises(ValueError, match="expected one sample"):
        to_image(torch.zeros(shape))


def test_a_fourth_channel_is_the_opacity_of_a_picture() -> None:
    levels = with_opacity(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), 4)
    for picture in (from_levels(levels), to_image(sample_of(levels).permute(0, 3, 1, 2))):
        assert pixel(picture) == (0, 0, 0, 255)
        assert picture.mode == "RGBA"


def test_pictures_get_an_opacity_only_for_models_that_take_one() -> None:
    levels = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    assert with_opacity(levels, 3) is levels
    assert with_opacity(levels, 4).shape == (2, 4, 5, 4)
    with pytest.raises(ValueError, match="this model takes 2"):
        with_opacity(levels, 2)


def test_levels_and_pictures_are_each_other() -> None:
    picture = ramp(5, 7)
    levels = to_levels(picture)
    assert (levels.dtype, tuple(levels.shape)) == (torch.uint8, (1, 5, 7, 3))
    assert np.array_equal(np.asarray(from_levels(levels)), np.asarray(picture))
    assert torch.equal(to_tensor(picture), sample_of(levels.permute(0, 3, 1, 2)))
    for shape in ((5, 7, 3), (2, 5, 7, 3), (1, 5, 7, 2)):
        with pytest.raises(ValueError, match="expected one picture"):
            from_levels(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_no_picture(value) -> None:
    sample = torch.zeros(3, 2, 2)
    sample[1, 1, 1] = value
    with pytest.raises(ValueError, match="finite"):
        to_image(sample)


# Sizes


@given(SIDES, SIDES, st.sampled_from([1, 2, 8]), st.sampled_from(FIT_MODES))
def test_the_fitted_picture_has_the_planned_size(height, width, multiple, mode: FitMode) -> None:
    if mode == "crop" and min(height, width) < multiple:
        with pytest.raises(ValueError, match="too small to be cropped"):
            Fitting.plan((height, width), multiple=multiple, mode=mode)
        return
    fitting = Fitting.plan((height, width), multiple=multiple, mode=mode)
    fitted = fitting.apply(ramp(height, width))
    assert (fitted.height, fitted.width) == fitting.size
    assert all(side % multiple == 0 for side in fitting.size)
    assert all(abs(a - b) < multiple for a, b in zip(fitting.size, (height, width), strict=True))


@given(SIDES, SIDES, st.sampled_from(FIT_MODES), st.integers(1, 9), st.integers(1, 9))
def test_any_size_can_be_asked_for(height, width, mode: FitMode, rows, columns) -> None:
    size = (8 * rows, 8 * columns)
    fitting = Fitting.plan((height, width), multiple=8, mode=mode, size=size)
    fitted = fitting.apply(ramp(height, width))
    assert (fitted.height, fitted.width) == fitting.size == size
    undone = fitting.undo(fitted)
    if mode != "crop":
        assert (undone.height, undone.width) == (height, width)


@given(SIDES, SIDES)
def test_padding_is_undone_exactly(height, width) -> None:
    image = ramp(height, width)
    fitting = Fitting.plan((height, width), multiple=8)
    assert np.array_equal(np.asarray(fitting.undo(fitting.apply(image))), np.asarray(image))


def test_padding_continues_the_last_row_and_column() -> None:
    fitted = Fitting.plan((5, 6), multiple=8).apply(ramp(5, 6))
    assert pixel(fitted, 7, 2) == pixel(fitted, 5, 2)
    assert pixel(fitted, 3, 7) == pixel(fitted, 3, 4)


def test_padding_to_a_size_keeps_the_proportions() -> None:
    fitting = Fitting.plan((100, 200), multiple=8, size=(64, 64))
    assert (fitting.scaled, fitting.content) == ((32, 64), (32, 64))


def test_cropping_keeps_the_middle() -> None:
    image = ramp(20, 30)
    fitting = Fitting.plan((20, 30), multiple=8, mode="crop")
    assert (fitting.size, fitting.offset) == ((16, 24), (2, 3))
    assert pixel(fitting.apply(image)) == pixel(image, 3, 2)


def test_cropping_to_a_size_covers_it() -> None:
    fitting = Fitting.plan((100, 200), multiple=8, mode="crop", size=(64, 64))
    assert (fitting.scaled, fitting.offset) == ((64, 128), (0, 32))


def test_a_crop_is_undone_at_the_scale_of_the_original() -> None:
    fitting = Fitting.plan((100, 200), multiple=8, mode="crop", size=(48, 48))
    undone = fitting.undo(Image.new("RGB", (48, 48)))
    assert undone.size == (100, 100)


def test_a_size_that_is_no_multiple_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="height 56 or 64 and width 64"):
        Fitting.plan((9, 9), multiple=8, size=(60, 64))


def test_an_unknown_fit_names_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="pad, resize, crop, found 'tile'"):
        Fitting.plan((9, 9), multiple=8, mode="tile")  # type: ignore[arg-type]


def test_a_fitting_is_for_one_size() -> None:
    fitting = Fitting.plan((9, 9), multiple=8)
    with pytest.raises(ValueError, match="expected a picture of 9x9, found 8x9"):
        fitting.apply(ramp(8, 9))
    with pytest.raises(ValueError, match="expected a picture of 16x16, found 9x9"):
        fitting.undo(ramp(9, 9))


@pytest.mark.parametrize("mode", FIT_MODES)
def test_a_fitting_is_stored_and_read(mode: FitMode) -> None:
    fitting = Fitting.plan((30, 50), multiple=8, mode=mode)
    assert Fitting.from_dict(json.loads(json.dumps(fitting.to_dict()))) == fitting


@pytest.mark.parametrize(
    "change",
    [{"mode": "tile"}, {"size": [8]}, {"size": "8x8"}, {"offset": [-1, 0]}, {"extra": 1}],
)
def test_what_is_not_a_fitting_is_an_error(change) -> None:
    stored = Fitting.plan((30, 50), multiple=8).to_dict() | change
    with pytest.raises(ValueError, match="expected a"):
        Fitting.from_dict(stored)


# Pictures of results


def test_an_error_is_shown_enlarged() -> None:
    a, b = Image.new("RGB", (2, 2), (100, 100, 100)), Image.new("RGB", (2, 2), (101, 97, 0))
    assert pixel(error_image(a, b, gain=8)) == (8, 24, 255)


def test_panels_stand_side_by_side_under_their_labels() -> None:
    left, right = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (60, 40), "blue")
    row = np.asarray(side_by_side({"one": left, "two": right}))
    assert (row[-40:, :60] == (255, 0, 0)).all()
    assert (row[-40:, -60:] == (0, 0, 255)).all()
    assert (row[:-40] < 128).any()
