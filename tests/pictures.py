"""Images for tests, cut from the photographs that scikit-image ships."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from skimage import data

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@functools.cache
def photograph() -> Image.Image:
    """The astronaut, 512 x 512."""
    return Image.fromarray(data.astronaut())


def picture(number: int) -> Image.Image:
    """A part of the photograph, another size and shape for each number."""
    width, height = 60 + 13 * (number % 7), 60 + 17 * (number % 5)
    left, top = (31 * number) % 300, (17 * number) % 300
    return photograph().crop((left, top, left + width, top + height))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file with that picture."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def make_folder(root: Path, count: int) -> Path:
    """A folder of pictures in three formats and two directories, some with captions."""
    (root / "more").mkdir(parents=True)
    for number in range(count):
        suffix = list(FORMATS)[number % 3]
        file = root / ("more" if number % 2 else "") / f"{number:04d}.{suffix}"
        file.write_bytes(encoded(picture(number), FORMATS[suffix]))
        if number % 3 != 1:
            file.with_suffix(".txt").write_text(f"caption {number}\n")
        if number % 4 == 0:
            file.with_suffix(".json").write_text(f'{{"number": {number}}}')
    return root


def digests(directory: Path, names: Iterable[str] = ("*",)) -> dict[str, str]:
    """The SHA-256 of every file below a directory."""
    files = {path for name in names for path in directory.rglob(name) if path.is_file()}
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }
