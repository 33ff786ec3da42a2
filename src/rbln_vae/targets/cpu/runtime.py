"""Runs a part of a model on the CPU, with the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ... import _engine
from ...errors import RBLNRuntimeError
from ...graph.ir import Graph, Shape
from ...host import usable_memory, usable_processors
from ...profiler import RunProfile
from ...profiler import Step as StepTime
from ..allocation import torch_allocates
from ..base import OnRows
from ..graph_runtime import GraphRuntime, beyond_float16
from ..stream import frame_shape
from ..watch import Progress, ShouldStop, Watch
from .description import describe_images, describe_videos
from .kept import Bound, KeptKernels
from .kernels import best_dtype, chosen_kernels, measured_limit, warn_of_left_out
from .lower import ADDRESSABLE
from .packing import DTYPES, in_bfloat16, pack
from .planner import CpuPlanner
from .program import EMPTY, Program
from .tiles import FASTEST, Choices, Machine

EXCHANGED = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of callers' tensors that the engine reads and writes."""

KEPT_PROFILES = 16
KEPT_SHARE = 1 / 8
"""The most transformed kernels that are kept, as a share of the memory of the machine."""


def _aligned(weight: Tensor) -> Tensor:
    """The weight, or a copy of it that is aligned to a cache line.

    Kernels read whole cache lines, and a tensor in a mapped file may not be aligned. What they
    take for the numbers of channels is checked once, so it must not change with the file.
    """
    same = weight.is_floating_point() and weight.data_ptr() % 64 == 0
    return weight if same else weight.clone()


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


class CpuRuntime(GraphRuntime[Bound]):
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

    images: CpuPlanner

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
        limit = usable_memory() if memory_limit is None else memory_limit
        self._memory_limit = min(limit, ADDRESSABLE)
        weights = pack(graph, dtype) if packed is None else packed
        self._packed = {name: _aligned(tensor) for name, tensor in weights.items()}
        warn_of_left_out()
        kernels = chosen_kernels(dtype)
        with _threads_start():
            self._executor = _engine.Executor(num_threads or usable_processors())
        machine = Machine(kernels, self._executor.threads)
        self._packed_in_bfloat16: Mapping[str, Tensor] | None = None
        self.kept_kernels = KeptKernels(self._packed, self._executor.release)
        self._profiles: deque[RunProfile] | None = None
        if activate_profiler:
            self._profiles = deque(maxlen=KEPT_PROFILES)
            self._peak = measured_limit(kernels.isa, dtype, self._executor.threads)
        most_kept = int(KEPT_SHARE * usable_memory()) if choices.kept_kernels else 0

        def planner(graph: Graph) -> CpuPlanner:
            return CpuPlanner(graph, self._packed, machine, self._executor, choices, most_kept)

        super().__init__(graph, planner, timeout)

    @property
    def machine(self) -> Machine:
        """The kernels and the threads that run it."""
        return self.images.machine

    @property
    def memory_limit(self) -> int:
        """The most bytes of a run besides the weights."""
        return self._memory_limit

    def execute(self, program: Program, image: Tensor) -> Tensor:
        """Run a program for this graph and machine, without a memory limit.

        Args:
            program: A result of `lower`, for any schedule of this graph.
            image: The input in the shape of the schedule, float32, float16 or bfloat16.

        Returns:
            A new tensor in float32.
        """
        result = torch.empty(program.schedule.output_shape, dtype=torch.float32)
        self._execute(self.images.bind(program), image, result, Watch(self.timeout))
        return result

    def seconds_expected(self, shape: Shape) -> float | None:
        """About how long a run takes, from the work of its steps and the peak of this machine.

        Raises:
            ValueError, MemoryError: As `memory_needed`.
        """
        shape, seconds = tuple(shape), self.images.seconds
        if len(shape) == 5:
            frame = frame_shape(shape)
            first, later = self.streams(frame).fitted(frame)
            runs = self.chunks(frame).later_runs(shape[2])
            times = seconds(first.steps), seconds(later.steps, runs)
            known = [each for each in times if each is not None]
            return shape[0] * sum(known) if len(known) == 2 else None
        bound = self.planned(shape)
        parts = bound.program.schedule.parts_of(shape[0])
        return seconds(bound.beside_kept if bound.kept_bytes else bound.steps, parts)

    def describe(self, shape: Shape, *, steps: bool = False) -> str:
        """The memory and the work of a run, and those of other schedules."""
        shape = tuple(shape)
        if len(shape) == 5:
            streams, seconds = self.streams(frame_shape(shape)), self.seconds_expected(shape)
            return describe_videos(streams, self.images, shape, seconds, steps=steps)
        return describe_images(self.images, self.planned(shape), shape, steps=steps)

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
        nothing = torch.empty(EMPTY, dtype=torch.float32)
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
        """Run the part, as `Runtime.run` says.

        The image and `out` are on the CPU. Memory that earlier runs have left is given back where
        it would exceed `memory_limit`. The run waits during `on_rows`; a batch that runs in parts
        finishes its rows with the last part.

        Raises:
            TypeError: The input is neither a floating-point tensor nor levels.
            ValueError: The part takes no such input; or `out` has another shape or a dtype that
                the engine doesn't write, shares memory with the image, or has elements that
                share memory with each other.
            TimeoutError, RBLNCancelledError, MemoryError: As `Runtime.run`.
        """
        shape = tuple(image.shape)
        self.images.check(shape)
        watch = Watch(self.timeout, should_stop, progress, shape[0])
        watch.check()
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise TypeError(
                f"The input is {image.dtype}, expected a floating-point tensor, or uint8."
            )
        limit = self.memory_limit if memory_limit is None else min(memory_limit, self.memory_limit)
        taken = 0 if out is not None else self.images.result_bytes(shape, 1 if levels else 4)
        bound = self.images.fitted(shape, limit, taken)
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
                bound = self.images.fitted(tuple(part.shape), limit, taken)
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
        wanted = (self.machine.isa, "bfloat16")
        kernels = next(k for k in _engine.all_kernels() if (k.isa, k.dtype) == wanted)
        machine = dataclasses.replace(self.machine, kernels=kernels)
        program = self.images.fitted(tuple(source.shape), limit, taken).program
        bound = self.images.bind(
            dataclasses.replace(program, machine=machine), self._packed_in_bfloat16
        )
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
        nothing = torch.empty(EMPTY, dtype=torch.float32)
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
        # The engine reads and writes what lies in memory, which views such as `x.conj().imag`
        # stand for with the other sign.
        sources = [source.resolve_neg() for source in sources]
        try:
            with _threads_start():
                ran = self._executor.run(
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
        for result in results:
            if result.is_neg():
                result.neg_()
        return ran

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active; else empty."""
        return list(self._profiles or ())

    def release_memory(self) -> None:
        """Return the memory that is kept for the next run to the system."""
        self.kept_kernels.give_back()
        self._executor.release()

    def _profile(self, bound: Bound, start: float, times: list[tuple[float, float]]) -> RunProfile:
        steps = tuple(
            StepTime(step.name, step.kind, begin, end - begin, step.flops, step.bytes)
            # A run ends early when no image fits the range of the dtype.
            for step, (begin, end) in zip(bound.steps, times, strict=False)
        )
        shape = bound.program.schedule.input_shape
        return RunProfile(self.graph.name, shape, start, steps, self._peak)
