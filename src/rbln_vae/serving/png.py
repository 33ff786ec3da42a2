"""Encodes PNG files, several times as fast as Pillow.

Pillow tries five filters on each row. One filter for all rows gives files of the same size,
and ISA-L compresses them in a fraction of the time of zlib.

The format: "Portable Network Graphics (PNG) Specification", https://www.w3.org/TR/png/.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from isal import isal_zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # grey, RGB, RGB with opacity
_UP = 2  # the filter: the difference of each byte to the byte above
_LEVEL = 1


def encode_png(levels: np.ndarray) -> bytes:
    """Encode a picture as the bytes of a PNG file.

    Args:
        levels: A uint8 array `(H, W, 1)` for grey, `(H, W, 3)` for RGB or `(H, W, 4)` for RGB
            with opacity; neither side is 0.

    Raises:
        ValueError: The array has another dtype or shape.

    Example:
        >>> Path("grey.png").write_bytes(encode_png(np.full((64, 96, 1), 128, np.uint8)))
    """
    if levels.dtype != np.uint8 or levels.ndim != 3 or levels.shape[2] not in _COLOUR_TYPES:
        raise ValueError(
            f"expected uint8 (H, W, 1), (H, W, 3) or (H, W, 4), found {levels.dtype} {levels.shape}"
        )
    height, width, channels = levels.shape
    rows = levels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    head = struct.pack(">2I5B", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    data = isal_zlib.compress(filtered, _LEVEL)
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", data), _chunk(b"IEND", b""))
    return b"".join((_SIGNATURE, *chunks))


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))
