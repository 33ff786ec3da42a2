"""The page in a real browser: an image goes in, and what was lost comes out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from services import make_app, running
from vaes import compile_vae, default_compiled, default_vae, make_vae

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.images import to_image, to_tensor
from rbln_vae.metrics import psnr, ssim
from rbln_vae.serving.models import ServedModel
from rbln_vae.serving.settings import Limits

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)"
)

DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


@pytest.fixture(scope="module")
def vae() -> RBLNAutoencoderKL:
    return compile_vae(make_vae(latent_channels=6))


@pytest.fixture(scope="module")
def server(vae: RBLNAutoencoderKL) -> Iterator[str]:
    decoder_only = compile_vae(default_vae(), uses_encoder=False)
    coarse = compile_vae(make_vae(block_out_channels=(8, 8, 16)))
    models = ServedModel("six", vae), ServedModel("half", decoder_only), ServedModel("four", coarse)
    with running(make_app(*models)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, server: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page on a screen, which fails if anything goes wrong in it or leaves the server."""
    context = browser.new_context(**getattr(request, "param", DESKTOP))
    opened, troubles, asked = context.new_page(), [], []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda said: said.type == "error" and troubles.append(said.text))
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.goto(server)
    playwright.expect(opened.locator("#about")).to_contain_text("6 latent channels")
    yield opened
    context.close()
    assert troubles == []
    assert all(url.startswith((server, "blob:", "data:")) for url in asked)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of a size that the model takes, so that the page needn't scale it."""
    file = tmp_path / "photo.png"
    ramp = np.linspace(0, 255, 40 * 26 * 3).reshape(26, 40, 3).astype(np.uint8)
    Image.fromarray(ramp).save(file)
    return file


def finish(page: Any) -> None:
    playwright.expect(page.locator("#status")).to_contain_text("done.", timeout=60_000)


def canvas(page: Any, selector: str) -> np.ndarray:
    """The pixels of a canvas."""
    data = page.eval_on_selector(
        selector,
        "c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
    )
    return np.array(data[1:], np.uint8).reshape(-1, data[0], 4)[..., :3]


@pytest.mark.slow
@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
def test_reconstructs_an_image(page: Any, vae: RBLNAutoencoderKL, photo: Path) -> None:
    page.set_input_files("#file", photo)
    finish(page)

    sample = to_tensor(Image.open(photo))
    latent = vae.encode(sample).latent_dist.mode()
    expected = to_image(vae.decode(latent).sample)
    shown = canvas(page, ".decoded")
    assert np.array_equal(canvas(page, ".original"), np.asarray(Image.open(photo)))
    # A browser and the model's own preparation round differently.
    assert np.abs(shown.astype(int) - np.asarray(expected)).max() <= 1

    def number(selector: str) -> float:
        return float(re.sub("[^-0-9.]", "", page.inner_text(selector)))

    before, after = (
        to_tensor(Image.fromarray(canvas(page, f".{name}"))) for name in ("original", "decoded")
    )
    assert number(".psnr") == pytest.approx(psnr(after, before), abs=0.006)
    assert number(".ssim") == pytest.approx(ssim(after, before), abs=0.0001)
    assert page.locator(".channels canvas").count() == 6
    assert page.locator(".timings tr").count() == 2
    assert "NaN" not in page.inner_text("#results")
    # Nothing is wider than the screen.
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]


def test_the_range_of_a_channel_stands_in_one_line(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    finish(page)
    longest = page.evaluate("[-99.9, -99.9].map(short).join(' to ')")
    assert longest == "-99.9 to -99.9"
    assert page.evaluate("[-1234.5, 99.96].map(short).join(' to ')") == "-1235 to 100"
    for width in (320, 360, 390, 430, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        fits = page.locator(".channels figure").evaluate_all(
            """(figures, text) => figures.map((figure) => {
                figure.lastChild.textContent = text;
                const range = document.createRange();
                range.selectNode(figure.lastChild);
                const lines = range.getClientRects();
                return lines.length === 1 && lines[0].width <= figure.clientWidth;
            })""",
            longest,
        )
        assert fits == [True] * 6, width


def test_the_error_map_shows_the_difference(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    finish(page)
    page.fill(".gain", "3")
    assert page.inner_text(".gain-shown") == "3"
    before, after = (canvas(page, f".{name}").astype(int) for name in ("original", "decoded"))
    heat = 3 * np.minimum(255, 3 * np.abs(before - after).mean(axis=2))
    expected = np.stack([heat, heat - 255, heat - 510], axis=2).clip(0, 255)
    assert np.abs(canvas(page, ".errors") - expected).max() <= 1


@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
def test_the_slider_divides_the_two(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    finish(page)
    box = page.locator(".compare").bounding_box()
    x, y = box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2
    if page.viewport_size["width"] < 500:
        page.touchscreen.tap(x, y)
    else:
        page.mouse.click(x, y)
    split = page.eval_on_selector(".compare", "e => e.style.getPropertyValue('--split')")
    assert float(split.rstrip("%")) == pytest.approx(20, abs=6)
    page.focus(".split")
    page.keyboard.press("End")
    assert page.eval_on_selector(".compare", "e => e.style.getPropertyValue('--split')") == "100%"


@pytest.mark.slow
def test_an_example_can_be_drawn_and_sizes_changed(page: Any) -> None:
    page.select_option("#size", "256")
    page.click("#example")
    finish(page)
    assert canvas(page, ".original").shape == (256, 256, 3)


def encoded_and_decoded(vae: RBLNAutoencoderKL, file: Path) -> np.ndarray:
    latent = vae.encode(to_tensor(Image.open(file))).latent_dist.mode()
    return np.asarray(to_image(vae.decode(latent).sample)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
def test_two_models_are_compared_side_by_side(
    page: Any, vae: RBLNAutoencoderKL, tmp_path: Path
) -> None:
    file = tmp_path / "photo.png"
    ramp = np.linspace(0, 255, 40 * 24 * 3).reshape(24, 40, 3).astype(np.uint8)
    Image.fromarray(ramp).save(file)
    # A model without an encoder can't be compared.
    assert page.locator("#other option").all_inner_texts() == ["no other", "four"]
    page.select_option("#other", "four")
    page.set_input_files("#file", file)
    finish(page)
    results = page.locator(".result")
    assert results.locator(".name").all_inner_texts() == ["six", "four"]
    four = compile_vae(make_vae(block_out_channels=(8, 8, 16)))
    for index, model in enumerate((vae, four)):
        shown = canvas(page, f".result:nth-child({index + 1}) .decoded").astype(int)
        assert np.abs(shown - encoded_and_decoded(model, file)).max() <= 1
    first, second = (results.nth(index).bounding_box() for index in (0, 1))
    if page.viewport_size["width"] < 500:
        assert second["y"] >= first["y"] + first["height"]
    else:
        assert first["y"] == second["y"] and second["x"] >= first["x"] + first["width"]
    # What is set for one is set for both.
    results.nth(1).locator(".gain").fill("3")
    assert results.locator(".gain-shown").all_inner_texts() == ["3", "3"]
    results.nth(1).locator(".split").fill("25")
    splits = results.locator(".compare").evaluate_all(
        "all => all.map(e => e.style.getPropertyValue('--split'))"
    )
    assert splits == ["25%", "25%"]
    assert page.locator("#plans section").count() == 2
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]
    page.select_option("#other", "")
    finish(page)
    playwright.expect(results).to_have_count(1)


def test_the_plan_shows_what_images_take(page: Any, server: str, vae: RBLNAutoencoderKL) -> None:
    rows = page.locator("#plans tbody tr")
    playwright.expect(rows).to_have_count(4, timeout=60_000)
    cells = [row.split("\t") for row in rows.all_inner_texts()]
    assert [row[0] for row in cells] == [f"{n}²" for n in (256, 512, 1024, 2048)]
    needed = vae.memory_needed("decoder", (1, 6, 256, 256))
    assert cells[1][3] == f"{-(-needed // 2**20)} MiB"
    page.select_option("#model", "half")
    playwright.expect(rows.first).to_contain_text("–")


def test_what_is_no_image_is_said_so(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "words.png"
    file.write_text("not an image")
    page.set_input_files("#file", file)
    playwright.expect(page.locator("#status")).to_contain_text("not an image that this browser")


def test_a_model_without_encoder_is_said_so(page: Any) -> None:
    page.select_option("#model", "half")
    playwright.expect(page.locator("#status")).to_contain_text("decoder only")


def test_documentation_lists_addresses_and_errors(page: Any, server: str) -> None:
    page.goto(f"{server}/docs")
    playwright.expect(page.locator("#paths")).to_contain_text("POST /decode")
    playwright.expect(page.locator("#codes")).to_contain_text("queue_full")


def test_what_the_server_refuses_is_shown(browser: Any, photo: Path) -> None:
    with running(make_app(limits=Limits(max_pixels=10))) as address:
        page = browser.new_page()
        page.goto(address)
        playwright.expect(page.locator("#about")).to_contain_text("latent channels")
        page.set_input_files("#file", photo)
        playwright.expect(page.locator("#status")).to_contain_text("1,040 pixels")
        page.close()


def test_the_browser_asks_for_the_key(browser: Any) -> None:
    app = make_app(ServedModel("m", default_compiled()), limits=Limits(api_key="key"))
    with running(app) as address:
        context = browser.new_context(http_credentials={"username": "", "password": "key"})
        page = context.new_page()
        page.goto(address)
        playwright.expect(page.locator("#about")).to_contain_text("latent channels")
        context.close()
