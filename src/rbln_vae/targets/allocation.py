"""What a run says when the system has no memory for it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..units import format_bytes


@contextlib.contextmanager
def torch_allocates() -> Iterator[None]:
    """Turn torch's error about a failed allocation into a `MemoryError`."""
    try:
        yield
    except RuntimeError as error:
        wanted = re.search(r"allocate ([\d.]+ [KMG]iB|\d+ bytes)", str(error))
        if wanted is None:
            raise
        size = wanted[1]
        if size.endswith("bytes"):
            size = format_bytes(int(size.split()[0]))
        raise MemoryError(
            f"The system has no {size} more for this run. Run a smaller batch or image, or free "
            "memory; the model can be used again."
        ) from None
