"""The memory and processors that the process may use, within the limits of control groups.

Linux keeps processes in a tree of control groups. Each group may limit memory and processor
time for everything below it. Versions 1 and 2 are supported, even mixed. Other systems have no
control groups, so the whole machine counts; macOS tells its cores by `sysctl`.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def usable_memory(root: Path = _ROOT) -> int:
    """The bytes of memory that the process may use: the machine's memory, or a lower limit.

    `memory.high` counts like `memory.max`: a process may exceed it, but the kernel then slows
    the process down severely.

    Args:
        root: The root of the file system, by default `/`.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _read(group / name)
            if text.isdecimal():  # not "max"
                limits.append(int(text))
    return min(limits)


def usable_processors(root: Path = _ROOT) -> int:
    """The number of physical cores that the process may use, or less if it has a CPU quota.

    Processors that share a core count once, because they also share its cache. Only processors
    in the affinity mask of the process count.

    Args:
        root: The root of the file system, by default `/`.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_core(root, number) for number in os.sched_getaffinity(0)})
    else:
        cores = _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    shares = (_share(group) for group in _groups(root, "cpu"))
    return max(1, math.ceil(min([cores, *shares])))


def _core(root: Path, number: int) -> str:
    """A name for the core of a processor: the list of its processors, or else the number."""
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    # The second name is that of older kernels.
    return (
        _read(topology / "core_cpus_list")
        or _read(topology / "thread_siblings_list")
        or str(number)
    )


def _sysctl(name: str) -> int:
    """A number that macOS knows of the machine; 0 where there is none."""
    value = ctypes.c_int64(0)  # large enough for numbers of 32 bits, too
    size = ctypes.c_size_t(ctypes.sizeof(value))
    read = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if read is None or read(name.encode(), ctypes.byref(value), ctypes.byref(size), None, None):
        return 0
    return value.value


def _share(group: Path) -> float:
    """The number of processors that the quota of a control group allows; `inf` without one."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", nor -1
        return int(quota) / int(period)
    return math.inf


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of the process's control groups, each before its parent."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version_2 = not controllers
        if version_2 or controller in controllers.split(","):
            yield from _levels(root, None if version_2 else controller, PurePosixPath(path))


def _levels(root: Path, controller: str | None, path: PurePosixPath) -> Iterator[Path]:
    """The directories of a control group and of its visible ancestors.

    A mount may show only a part of the tree, as in containers. If the group is not in that
    part, the top of the part is used instead.
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
    """The mounted parts of a tree of control groups, and their mount points below the root.

    Args:
        root: The root of the file system.
        controller: The controller of version 1, which has one tree per controller; `None` is
            the tree of version 2.
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
    """A path of `mountinfo`, in which special characters are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read(file: Path) -> str:
    """The stripped text of a file; empty if it can't be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
