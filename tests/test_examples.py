"""The examples run offline, as a user calls them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"

CALLS = [
    ("text_to_image", "sd"),
    ("text_to_image", "flux2"),
    ("text_to_image", "qwen-image"),
    ("text_to_image", "wan"),
    ("text_to_image", "sd-taesd"),
    ("text_to_image", "hunyuan-image"),
    ("image_to_image", "sd-img2img"),
    ("image_to_image", "flux2-image"),
    pytest.param("image_to_image", "qwen-image-edit", marks=pytest.mark.slow),
    ("inpainting", "sd-inpaint-9"),
    ("inpainting", "qwen-image-inpaint"),
    ("inpainting", "sd-inpaint-asymmetric"),
]


def run(example: str, output: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    given = [example, *arguments, "--steps", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", given)
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    with Image.open(output) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize("name", ["text_to_image", "image_to_image", "inpainting"])
def test_an_example_makes_a_picture(name, tmp_path, monkeypatch, capsys):
    run(name, tmp_path / "image.png", monkeypatch, "--tiny")
    assert "64x64 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(("example", "pipeline"), CALLS)
def test_an_example_runs_a_pipeline_of_another_family(example, pipeline, tmp_path, monkeypatch):
    run(example, tmp_path / "image.png", monkeypatch, "--tiny", pipeline)


def test_the_example_of_kandinsky_makes_a_picture(tmp_path, monkeypatch):
    run("kandinsky", tmp_path / "image.png", monkeypatch, "--tiny")
