"""Checks that every link within a built site leads somewhere.

    python tools/check_links.py build/site

Addresses of other servers are not asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the places in it that links can name."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.places.add(value or "")


page = cache(Page)


def broken_links(site: Path) -> Iterator[tuple[Path, str]]:
    """Pages and their links that lead nowhere."""
    site = site.resolve()
    for file in sorted(site.rglob("*.html")):
        if file == site / "404.html":  # its links begin at the root of a server
            continue
        for link in page(file).links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            path = unquote(address.path)
            found = (file.parent / path).resolve() if path else file
            if found.is_dir():
                found /= "index.html"
            place = unquote(address.fragment)
            if (
                not found.is_file()
                or not found.is_relative_to(site)
                or (found.suffix == ".html" and place not in page(found).places)
            ):
                yield file, link


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} SITE", file=sys.stderr)
        return 2
    site = Path(sys.argv[1])
    broken = list(broken_links(site))
    for file, link in broken:
        print(f"error: {file} links to {link}, which isn't there", file=sys.stderr)
    links = sum(len(page(file).links) for file in site.resolve().rglob("*.html"))
    print(f"{links} links, {len(broken)} broken")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
