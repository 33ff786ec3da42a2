"""Runs a part of a model on the CPU, with the engine."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ... import _engine
from ...errors import RBLNRuntimeError, RBLNTargetUnavailableError
from ...graph.ir import Graph, Shape, Value
from ...host import usable_memory, usable_processors
from ...profiler import RunProfile
from ...profiler import Step as StepTime
from ...schedule import fitting
from ...schedule.schedule import Schedule
from ...schedule.search import Search
from ...sizes import format_size
from ...units import format_bytes, format_seconds
from ..allocation import torch_allocates
from ..base import OnRows, beyond_float16, only_images, over_memory_limit
from ..stream import Chunks, Stream, Streams, frame_shape
from ..watch import Progress, ShouldStop, Watch
from .kept import Bound, KeptKernels
from .lower import ADDRESSABLE, lower
from .packing import DTYPES, in_bfloat16, pack
from .program import EMPTY, Program, Step
from .rules import CpuRules
from .tiles import FASTEST, Choices, Machine

EXCHANGED = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of callers' tensors that the engine reads and writes."""

TILING_TIME = 1.5
"""The most time of a run that saves memory (`enable_tiling`), by estimate, as a multiple of the
time of the fastest."""

CACHED_PROGRAMS = 64
KEPT_PROFILES = 16
KEPT_SHARE = 1 / 8
"""The most transformed kernels that are kept, as a share of the memory of the machine."""


def left_out_warning() -> str | None:
    """What a user should know of instruction sets that this build lacks; `None` if it has all."""
    left_out = _engine.left_out()
    if not left_out:
        return None
    return (
        f"This build of rbln-vae has no kernels for {', '.join(left_out)}, which this processor "
        "has, so runs may be several times slower. Install a wheel of rbln-vae, or build it with "
        "another compiler: pip install --verbose prints what the build leaves out, and why."
    )


@functools.cache
def _warn_of_left_out() -> None:
    """Warn of instruction sets that this build lacks, once in a process."""
    if (warning := left_out_warning()) is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)


def usable_kernels() -> list[_engine.Kernels]:
    """The kernels that this machine can run and `RBLN_VAE_ISA` allows, the best last.

    If an instruction set has kernels for both dtypes, both multiply in float32, and those of
    float32 come last.

    Raises:
        ValueError: `RBLN_VAE_ISA` does not name an instruction set.
        RBLNTargetUnavailableError: This machine or this build lacks that instruction set.
    """
    kernels = _engine.all_kernels()
    forced = os.environ.get("RBLN_VAE_ISA")
    if not forced:
        return kernels
    known = _engine.instruction_sets()
    if forced not in known:
        raise ValueError(f"RBLN_VAE_ISA is {forced!r}, expected one of {', '.join(known)}.")
    present = {each.isa for each in kernels}
    if forced not in present:
        raise RBLNTargetUnavailableError(
            f"RBLN_VAE_ISA is {forced!r}, but this machine and this build only have "
            f"{', '.join(isa for isa in known if isa in present)}."
        )
    allowed = known[: known.index(forced) + 1]
    return [each for each in kernels if each.isa in allowed]


@functools.cache
def measured_limit(isa: str, dtype: str, threads: int) -> float:
    """The peak of a number of threads in floating-point operations per second; 0 if unknown.

    It is measured once in a process, for a tenth of a second, with random data.
    """
    (kernels,) = (k for k in _engine.all_kernels() if (k.isa, k.dtype) == (isa, dtype))
    return kernels.measure_limit(threads, 0.1)


def best_dtype() -> str:
    """`"bfloat16"` if the machine multiplies it faster than float32, else `"float32"`."""
    return usable_kernels()[-1].dtype


def _chosen_kernels(dtype: str) -> _engine.Kernels:
    """The best kernels for a dtype that the operating system permits."""
    return next(k for k in reversed(usable_kernels()) if k.dtype == dtype and k.prepare())


def _aligned(weight: Tensor) -> Tensor:
    """The weight, or a copy of it that is aligned to a cache line.

    Kernels read whole cache lines, and a tensor in a mapped file may not be aligned.
    """
    return weight if weight.data_ptr() % 64 == 0 else weight.clone()


@contextlib.contextmanager
def _threads_start() -> Iterator[None]:
    """Turn a failure to start threads into an error that says what to do."""
    try:
        yield
    except _engine.ThreadsUnavailableError as error:
        raise RBLNRuntimeError(
            f"The threads of a run can't be started: {error}. Give a smaller num_threads, or raise "
            "the limit of processes (ulimit -u, or the pids limit of the container)."
        ) from None


def _check_apart(image: Tensor, out: Tensor) -> None:
    """Raise a `ValueError` if `out` overlaps the image, or if elements of `out` overlap.

    The engine reads and writes at the same time, in no defined order.
    """
    axes = sorted((stride, size) for stride, size in zip(out.stride(), out.shape, strict=True))
    end = 0  # the reach of all axes with smaller strides
    for stride, size in axes:
        if size > 1 and stride <= end:
            raise ValueError(
                f"out has the strides {out.stride()}, so that several of its elements share "
                "memory. Give a tensor whose elements lie apart."
            )
        end += (size - 1) * stride
    (first, last), (begin, end) = _extent(image), _extent(out)
    if first < end and begin < last:
        raise ValueError(
            "out shares memory with the input, which is still read while the result is written. "
            "Give another tensor."
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor's elements, and the one after the last."""
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = tensor.data_ptr()
    return begin, begin + (reach + 1) * tensor.element_size()


def _new_result(shape: Shape, dtype: torch.dtype, levels: bool) -> Tensor:
    """Memory for the result of an input of a dtype."""
    if levels:
        batch, channels, height, width = shape
        last = torch.empty(batch, height, width, channels, dtype=torch.uint8)
        return last.permute(0, 3, 1, 2)
    return torch.empty(shape, dtype=dtype if dtype.is_floating_point else torch.float32)


class CpuRuntime:
    """Runs a part with the engine; any number of threads may share it.

    Args:
        graph: The optimised graph; of a part that runs videos, that of later runs, and images are
            run by that of the first run. With `packed`, only the shapes of the weights are read,
            so they may be on the meta device.
        packed: The result of `packing.pack` for `dtype`; `None` packs the graph's weights.
        dtype: The dtype of the computation; `None` is the fastest on this machine.
        num_threads: The threads of a run; `None` is one per core that this process may use.
        memory_limit: The most bytes of a run besides the weights: activations, scratch memory
            of its threads, transformed kernels that are kept for the next run, and the result.
            `None` is the memory of the machine or of the control group, whichever is less. A
            run is as fast as the limit allows, and the limit does not change its bits.
        timeout: The most seconds of a run; `None` is no limit.
        activate_profiler: Whether to keep the times of the latest runs, by default not.
        choices: What its programs may do to be faster; by default everything.
    """

    def __init__(
        self,
        graph: Graph,
        packed: Mapping[str, Tensor] | None = None,
        *,
        dtype: str | None = None,
        num_threads: int | None = None,
        memory_limit: int | None = None,
        timeout: float | None = None,
        activate_profiler: bool = False,
        choices: Choices = FASTEST,
    ) -> None:
        dtype = best_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}.")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}, expected at least 1.")
        self.graph = graph.start.stateless()
        self.timeout = timeout
        limit = usable_memory() if memory_limit is None else memory_limit
        self.memory_limit = min(limit, ADDRESSABLE)
        self._most_kept = int(KEPT_SHARE * usable_memory()) if choices.kept_kernels else 0
        weights = pack(graph, dtype) if packed is None else packed
        self._packed = {name: _aligned(tensor) for name, tensor in weights.items()}
        _warn_of_left_out()
        self._kernels = _chosen_kernels(dtype)
        with _threads_start():
            self._executor = _engine.Executor(num_threads or usable_processors())
        self.machine = Machine(self._kernels, self._executor.threads)
        self.choices = choices
        self._slicing = self._tiling = False
        self._packed_in_bfloat16: Mapping[str, Tensor] | None = None
        self._bound: dict[tuple[Shape, int, bool, bool], Bound] = {}
        self.kept_kernels = KeptKernels(self._packed, self._executor.release)
        self._profiles: deque[RunProfile] | None = None
        if activate_profiler:
            self._profiles = deque(maxlen=KEPT_PROFILES)
            self._limit = measured_limit(self._kernels.isa, dtype, self._executor.threads)
        self._of_videos: tuple[CpuRuntime, ...] = ()
        self._streams: Streams[Bound] | None = None
        if graph.first is not None:
            first, later = self._of_videos = self._of_graph(graph.first), self._of_graph(graph)
            self._streams = Streams(first, later)

    def _of_graph(self, graph: Graph) -> CpuRuntime:
        """What runs another graph with the same weights, threads and memory."""
        other = copy.copy(self)
        other.graph, other._bound = graph, {}
        return other

    def program(self, shape: Shape) -> Program:
        """The program for an input shape; `print(program.describe())` shows it.

        If the batch does not fit in the memory limit, the program is for a smaller batch.
        """
        return self._planned(tuple(shape)).program

    def rules(self, shape: Shape) -> CpuRules:
        """The engine's rules for schedules of an input shape."""
        return CpuRules(self.graph, shape, self.machine, self.choices)

    def search(self, shape: Shape) -> Search[CpuRules]:
        """The search over schedules for an input shape."""
        return Search(self.graph, shape, self.rules)

    def execute(self, program: Program, image: Tensor) -> Tensor:
        """Run a program for this graph and machine, without a memory limit.

        Args:
            program: A result of `lower`, for any schedule of this graph.
            image: The input in the shape of the schedule, float32, float16 or bfloat16.

        Returns:
            A new tensor in float32.
        """
        result = torch.empty(program.schedule.output_shape)
        self._execute(self._bind(program), image, result, Watch(self.timeout))
        return result

    def memory_needed(self, shape: Shape) -> int:
        """The bytes of a run for an input shape, with its result and without weights.

        Raises:
            ValueError: The shape is not valid for the part.
            MemoryError: Every schedule exceeds the memory limit.
        """
        shape = tuple(shape)
        if len(shape) == 5:
            frame = frame_shape(shape)
            return self._streams_of(frame).memory_needed(frame)
        return self.bytes_of(self._planned(shape)) + self._result_bytes(shape)

    def seconds_expected(self, shape: Shape) -> float | None:
        """About how long a run takes, from the work of its steps and the peak of this machine.

        Raises:
            ValueError, MemoryError: As `memory_needed`.
        """
        shape = tuple(shape)
        if len(shape) == 5:
            frame = frame_shape(shape)
            first, later = self._streams_of(frame).fitted(frame)
            runs = self.chunks(frame).later_runs(shape[2])
            times = self._seconds(first.steps), self._seconds(later.steps, runs)
            known = [each for each in times if each is not None]
            return shape[0] * sum(known) if len(known) == 2 else None
        bound = self._planned(shape)
        parts = -(-shape[0] // bound.program.schedule.input_shape[0])
        return self._seconds(bound.beside_kept if bound.kept_bytes else bound.steps, parts)

    def describe(self, shape: Shape, *, steps: bool = False) -> str:
        """The memory and the work of a run, and those of other schedules."""
        shape = tuple(shape)
        if len(shape) == 5:
            return self._describe_stream(shape, steps)
        result = self._result_bytes(shape)
        bound = self._planned(shape)
        schedule, kept = bound.program.schedule, bound.kept_bytes
        parts = -(-shape[0] // schedule.input_shape[0])
        lines = [
            f"{self.graph.name} on {format_size(shape)}, {self.machine.dtype}, {self.machine.isa}, "
            f"{self.machine.threads} threads",
            f"memory      {format_bytes(bound.bytes + kept + result)}: "
            f"{format_bytes(schedule.arena_bytes)} for activations, "
            f"{format_bytes(bound.bytes - schedule.arena_bytes)} for threads, "
            + (f"{format_bytes(kept)} for kept kernels, " if kept else "")
            + f"{format_bytes(result)} for the result",
            f"work        {parts * schedule.flops / 1e12:.3f} TFLOP, "
            f"{schedule.extra_work:.1%} of it extra"
            + (f", in {parts} parts of the batch" if parts > 1 else ""),
            f"time        {self._estimate(bound.beside_kept if kept else bound.steps, parts)}",
            "",
            f"{'memory':>14} {'extra work':>11} {'time':>14}  computed again, in strips",
        ]
        search = self.search(shape)
        for other in search.tradeoffs():
            lowered = dataclasses.replace(self._lowered(other, search), spare=self._most_kept)
            again = ", ".join(other.recomputed) or "nothing"
            rows = [(lowered.bytes, lowered.steps, again)]
            if lowered.kept_bytes and not other.recomputed:
                most = lowered.bytes + lowered.kept_bytes
                rows = [(most, lowered.beside_kept, again), (*rows[0][:2], "transformed kernels")]
            for needed, taken, again in rows:
                memory, time = format_bytes(needed + result), self._estimate(taken)
                lines.append(f"{memory:>14} {other.extra_work:>11.1%} {time:>14}  {again}")
        return "\n".join([*lines, "", bound.program.describe()] if steps else lines)

    def _describe_stream(self, shape: Shape, steps: bool) -> str:
        frame = frame_shape(shape)
        streams = self._streams_of(frame)
        bounds, chunks = streams.fitted(frame), streams.chunks(frame)
        state, least = streams.state_bytes(frame), streams.memory_needed(frame)
        count = chunks.given[0] + chunks.later_runs(shape[2]) * chunks.given[1]
        lines = [
            f"{self.graph.name} on {shape[2]} frames of {format_size(frame)}, "
            f"{self.machine.dtype}, {self.machine.isa}, {self.machine.threads} threads",
            f"memory      {format_bytes(least)} for any number of frames: {format_bytes(state)} "
            f"for state, {format_bytes(least - state - chunks.result_bytes)} for activations and "
            f"threads, {format_bytes(chunks.result_bytes)} for {chunks.given[1]} frames of the "
            "result",
        ]
        for name, bound, given in zip(("first", "later"), bounds, chunks.given, strict=True):
            lines.append(
                f"{name:<12}{given} of {count} frames in "
                f"{bound.program.schedule.flops / 1e12:.3f} TFLOP, {self._estimate(bound.steps)}"
            )
        total = self.seconds_expected(shape)
        lines.append(f"time        {'not known' if total is None else format_seconds(total)}")
        if steps:
            lines += [f"\n{bound.program.describe()}" for bound in bounds]
        return "\n".join(lines)

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Use less memory than the limit allows.

        Args:
            slicing: Whether to run the images of a batch one by one.
            tiling: Whether to run each image in the least memory that takes at most
                `TILING_TIME` times as long, by estimate. Less memory is used only if the limit
                requires it.
        """
        for runtime in (self, *self._of_videos):
            runtime._slicing, runtime._tiling = slicing, tiling

    # Videos.

    def chunks(self, shape: Shape) -> Chunks:
        """What the runs of a stream take and give.

        Args:
            shape: `(N, C, H, W)` of a frame.

        Raises:
            ValueError: The part takes no such frames, or runs images alone.
        """
        return self._streams_of(shape).chunks(shape)

    def stream(
        self,
        shape: Shape,
        result_bytes: int | None = None,
        memory_limit: int | None = None,
    ) -> Stream:
        """Begin to run the part on a batch of videos; see `Runtime.stream`."""
        shape = tuple(shape)
        return self._streams_of(shape).begin(shape, result_bytes, memory_limit)

    def _streams_of(self, shape: Shape) -> Streams[Bound]:
        """What runs videos of frames of a shape."""
        self._check_shape(shape)
        if self._streams is None:
            raise only_images(self.graph.name)
        return self._streams

    def bytes_of(self, planned: Bound) -> int:
        """The bytes of a run, without its result."""
        return planned.bytes + planned.kept_bytes

    def new_state(self, size: int) -> Tensor:
        """Memory for the state of one video, in bytes."""
        return _engine.allocate(size // 4)

    def run_chunk(
        self,
        planned: Bound,
        state: Tensor,
        inputs: list[Tensor],
        outputs: list[Tensor],
        watch: Watch,
    ) -> None:
        """Run a chunk of one video, whose state follows."""
        with torch_allocates():
            taken = (*EXCHANGED, torch.uint8)
            sources = [each if each.dtype in taken else each.float() for each in inputs]
            results = [
                each if each.dtype in taken else torch.empty_like(each, dtype=torch.float32)
                for each in outputs
            ]
        watch.check()
        nothing = torch.empty(EMPTY)
        bound = self.kept_kernels.beside(
            planned, lambda plan: self._run_plan(plan, [nothing], [nothing], watch, lambda _: 0)
        )
        self._run_bound(bound, sources, results, watch, 0, state=state)
        for result, output in zip(results, outputs, strict=True):
            if result is not output:
                output.copy_(result)

    def run(
        self,
        image: Tensor,
        out: Tensor | None = None,
        should_stop: ShouldStop | None = None,
        *,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        levels: bool = False,
        finite: Tensor | None = None,
        on_rows: OnRows | None = None,
    ) -> Tensor:
        """Run the part.

        Args:
            image: The input `(N, C, H, W)` on the CPU, of any floating dtype and strides, or
                uint8 for the levels of a picture.
            out: The tensor to write to, in the shape of the result, in float32, float16 or
                bfloat16, or uint8 for levels, with any strides. Its elements must not overlap
                each other or `image`. `None` makes a new tensor.
            should_stop: Called at most every 50 ms, on the calling thread; a true result
                stops the run, and an exception passes through. `None` never stops it.
            progress: Called as often with the work that is done and with all of it, as far as
                it is known by the steps' estimates, in thousandths of an image; and when the
                run is done. `None` is not called.
            memory_limit: The most bytes of this run, counted as those of the runtime; the
                smaller of both holds. Memory that earlier runs have left is given back where
                it would exceed the limit. `None` is that of the runtime.
            levels: Whether the result is the levels that show it; by default it is floats.
            finite: Gets whether each image had only finite values before they became
                levels: bool `(N,)`, contiguous.
            on_rows: Called on the calling thread with the first row and the rows `(N, C,
                rows, W)` as they are finished in all images, from the top. Meanwhile the run
                waits. A batch that runs in parts finishes its rows with the last part.

        Returns:
            `out`, or a new tensor: contiguous and in the dtype of the input (float32 if that
            is levels), or levels with channels last in memory.

        Raises:
            TypeError: The input is neither a floating-point tensor nor levels.
            ValueError: The shape of the input or `out` is not valid.
            TimeoutError: The run took longer than the timeout.
            RBLNCancelledError: `should_stop` returned true.
            MemoryError: The run needs more than the memory limit or the available memory.
        """
        shape = tuple(image.shape)
        self._check_shape(shape)
        watch = Watch(self.timeout, should_stop, progress, shape[0])
        watch.check()
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise TypeError(
                f"The input is {image.dtype}, expected a floating-point tensor, or uint8."
            )
        limit = self.memory_limit if memory_limit is None else min(memory_limit, self.memory_limit)
        taken = 0 if out is not None else self._result_bytes(shape, 1 if levels else 4)
        bound = self.fitted(shape, limit, taken)
        held = self._executor.idle_bytes + self.kept_kernels.bytes
        if memory_limit is not None and held > limit - taken:
            self.release_memory()
        source = image.detach()
        expected = (shape[0], *bound.program.schedule.output_shape[1:])
        dtypes = (torch.uint8,) if levels else EXCHANGED
        if out is not None and (tuple(out.shape) != expected or out.dtype not in dtypes):
            raise ValueError(
                f"out is {out.dtype} of the shape {tuple(out.shape)}, expected "
                f"{', '.join(map(str, dtypes))} of {expected}."
            )
        if out is not None:
            _check_apart(source, out)
        with torch_allocates():
            if source.dtype not in (*EXCHANGED, torch.uint8):
                source = source.to(torch.float32)
            result = _new_result(expected, source.dtype, levels) if out is None else out
        if finite is not None:
            finite.fill_(True)

        def rows_finished(first: int, rows: int) -> None:
            assert on_rows is not None
            on_rows(first, result[:, :, first : first + rows])

        may_overflow = self.machine.dtype == "float16"
        size = bound.program.schedule.input_shape[0]
        for begin in range(0, shape[0], size):
            part = source[begin : begin + size]
            if len(part) < size:
                bound = self.fitted(tuple(part.shape), limit, taken)
            last = begin + size >= shape[0]
            images = result[begin : begin + size]
            flags = None if finite is None else finite[begin : begin + size]
            rows = rows_finished if last and on_rows is not None and not may_overflow else None
            beyond = self._execute(bound, part, images, watch, begin, flags, rows)
            # In runs of their own, so that their bits don't depend on the batch.
            runs = [slice(n, n + 1) for n in beyond]
            if self.graph.runs_clips:
                runs = [slice(0, size)] if beyond else []
            for alone in runs:
                flag = None if flags is None else flags[alone].fill_(True)
                wide = self._wide_bound(part[alone], limit, taken)
                done = begin + alone.start
                self._run_bound(wide, [part[alone]], [images[alone]], watch, done, flag)
        if may_overflow and on_rows is not None:
            # No row is valid before the whole image is.
            on_rows(0, result)
        if out is None and not levels and image.is_floating_point():
            with torch_allocates():
                result = result.to(image.dtype)
        watch.finish()
        return result

    def _wide_bound(self, source: Tensor, limit: int, taken: int) -> Bound:
        """The program for an image whose values are beyond the range of float16, in bfloat16.

        That has the range of float32. The run has the steps of one in float16, and takes the same
        memory: the kernels are of the same instruction set, and multiply in float32, too. It makes
        all kernels itself, since those that are kept are of other weights.
        """
        if self._packed_in_bfloat16 is None:
            warnings.warn(beyond_float16(self.graph.name), RuntimeWarning, stacklevel=2)
            self._packed_in_bfloat16 = in_bfloat16(self.graph, self._packed)
        wanted = (self._kernels.isa, "bfloat16")
        kernels = next(k for k in _engine.all_kernels() if (k.isa, k.dtype) == wanted)
        machine = dataclasses.replace(self.machine, kernels=kernels)
        program = self.fitted(tuple(source.shape), limit, taken).program
        bound = self._bind(dataclasses.replace(program, machine=machine), self._packed_in_bfloat16)
        if bound.bytes + self.kept_kernels.bytes > limit - taken:
            self.kept_kernels.give_back()
        return bound

    def _execute(
        self,
        bound: Bound,
        source: Tensor,
        result: Tensor,
        watch: Watch,
        done: int = 0,
        finite: Tensor | None = None,
        on_rows: Callable[[int, int], None] | None = None,
    ) -> list[int]:
        """Run a program for so many images after those that are done, and keep its kernels.

        Returns:
            The numbers of the images that have values beyond the range of the dtype, whose
            results are not valid.
        """
        watch.check(done)
        nothing = torch.empty(EMPTY)
        bound = self.kept_kernels.beside(
            bound,
            lambda plan: self._run_plan(plan, [nothing], [nothing], watch, lambda _: done),
        )
        return self._run_bound(bound, [source], [result], watch, done, finite, on_rows)

    def _run_bound(
        self,
        bound: Bound,
        sources: list[Tensor],
        results: list[Tensor],
        watch: Watch,
        done: int,
        finite: Tensor | None = None,
        on_rows: Callable[[int, int], None] | None = None,
        state: Tensor | None = None,
    ) -> list[int]:
        """Run what is bound, and keep the times of its steps if the profiler is active."""
        start = time.time()
        beyond, times = self._run_plan(
            bound.native,
            sources,
            results,
            watch,
            lambda items: done + len(sources[0]) * bound.share_done(items),
            finite,
            on_rows,
            state,
        )
        if self._profiles is not None:
            self._profiles.append(self._profile(bound, start, times))
        return beyond

    def _run_plan(
        self,
        plan: _engine.Plan,
        sources: list[Tensor],
        results: list[Tensor],
        watch: Watch,
        done: Callable[[int], float],
        finite: Tensor | None = None,
        on_rows: Callable[[int, int], None] | None = None,
        state: Tensor | None = None,
    ) -> tuple[list[int], list[tuple[float, float]]]:
        """Run a plan, and return what `_engine.Executor.run` does.

        `done` gives the images that are done after a number of items.
        """

        def ask(items: int) -> None:
            watch.ask(done(items))

        profile = self._profiles is not None
        try:
            with _threads_start():
                return self._executor.run(
                    plan,
                    sources,
                    results,
                    watch.seconds_left,
                    ask if watch.needs_asking else None,
                    profile,
                    on_rows,
                    finite,
                    state,
                )
        except _engine.TimedOutError:
            raise watch.timed_out() from None

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active; else empty."""
        return list(self._profiles or ())

    def release_memory(self) -> None:
        """Return the memory that is kept for the next run to the system."""
        self.kept_kernels.give_back()
        self._executor.release()

    def forget_programs(self) -> int:
        """Make programs anew from the next run on.

        Returns:
            How many were kept.
        """
        runtimes = (self, *self._of_videos)
        kept = sum(len(runtime._bound) for runtime in runtimes)
        for runtime in runtimes:
            runtime._bound.clear()
        return kept

    def _result_bytes(self, shape: Shape, element_bytes: int = 4) -> int:
        """The bytes of the result for an input shape; floats count as float32 (default)."""
        self._check_shape(shape)
        shapes = self.graph.infer_shapes(shape)
        return element_bytes * math.prod(shapes[self.graph.outputs[0]])

    def _check_shape(self, shape: Shape) -> None:
        if len(shape) != 4 or min(shape) < 1 or shape[1] != self.graph.input_channels:
            raise ValueError(
                f"The input has shape {shape}, expected (N, {self.graph.input_channels}, H, W)."
            )

    def _planned(self, shape: Shape) -> Bound:
        """The program of a run whose result is a new tensor of floats."""
        return self.fitted(shape, self.memory_limit, self._result_bytes(shape))

    def fitted(self, shape: Shape, limit: int, taken: int) -> Bound:
        """The program of a run, or of a smaller batch, within a limit of which a part is taken."""
        # No lock, which could stay held in a forked child: single operations of a dict are atomic.
        room = limit - taken
        key = (shape, room, self._slicing, self._tiling)
        known = self._bound.get(key)
        if known is None:
            try:
                known = self._fit(*key)
            except fitting.TooLargeError as error:
                least, one = error.needed + taken, self.graph.least_shape(shape)
                raise over_memory_limit(self.graph.name, one, least, limit) from None
            spare = 0 if self._tiling else min(room - known.bytes, self._most_kept)
            known = self._bound[key] = dataclasses.replace(known, spare=spare)
            while len(self._bound) > CACHED_PROGRAMS:
                self._bound.pop(list(self._bound)[0], None)  # noqa: RUF015
        return known

    def _fit(self, shape: Shape, room: int, slicing: bool, tiling: bool) -> Bound:
        """The fastest program within `room` bytes, including the threads' scratch.

        Raises:
            fitting.TooLargeError: There is none.
        """
        self._check_shape(shape)
        search = self.search(self.graph.least_shape(shape) if slicing or tiling else shape)
        free = search.keeping_all(search.input_shape[0])
        scratch = 0
        try:
            bound = self._lowered(free, search)
        except (ValueError, MemoryError):
            # The sizes may exceed the engine's integers.
            if free.arena_bytes <= room:
                raise
        else:
            if bound.bytes <= room and not tiling:
                return bound
            scratch = bound.bytes - free.arena_bytes
        if tiling and not search.is_hopeless(room):
            frugal = fitting.thrifty(
                search,
                lambda sketch: lower(sketch, search.rules(sketch.input_shape[0])).work,
                TILING_TIME,
            )
            bound = self._lowered(frugal, search)
            if bound.bytes <= room:
                return bound
        return fitting.fit(
            search,
            lambda schedule: self._lowered(schedule, search),
            room,
            lambda: self._usual_choice,
            scratch,
        )

    def _seconds(self, steps: Iterable[Step], runs: int = 1) -> float | None:
        """The estimated time of a number of runs, from the peak of this machine, if known."""
        kernels = self._kernels
        peak = measured_limit(kernels.isa, kernels.dtype, self._executor.threads)
        return runs * sum(step.work for step in steps) / peak if peak else None

    def _estimate(self, steps: Iterable[Step], runs: int = 1) -> str:
        """The same, as text."""
        seconds = self._seconds(steps, runs)
        return "not known" if seconds is None else f"about {format_seconds(seconds)}"

    @functools.cached_property
    def _usual_choice(self) -> tuple[Value, ...]:
        shape = (1, self.graph.input_channels, 1024, 1024)
        return self.search(shape).tradeoffs()[-1].recomputed

    def _lowered(self, schedule: Schedule, search: Search[CpuRules]) -> Bound:
        return self._bind(lower(schedule, search.rules(schedule.input_shape[0])))

    def _bind(self, program: Program, packed: Mapping[str, Tensor] | None = None) -> Bound:
        native = program.bind(self._packed if packed is None else packed)
        return Bound(program, native, program.steps, self._executor.bytes(native))

    def _profile(self, bound: Bound, start: float, times: list[tuple[float, float]]) -> RunProfile:
        steps = tuple(
            StepTime(step.name, step.kind, begin, end - begin, step.flops, step.bytes)
            # A run ends early when no image fits the range of the dtype.
            for step, (begin, end) in zip(bound.steps, times, strict=False)
        )
        shape = bound.program.schedule.input_shape
        return RunProfile(self.graph.name, shape, start, steps, self._limit)
