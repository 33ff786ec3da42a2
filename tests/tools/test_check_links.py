"""The check of the site's links."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_links.py"


def check(site: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(site)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A page, and one below it with a heading."""
    (tmp_path / "guide").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "guide" / "index.html").write_text('<h1 id="first">…</h1>')
    return tmp_path


@pytest.mark.parametrize(
    "link",
    ["guide/", "guide/index.html#first", "guide/#first", "picture.png", "#", "https://nowhere/"],
)
def test_links_that_lead_somewhere_pass(link, site, monkeypatch):
    (site / "index.html").write_text(f'<a href="{link}">…</a><img src="picture.png">')
    assert check(site, monkeypatch) == 0


@pytest.mark.parametrize(
    "link", ["guide/#second", "other/", "../outside.html", "#first", "guide/picture.png"]
)
def test_a_link_to_nothing_is_found(link, site, monkeypatch, capsys):
    (site.parent / "outside.html").write_text("")
    (site / "index.html").write_text(f'<a href="{link}">…</a>')
    assert check(site, monkeypatch) == 1
    assert link in capsys.readouterr().err
