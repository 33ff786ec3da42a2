"""What the process may use: control groups of both versions, affinity masks, and cores."""

from __future__ import annotations

import ctypes
import os
import sys
import types
from pathlib import Path

import pytest

from rbln_vae import host
from rbln_vae.host import usable_memory, usable_processors

MIB = 2**20
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED_V1 = "9223372036854771712"

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 25 0:31 {top} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
V1_CPU = "36 25 0:32 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
OTHER = "22 1 8:1 / / rw,relatime shared:1 master:2 - ext4 /dev/sda1 rw,errors=remount-ro"


def mounts(*lines: str, top: str = "/") -> str:
    return "\n".join([OTHER, *(line.format(top=top) for line in lines)]) + "\n"


TREES: dict[str, tuple[dict[str, str], float, float]] = {
    # name: files, bytes of memory and processors that may be used
    "a systemd service with limits of its own": (
        {
            "proc/self/cgroup": "0::/system.slice/vae.service\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/system.slice/vae.service/memory.max": "536870912\n",
            "sys/fs/cgroup/system.slice/vae.service/memory.high": "max\n",
            "sys/fs/cgroup/system.slice/vae.service/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
        },
        512 * MIB,
        3,
    ),
    "a systemd slice that is tighter than the service in it": (
        {
            "proc/self/cgroup": "0::/batch.slice/batch-low.slice/vae.service\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/batch.slice/batch-low.slice/vae.service/memory.max": "1073741824\n",
            "sys/fs/cgroup/batch.slice/batch-low.slice/vae.service/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/batch.slice/batch-low.slice/memory.max": "max\n",
            "sys/fs/cgroup/batch.slice/memory.max": "268435456\n",
            "sys/fs/cgroup/batch.slice/cpu.max": "100000 100000\n",
        },
        256 * MIB,
        1,
    ),
    "a service that is slowed down before its limit": (
        {
            "proc/self/cgroup": "0::/system.slice/vae.service\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/system.slice/vae.service/memory.max": "536870912\n",
            "sys/fs/cgroup/system.slice/vae.service/memory.high": "402653184\n",
        },
        384 * MIB,
        4,
    ),
    "a session without limits": (
        {
            "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-2.scope\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope/cpu.max": "max 100000\n",
        },
        MACHINE,
        4,
    ),
    "a Slurm step, version 1": (
        {
            "proc/self/cgroup": "11:memory:/slurm/uid_1000/job_7/step_0/task_0\n"
            "10:cpuset:/slurm/uid_1000/job_7/step_0\n"
            "4:cpu,cpuacct:/system.slice/slurmd.service\n"
            "1:name=systemd:/system.slice/slurmd.service\n",
            "proc/self/mountinfo": mounts(V1_MEMORY, V1_CPU),
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/step_0/task_0/memory.limit_in_bytes": (
                UNLIMITED_V1
            ),
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/step_0/memory.limit_in_bytes": "419430400\n",
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/memory.limit_in_bytes": "314572800\n",
            "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/cpu,cpuacct/system.slice/slurmd.service/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/system.slice/slurmd.service/cpu.cfs_period_us": "100000\n",
        },
        300 * MIB,
        4,
    ),
    "a Slurm step, version 2": (
        {
            "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max": "209715200\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/cpu.max": "150000 100000\n",
        },
        200 * MIB,
        2,
    ),
    "a Docker container, version 2, with a namespace": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/memory.max": "104857600\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        100 * MIB,
        1,
    ),
    "a Docker container, version 1, which sees its own groups alone": (
        {
            "proc/self/cgroup": "9:memory:/docker/0123abcd\n5:cpuacct,cpu:/docker/0123abcd\n",
            "proc/self/mountinfo": mounts(V1_MEMORY, V1_CPU, top="/docker/0123abcd"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "104857600\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        100 * MIB,
        2,
    ),
    "a group within what a container sees": (
        {
            "proc/self/cgroup": "9:memory:/docker/0123abcd/job\n",
            "proc/self/mountinfo": mounts(V1_MEMORY, top="/docker/0123abcd"),
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "52428800\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "104857600\n",
        },
        50 * MIB,
        4,
    ),
    "a process that was moved out of its container's groups": (
        {
            "proc/self/cgroup": "0::/../other\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/memory.max": "104857600\n",
            "sys/fs/other/memory.max": "1048576\n",
        },
        100 * MIB,
        4,
    ),
    "both versions, the controllers in the first": (
        {
            "proc/self/cgroup": "5:memory:/user.slice\n3:cpu,cpuacct:/user.slice\n"
            "1:name=systemd:/user.slice/session-1.scope\n0::/user.slice/session-1.scope\n",
            "proc/self/mountinfo": mounts(
                V1_MEMORY, V1_CPU, V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
            ),
            "sys/fs/cgroup/unified/user.slice/session-1.scope/cgroup.procs": "1\n",
            "sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes": "104857600\n",
            "sys/fs/cgroup/cpu,cpuacct/user.slice/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/user.slice/cpu.cfs_period_us": "100000\n",
        },
        100 * MIB,
        3,
    ),
    "both versions, memory in the second": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n0::/b\n",
            "proc/self/mountinfo": mounts(
                V1_CPU, V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
            ),
            "sys/fs/cgroup/unified/b/memory.max": "104857600\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
        100 * MIB,
        1,
    ),
    "groups that are mounted elsewhere, under a name with a space": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": mounts(V2.replace("/sys/fs/cgroup", r"/mnt/control\040groups")),
            "mnt/control groups/a/memory.max": "104857600\n",
            "mnt/control groups/a/cpu.max": "100000 100000\n",
        },
        100 * MIB,
        1,
    ),
    "a limit beyond what the machine has": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/a/memory.max": f"{2**60}\n",
            "sys/fs/cgroup/a/cpu.max": "12800000 100000\n",
        },
        MACHINE,
        4,
    ),
    "groups that are mounted nowhere": (
        {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": mounts()},
        MACHINE,
        4,
    ),
    "files that hold something else": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": mounts(V2),
            "sys/fs/cgroup/a/memory.max": "",
            "sys/fs/cgroup/a/cpu.max": "many\n",
        },
        MACHINE,
        4,
    ),
    "a system without /proc": ({}, MACHINE, 4),
}


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is the process's own, wherever the tree comes from."""
    allow(monkeypatch, {0, 1, 2, 3})


def allow(monkeypatch: pytest.MonkeyPatch, mask: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: mask, raising=False)


# Control groups


@pytest.mark.parametrize("tree", TREES)
def test_the_tightest_limit_on_memory_holds(tmp_path: Path, tree: str) -> None:
    files, memory, _ = TREES[tree]
    assert usable_memory(lay_out(tmp_path, files)) == min(memory, MACHINE)


@pytest.mark.parametrize("tree", TREES)
def test_the_tightest_quota_of_time_holds_rounded_up(tmp_path: Path, tree: str) -> None:
    files, _, processors = TREES[tree]
    assert usable_processors(lay_out(tmp_path, files)) == processors


def test_this_machine_has_memory_and_processors() -> None:
    assert 64 * MIB < usable_memory() <= MACHINE
    assert 1 <= usable_processors() <= 4


# Cores


def topology(file: str, *cores: str) -> dict[str, str]:
    """Processors that share cores: `"0,4"` is a core of two."""
    return {
        f"sys/devices/system/cpu/cpu{number}/topology/{file}": f"{core}\n"
        for core in cores
        for number in core.split(",")
    }


@pytest.mark.parametrize("file", ["core_cpus_list", "thread_siblings_list"])
@pytest.mark.parametrize(
    ("mask", "cores"),
    [
        ({0, 1, 2, 3, 4, 5, 6, 7}, 4),
        ({0, 4}, 1),  # one core, both of its processors
        ({0, 1, 2, 3}, 4),  # one processor of each
        ({0, 4, 1}, 2),
        ({7}, 1),
    ],
)
def test_processors_that_share_a_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, mask: set[int], cores: int
) -> None:
    allow(monkeypatch, mask)
    root = lay_out(tmp_path, topology(file, "0,4", "1,5", "2,6", "3,7"))
    assert usable_processors(root) == cores


def test_of_two_names_for_the_same_list_the_newer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, topology("thread_siblings_list", "0", "1"))
    lay_out(tmp_path, topology("core_cpus_list", "0,1"))
    allow(monkeypatch, {0, 1})
    assert usable_processors(tmp_path) == 1


def test_a_quota_may_be_less_than_the_cores(tmp_path: Path) -> None:
    files, *_ = TREES["a Docker container, version 1, which sees its own groups alone"]
    root = lay_out(tmp_path, {**files, **topology("core_cpus_list", "0", "1", "2", "3")})
    assert usable_processors(root) == 2


def test_cores_may_be_less_than_the_quota(tmp_path: Path) -> None:
    files, *_ = TREES["a systemd service with limits of its own"]
    root = lay_out(tmp_path, {**files, **topology("core_cpus_list", "0,1", "2,3")})
    assert usable_processors(root) == 2


@pytest.mark.parametrize(("counted", "expected"), [(6, 6), (None, 1)])
def test_without_masks_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert usable_processors(tmp_path) == expected


def test_without_affinity_masks_the_physical_cores_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(host, "_sysctl", {"hw.physicalcpu": 6}.__getitem__)
    assert usable_processors(tmp_path) == 6


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has the call")
def test_without_sysctl_all_processors_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_processors(tmp_path) == 12


def test_sysctl_reads_what_the_system_writes(monkeypatch):
    """Through a stand-in for the C library, which writes a number of 32 bits."""

    def sysctlbyname(name, value, size, new, new_size):
        assert (name, new, new_size) == (b"hw.physicalcpu", None, None)
        assert size._obj.value == 8
        ctypes.memmove(value, ctypes.byref(ctypes.c_int32(10)), 4)
        return 0

    library = types.SimpleNamespace(sysctlbyname=sysctlbyname)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert host._sysctl("hw.physicalcpu") == 10
