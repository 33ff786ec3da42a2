"""The switch for output that is meant for developers of this package."""

from __future__ import annotations

import os


def debugging() -> bool:
    """Whether `RBLN_VAE_DEBUG` is set to anything but 0 or the empty text.

    If so, each pass prints its graph, and commands print the traceback of an error.
    """
    return os.environ.get("RBLN_VAE_DEBUG", "") not in ("", "0")
