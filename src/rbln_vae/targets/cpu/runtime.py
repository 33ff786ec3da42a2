"""A part of a model on this machine's processor."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ... import _engine
from ...errors import RBLNTargetUnavailableError
from ...graph.ir import Graph, Shape
from ...profiler import RunProfile
from ...profiler import Step as StepTime
from ..base import over_memory_limit, timed_out
from .packing import DTYPES, pack
from .planner import Machine, Plan, make_plan

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""The instruction sets of the engine, the best last."""

CACHED_PLANS = 64
KEPT_PROFILES = 16


def usable_kernels() -> list[_engine.Kernels]:
    """The kernels that this machine can run and `RBLN_VAE_ISA` allows, the best last.

    Raises:
        ValueError: `RBLN_VAE_ISA` is no instruction set.
        RBLNTargetUnavailableError: It is one that this machine doesn't have.
    """
    kernels = _engine.all_kernels()
    forced = os.environ.get("RBLN_VAE_ISA")
    if not forced:
        return kernels
    if forced not in ISAS:
        raise ValueError(f"RBLN_VAE_ISA is {forced!r}, expected one of {', '.join(ISAS)}.")
    present = {each.isa for each in kernels}
    if forced not in present:
        raise RBLNTargetUnavailableError(
            f"RBLN_VAE_ISA is {forced!r}, but this machine only has "
            f"{', '.join(isa for isa in ISAS if isa in present)}."
        )
    most = ISAS.index(forced)
    return [each for each in kernels if ISAS.index(each.isa) <= most]


@functools.cache
def measured_limit(isa: str, dtype: str, threads: int) -> float:
    """Floating-point operations per second that so many threads can do; 0 if not known.

    Measured once in a process, for a tenth of a second, on random data.
    """
    (kernels,) = (k for k in _engine.all_kernels() if (k.isa, k.dtype) == (isa, dtype))
    return kernels.measure_limit(threads, 0.1)


def best_dtype() -> str:
    """`"bfloat16"` where the machine multiplies it faster than float32."""
    return usable_kernels()[-1].dtype


def usable_memory() -> int:
    """Bytes of the machine, or of the control group that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def _aligned(weight: Tensor) -> Tensor:
    """The weight, or a copy that begins on a line of the cache.

    Kernels read lines; a file that is mapped may have put them astride of two.
    """
    return weight if weight.data_ptr() % 64 == 0 else weight.clone()


class CpuRuntime:
    """Runs a graph with the native engine; any number of threads may share it.

    Args:
        graph: What the passes made of it. With `packed` only the shapes of its weights
            are read, so that they may be on the meta device.
        packed: What `packing.pack` made of the weights for `dtype`.
        dtype: In what to compute; `None` is what is fastest here.
        num_threads: Threads of a run; `None` is one for each processor that this
            process may use.
        memory_limit: The most bytes that a run may take, besides the weights; `None` is
            the memory of the machine or of the control group, whichever is less.
        timeout: Seconds that a run may take.
        activate_profiler: Whether to keep the times of the latest runs.
    """

    def __init__(
        self,
        graph: Graph,
        packed: Mapping[str, Tensor] | None = None,
        *,
        dtype: str | None = None,
        num_threads: int | None = None,
        memory_limit: int | None = None,
        timeout: float = 60.0,
        activate_profiler: bool = False,
    ) -> None:
        dtype = best_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}.")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}, expected at least 1.")
        self.graph = graph
        self.timeout = timeout
        self.memory_limit = usable_memory() if memory_limit is None else memory_limit
        weights = pack(graph, dtype) if packed is None else packed
        self._packed = {name: _aligned(tensor) for name, tensor in weights.items()}
        self._kernels = [each for each in usable_kernels() if each.dtype == dtype][-1]
        self._executor = _engine.Executor(num_threads or _engine.usable_processors())
        self.machine = Machine(
            isa=self._kernels.isa,
            dtype=dtype,
            rows=self._kernels.rows,
            pixels=self._kernels.pixels,
            panels=self._kernels.panels,
            threads=self._executor.threads,
        )
        self._plans: dict[Shape, tuple[Plan, _engine.Plan]] = {}
        self._lock = threading.Lock()
        self._profiles: deque[RunProfile] | None = None
        if activate_profiler:
            self._profiles = deque(maxlen=KEPT_PROFILES)
            self._limit = measured_limit(self._kernels.isa, dtype, self._executor.threads)

    def plan(self, shape: Shape) -> Plan:
        """What a run on an input of that shape does; `print(plan.describe())`."""
        return self._planned(tuple(shape))[0]

    def memory_needed(self, shape: Shape) -> int:
        """Bytes that a run on an input of that shape takes, besides weights."""
        return self._executor.bytes(self._planned(tuple(shape))[1])

    def run(self, image: Tensor) -> Tensor:
        """Run the part.

        Args:
            image: `(N, C, H, W)` on the CPU, of any floating dtype and strides.

        Returns:
            A new contiguous tensor in the dtype of the input.

        Raises:
            TimeoutError: The run took longer than the timeout.
            MemoryError: It would need more than the memory limit, or than there is.
        """
        if not image.is_floating_point():
            raise TypeError(f"The input is {image.dtype}, expected a floating-point tensor.")
        plan, native = self._planned(tuple(image.shape))
        self._check_memory(plan, self._executor.bytes(native))
        source = image.detach()
        if source.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            source = source.to(torch.float32)
        result = torch.empty(plan.output_shape, dtype=source.dtype)
        start = time.time()
        profile = self._profiles is not None
        try:
            times = self._executor.run(native, source, result, self.timeout, profile)
        except TimeoutError:
            raise timed_out(self.timeout) from None
        if self._profiles is not None:
            self._profiles.append(self._profile(plan, start, times))
        return result.to(image.dtype)

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active."""
        return list(self._profiles or ())

    def release_memory(self) -> None:
        """Give the memory that is kept for the next run back to the system."""
        self._executor.release()

    def _planned(self, shape: Shape) -> tuple[Plan, _engine.Plan]:
        with self._lock:
            known = self._plans.get(shape)
        if known is not None:
            return known
        if len(shape) != 4 or min(shape) < 1 or shape[1] != self.graph.input_channels:
            raise ValueError(
                f"The input has shape {shape}, expected (N, {self.graph.input_channels}, H, W)."
            )
        plan = make_plan(self.graph, shape, self.machine)
        made = plan, self._bind(plan)
        with self._lock:
            while len(self._plans) >= CACHED_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[shape] = made
        return made

    def _check_memory(self, plan: Plan, needed: int) -> None:
        if needed > self.memory_limit:
            raise over_memory_limit(self.graph.name, plan.input_shape, needed, self.memory_limit)

    def _bind(self, plan: Plan) -> _engine.Plan:
        # Before the engine hears of sizes that it can't count.
        self._check_memory(plan, plan.arena_bytes)
        native = _engine.Plan(self._kernels, plan.arena_bytes, plan.input_shape, plan.output_shape)
        for step in plan.steps:
            weights = {name: self._packed[weight] for name, weight in step.weights.items()}
            getattr(native, step.call)(**step.arguments, **weights)
        return native

    def _profile(self, plan: Plan, start: float, times: list[tuple[float, float]]) -> RunProfile:
        steps = tuple(
            StepTime(step.name, step.kind, begin, end - begin, step.flops, step.bytes)
            for step, (begin, end) in zip(plan.steps, times, strict=True)
        )
        return RunProfile(self.graph.name, plan.input_shape, start, steps, self._limit)
