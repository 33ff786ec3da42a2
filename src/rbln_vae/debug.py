"""Whether to show what only the developers of the package want to see."""

from __future__ import annotations

import os


def debugging() -> bool:
    """Whether `RBLN_VAE_DEBUG` is set, and to something else than 0 or nothing.

    Then each pass prints its graph, and commands print the traceback of an error.
    """
    return os.environ.get("RBLN_VAE_DEBUG", "") not in ("", "0")
