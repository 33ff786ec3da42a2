"""What the process may use of the machine: its control groups may give it less than there is.

Linux keeps processes in a tree of control groups, each of which may limit memory and processor
time for everything below it. Both versions of these groups are read, side by side where a
system mixes them. Elsewhere the whole machine counts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def usable_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that the process may use: the machine's, or less if a limit says so.

    `memory.high` counts as much as `memory.max`: the kernel lets a process exceed it, but
    slows it down until that is hardly worth the memory.

    Args:
        root: Where the file system begins.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _read(group / name)
            if text.isdecimal():  # not where it is "max"
                limits.append(int(text))
    return min(limits)


def usable_processors(root: Path = _ROOT) -> int:
    """How many threads the process can keep busy: physical cores, or less by a quota of time.

    Processors that share a core count once, since they share the cache, too. Only those in the
    affinity mask of the process count.

    Args:
        root: Where the file system begins.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_core(root, number) for number in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    shares = (_share(group) for group in _groups(root, "cpu"))
    return max(1, math.ceil(min([cores, *shares])))


def _core(root: Path, number: int) -> str:
    """The processors on the core of one, which name the core; without a topology itself."""
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    # The newer name, and the one that older kernels have.
    return (
        _read(topology / "core_cpus_list")
        or _read(topology / "thread_siblings_list")
        or str(number)
    )


def _share(group: Path) -> float:
    """The processors that a control group may keep busy, `inf` without a quota."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", nor -1
        return int(quota) / int(period)
    return math.inf


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of the control groups that the process is in, each before its parent."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version_2 = not controllers
        if version_2 or controller in controllers.split(","):
            yield from _levels(root, None if version_2 else controller, PurePosixPath(path))


def _levels(root: Path, controller: str | None, path: PurePosixPath) -> Iterator[Path]:
    """The directory of one control group, and those above it as far as they can be seen.

    A mount may show a part of the tree alone, as containers have it. If the group is not in
    that part, as seen from here, then the top of the part is the nearest that is known.
    """
    mounts = list(_mounts(root, controller))
    below = [
        (point, path.relative_to(top))
        for top, point in mounts
        if path.is_relative_to(top) and ".." not in path.relative_to(top).parts
    ]
    for point, inside in below or [(point, PurePosixPath()) for _, point in mounts]:
        for level in (inside, *inside.parents):
            yield root / point / level


def _mounts(root: Path, controller: str | None) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """What is mounted of a tree of control groups, and where, relative to the root.

    Args:
        root: Where the file system begins.
        controller: Of version 1, which has a tree for each; `None` is the tree of version 2.
    """
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if (controller is None and kind == "cgroup2") or (
            kind == "cgroup" and controller in options.split(",")
        ):
            top, point = (_unescaped(field) for field in mount.split(" ")[3:5])
            yield PurePosixPath(top), PurePosixPath(point.lstrip("/"))


def _unescaped(field: str) -> str:
    """A path of `mountinfo`, where spaces and their like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read(file: Path) -> str:
    """The text of a file without the space around it, empty if it can't be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
