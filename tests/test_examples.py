"""The examples run offline, as a user calls them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["text_to_image", "image_to_image", "inpainting"])
def test_an_example_makes_a_picture(name, tmp_path, monkeypatch, capsys):
    output = tmp_path / "image.png"
    arguments = ["--tiny", "--steps", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    with Image.open(output) as image:
        assert image.size == (64, 64)
    assert "64x64 pixels" in capsys.readouterr().out
