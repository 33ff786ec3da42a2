"""What of this machine the process may use: its control group may give it less than there is."""

from __future__ import annotations

import os
from pathlib import Path


def usable_memory() -> int:
    """Bytes of the machine, or of the control group that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)
