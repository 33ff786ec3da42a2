"""Runs a part of a model by PyTorch's kernels, on a CPU or a GPU."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...errors import RBLNRuntimeError
from ...graph.ir import Graph, Shape, Value
from ...profiler import RunProfile
from ...profiler import Step as StepTime
from ...schedule import fitting
from ...schedule.schedule import Schedule
from ...schedule.search import Search
from ...sizes import format_size
from ...units import format_bytes
from ..allocation import torch_allocates
from ..base import (
    OnRows,
    RuntimeOptions,
    beyond_float16,
    only_images,
    over_memory_limit,
)
from ..stream import Chunks, Stream, Streams, frame_shape
from ..watch import Progress, ShouldStop, Watch
from .lower import Frame, Program, lower
from .recording import RECORDED, Recording, Recordings
from .rules import Machine, TorchRules
from .weights import Weights

CACHED_PROGRAMS = 64
KEPT_PROFILES = 16

TILING_WORK = 1.5
"""The most work of a run that saves memory (`enable_tiling`), as a multiple of the least."""

AHEAD = 2e12
"""Floating-point operations that a GPU may have before it when more are launched: milliseconds of
work. That keeps it busy, and a timeout or a caller can still end the run."""

ROUNDED = 2**26
"""Limits that vary with free memory are rounded down to multiples of this many bytes."""


class TorchRuntime:
    """Runs a part by PyTorch's kernels; any number of threads may share it.

    Args:
        graph: The optimised graph; of a part that runs videos, that of later runs, and images are
            run by that of the first run.
        dtype: The dtype of images and products: float32, float16 or bfloat16. Statistics, norms
            and activations are computed in float32. An image with values beyond the range of
            float16 is run again in bfloat16.
        device: The device on which it runs.
        options: Limits of time, memory and threads, and whether times are kept.
        free_memory: Returns the bytes that are free on the device, which limit each run. By
            default only `options` do.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        device: torch.device | str,
        options: RuntimeOptions,
        free_memory: Callable[[], int] | None = None,
    ) -> None:
        self.graph = graph.start.stateless()
        self.machine = Machine.of(torch.device(device), dtype, options.num_threads)
        self._options = options
        self._free_memory = free_memory
        self._weights = Weights(graph, self.machine)
        self._wide: TorchRuntime | None = None
        self._recordings: Recordings | None = None
        if self.machine.device.type == "cuda":
            most = RECORDED * torch.cuda.get_device_properties(self.machine.device).total_memory
            self._recordings = Recordings(self.machine.device, dtype, int(most))
        self._slicing = self._tiling = False
        self._programs: dict[tuple[Shape, int | None], Program] = {}
        self._profiles: collections.deque[RunProfile] = collections.deque(maxlen=KEPT_PROFILES)
        self._process = os.getpid()
        self._of_videos: tuple[TorchRuntime, ...] = ()
        self._streams: Streams[Program] | None = None
        if graph.first is not None:
            first, later = self._of_videos = self._of_graph(graph.first), self._of_graph(graph)
            self._streams = Streams(first, later)

    def _of_graph(self, graph: Graph) -> TorchRuntime:
        """What runs another graph with the same weights."""
        other = copy.copy(self)
        other.graph, other._programs = graph, {}
        return other

    # Planning.

    @property
    def memory_limit(self) -> int:
        """The most bytes of a run besides the weights."""
        limit = self._options.memory_limit
        most = 2**62 if limit is None else limit
        if self._free_memory is None:
            return most
        return min(most, self._free_memory() // ROUNDED * ROUNDED)

    def program(self, shape: Shape) -> Program:
        """The program for an input shape, which may be for a smaller batch."""
        shape = tuple(shape)
        return self.fitted(shape, self.memory_limit, self._result_bytes(shape))

    @property
    def timeout(self) -> float | None:
        """The most seconds of a run; `None` is no limit."""
        return self._options.timeout

    def rules(self, shape: Shape) -> TorchRules:
        """The rules for schedules of an input shape."""
        return TorchRules(self.graph, shape, self.machine)

    def search(self, shape: Shape) -> Search[TorchRules]:
        """The search over schedules for an input shape."""
        return Search(self.graph, shape, self.rules)

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
        return self.program(shape).bytes + self._result_bytes(shape)

    def seconds_expected(self, shape: Shape) -> float | None:
        """Always `None`: how fast PyTorch's kernels are here isn't known."""
        return None

    def describe(self, shape: Shape, *, steps: bool = False) -> str:
        """The memory and the work of a run, and those of other schedules."""
        shape = tuple(shape)
        if len(shape) == 5:
            frame = frame_shape(shape)
            state = self._streams_of(frame).state_bytes(frame)
            return (
                f"{self.graph.name} on {shape[2]} frames of {format_size(frame)}, "
                f"{str(self.machine.dtype).removeprefix('torch.')}, {self.machine.device}\n"
                f"memory      {format_bytes(self.memory_needed(shape))} for any number of frames, "
                f"of it {format_bytes(state)} for state"
            )
        program, result = self.program(shape), self._result_bytes(shape)
        schedule = program.schedule
        parts = -(-shape[0] // schedule.input_shape[0])
        lines = [
            f"{self.graph.name} on {format_size(shape)}, "
            f"{str(self.machine.dtype).removeprefix('torch.')}, {self.machine.device}",
            f"memory      {format_bytes(program.bytes + result)}: "
            f"{format_bytes(schedule.arena_bytes)} for activations, "
            f"{format_bytes(program.bytes - schedule.arena_bytes)} for kernels, "
            f"{format_bytes(result)} for the result",
            f"work        {parts * schedule.flops / 1e12:.3f} TFLOP, "
            f"{schedule.extra_work:.1%} of it extra"
            + (f", in {parts} parts of the batch" if parts > 1 else ""),
            "",
            f"{'memory':>14} {'extra work':>11}  computed again, in strips",
        ]
        search = self.search(shape)
        for other in search.tradeoffs():
            memory = format_bytes(self._lowered(other, search).bytes + result)
            again = ", ".join(other.recomputed) or "nothing"
            lines.append(f"{memory:>14} {other.extra_work:>11.1%}  {again}")
        if steps:
            lines += ["", f"{'step':<16}{'bytes':>14}{'workspace':>14}  value"]
            lines += [
                f"{step.kind:<16}{format_bytes(step.bytes):>14}"
                f"{format_bytes(step.workspace):>14}  {step.name}"
                for step in program.steps
            ]
        return "\n".join(lines)

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Use less memory than the limit allows.

        Args:
            slicing: Whether to run the images of a batch one by one.
            tiling: Whether to run each image in the least memory that takes at most
                `TILING_WORK` times the work.
        """
        for runtime in (self, *self._of_videos):
            runtime._slicing, runtime._tiling = slicing, tiling
            runtime._programs.clear()
        if self._recordings is not None:
            self._recordings.keep(0)

    def _result_bytes(self, shape: Shape, element_bytes: int = 4) -> int:
        """The bytes of the result for an input shape; floats count as float32 (default)."""
        self._check_shape(shape)
        return element_bytes * math.prod(self.graph.infer_shapes(shape)[self.graph.outputs[0]])

    def _check_shape(self, shape: Shape) -> None:
        if len(shape) != 4 or min(shape) < 1 or shape[1] != self.graph.input_channels:
            raise ValueError(
                f"The input has shape {shape}, expected (N, {self.graph.input_channels}, H, W)."
            )

    def fitted(self, shape: Shape, limit: int, taken: int) -> Program:
        """The program of a run, or of a smaller batch, within a limit of which a part is taken."""
        self._check_shape(shape)
        room = limit - taken
        # No lock, which could stay held in a forked child: single operations of a dict are atomic.
        if not self._tiling:
            # Limits that vary with free memory mostly admit this one.
            free = self._programs.get((shape, None))
            if free is not None and free.bytes <= room:
                return free
        known = self._programs.get((shape, room))
        if known is None:
            try:
                known = self._fit(shape, room)
            except fitting.TooLargeError as error:
                least, one = error.needed + taken, self.graph.least_shape(shape)
                raise over_memory_limit(self.graph.name, one, least, limit) from None
            whole = not known.schedule.recomputed and known.schedule.input_shape == shape
            self._programs[shape, None if whole and not self._tiling else room] = known
            while len(self._programs) > CACHED_PROGRAMS:
                self._programs.pop(list(self._programs)[0], None)  # noqa: RUF015
        return known

    def _fit(self, shape: Shape, room: int) -> Program:
        """The program with the least work within `room` bytes, including workspaces.

        Raises:
            fitting.TooLargeError: There is none.
        """
        alone = self._slicing or self._tiling or not self.machine.batches
        search = self.search(self.graph.least_shape(shape) if alone else shape)
        if self._tiling and not search.is_hopeless(room):
            frugal = fitting.thrifty(search, lambda sketch: sketch.flops, TILING_WORK)
            program = self._lowered(frugal, search)
            if program.bytes <= room:
                return program
        return fitting.fit(
            search,
            lambda schedule: self._lowered(schedule, search),
            room,
            lambda: self._usual_choice,
        )

    @functools.cached_property
    def _usual_choice(self) -> tuple[Value, ...]:
        shape = (1, self.graph.input_channels, 1024, 1024)
        return self.search(shape).tradeoffs()[-1].recomputed

    def _lowered(self, schedule: Schedule, search: Search[TorchRules]) -> Program:
        return lower(schedule, search.rules(schedule.input_shape[0]), self._weights)

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
        self._check_process()
        shape = tuple(shape)
        return self._streams_of(shape).begin(shape, result_bytes, memory_limit)

    def _streams_of(self, shape: Shape) -> Streams[Program]:
        """What runs videos of frames of a shape."""
        self._check_shape(shape)
        if self._streams is None:
            raise only_images(self.graph.name)
        return self._streams

    def bytes_of(self, planned: Program) -> int:
        """The bytes of a run, without its result."""
        return planned.bytes

    def new_state(self, size: int) -> Tensor:
        """Memory for the state of one video, in bytes."""
        return torch.zeros(size, dtype=torch.uint8, device=self.machine.device)

    def run_chunk(
        self,
        planned: Program,
        state: Tensor,
        inputs: list[Tensor],
        outputs: list[Tensor],
        watch: Watch,
    ) -> None:
        """Run a chunk of one video, whose state follows."""
        self._check_process()
        source = inputs[0]
        dtype = source.dtype if source.is_floating_point() else torch.float32
        with torch.no_grad(), _threads(self._options.num_threads), self._exactly():
            self._execute(planned, 0, inputs, outputs, dtype, watch, None, None, 0, state)

    # Running.

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active; else empty."""
        return list(self._profiles)

    @torch.no_grad()
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

        The image and `out` may be on any device. On a GPU the run takes the current stream, and
        a result on the GPU may still be computed when this returns, as with any call of PyTorch.
        `progress` counts the steps that are launched there, by their floating-point operations.
        """
        shape = tuple(image.shape)
        self._check_shape(shape)
        watch = Watch(self.timeout, should_stop, progress, shape[0])
        watch.check()
        self._check_process()
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise TypeError(
                f"The input is {image.dtype}, expected a floating-point tensor, or uint8."
            )
        source = image.detach()
        taken = 0 if out is not None else self._result_bytes(shape, 1 if levels else 4)
        limit = self.memory_limit if memory_limit is None else min(memory_limit, self.memory_limit)
        program = self.fitted(shape, limit, taken)
        expected = (shape[0], *program.schedule.output_shape[1:])
        dtype = source.dtype if source.is_floating_point() else torch.float32
        with torch_allocates(), _threads(self._options.num_threads), self._exactly():
            result = _new_result(expected, dtype, levels, source.device) if out is None else out
            if tuple(result.shape) != expected:
                raise ValueError(f"out has the shape {tuple(result.shape)}, expected {expected}.")
            in_range = self._runs(program, limit, taken, source, result, dtype, watch, on_rows)
            if finite is not None:
                finite.copy_(in_range)
        watch.finish()
        return result

    def _runs(
        self,
        program: Program,
        limit: int,
        taken: int,
        source: Tensor,
        result: Tensor,
        dtype: torch.dtype,
        watch: Watch,
        on_rows: OnRows | None,
        done: int = 0,
    ) -> Tensor:
        """Run the images of a batch, after those that are done, in as many parts as necessary.

        Returns:
            Whether each image has only finite values: bool `(N,)`, where `result` is. It is
            known for levels, and with float16.
        """
        narrow = self.machine.dtype == torch.float16
        in_range = torch.ones(len(source), dtype=torch.bool, device=result.device)

        def rows_finished(first: int, rows: int) -> None:
            assert on_rows is not None
            on_rows(first, result[:, :, first : first + rows])

        size = program.schedule.input_shape[0]
        for begin in range(0, len(source), size):
            part = source[begin : begin + size]
            if len(part) < size:
                program = self.fitted(tuple(part.shape), limit, taken)
            last = begin + size >= len(source)
            self._execute(
                program,
                limit,
                [part],
                [result[begin : begin + size]],
                dtype,
                watch,
                in_range[begin : begin + size],
                rows_finished if on_rows is not None and last and not narrow else None,
                done + begin,
            )
        if narrow:
            self._run_wide(in_range, limit, taken, source, result, watch)
            if on_rows is not None:
                on_rows(0, result)  # no row is valid before the whole image is
        return in_range

    def _run_wide(
        self,
        in_range: Tensor,
        limit: int,
        taken: int,
        source: Tensor,
        result: Tensor,
        watch: Watch,
    ) -> None:
        """Run images again whose values are beyond the range of float16, in bfloat16."""
        runs = [slice(n, n + 1) for n in (~in_range).nonzero().flatten().tolist()]
        if self.graph.runs_clips:
            runs = [slice(0, len(source))] if runs else []
        for alone in runs:
            if source.is_floating_point() and not source[alone].isfinite().all():
                continue
            if self._wide is None:
                warnings.warn(beyond_float16(self.graph.name), RuntimeWarning, stacklevel=2)
                self._wide = TorchRuntime(
                    self.graph,
                    torch.bfloat16,
                    self.machine.device,
                    self._options,
                    self._free_memory,
                )
            dtype = source.dtype if source.is_floating_point() else torch.float32
            program = self._wide.fitted(tuple(source[alone].shape), limit, taken)
            in_range[alone] = self._wide._runs(
                program, limit, taken, source[alone], result[alone], dtype, watch, None, alone.start
            )

    def _execute(
        self,
        program: Program,
        limit: int,
        sources: list[Tensor],
        results: list[Tensor],
        dtype: torch.dtype,
        watch: Watch,
        in_range: Tensor | None,
        on_rows: Callable[[int, int], object] | None,
        done: int,
        state: Tensor | None = None,
    ) -> None:
        # A recording has the addresses of one state.
        recording = self._recording(program, limit) if state is None else None
        if recording is None:
            steps = program.steps
            arena = torch.empty(
                program.schedule.arena_bytes, dtype=torch.uint8, device=self.machine.device
            )
        else:
            steps, arena = recording.steps, recording.arena
        notices = self.machine.dtype == torch.float16 or not results[0].is_floating_point()
        state = arena[:0] if state is None else state
        frame = Frame.on(
            arena,
            self.machine.dtype,
            sources,
            results,
            dtype,
            state.view(self.machine.dtype),
            in_range if notices else None,
            on_rows,
        )
        start = time.time()
        clock = _Clock(self.machine.device, timing=self._options.activate_profiler)
        flops = 0
        try:
            for step in steps:
                watch.check(done + len(sources[0]) * flops / program.flops)
                step.run(frame)
                clock.lap(step.flops)
                flops += step.flops
            watch.check(done + len(sources[0]))
        finally:
            if recording is not None:
                recording.end()
        if self._options.activate_profiler:
            self._profiles.append(self._profile(program, start, clock.laps()))

    def _recording(self, program: Program, limit: int) -> Recording | None:
        """The recording of a program, taken for a run, if there is one within a limit."""
        if self._recordings is None or self._tiling or self._options.activate_profiler:
            return None
        self._recordings.keep(limit - program.bytes, program)
        return self._recordings.begin(program)

    def _profile(self, program: Program, start: float, laps: list[float]) -> RunProfile:
        steps = tuple(
            StepTime(step.name, step.kind, begin, end - begin, step.flops, step.bytes)
            for step, begin, end in zip(program.steps, laps[:-1], laps[1:], strict=True)
        )
        return RunProfile(self.graph.name, program.schedule.input_shape, start, steps)

    def _check_process(self) -> None:
        if self.machine.device.type == "cuda" and os.getpid() != self._process:
            raise RBLNRuntimeError(
                "This model was put on a GPU before the process forked, and CUDA works in no "
                "forked process. Load the model in the child, or start the process with the "
                "method 'spawn'."
            )

    @contextlib.contextmanager
    def _exactly(self) -> Iterator[None]:
        """Run on the device, without rounding float32 to TF32."""
        if self.machine.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.machine.device), _FULL_PRECISION:
            yield


class _FullPrecision:
    """Switches TF32 off while any thread is in it: torch has one switch for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = (False, False)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = (
                    torch.backends.cudnn.allow_tf32,
                    torch.backends.cuda.matmul.allow_tf32,
                )
                self._set(False, False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(*self._before)

    def _set(self, convolutions: bool, products: bool) -> None:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products


_FULL_PRECISION = _FullPrecision()


class _Clock:
    """Keeps a run at most `AHEAD` operations before the device, and tells when steps ended.

    Args:
        device: The device.
        timing: Whether times are wanted.
    """

    def __init__(self, device: torch.device, *, timing: bool) -> None:
        self._gpu, self._timing = device.type == "cuda", timing
        self._launched = 0
        self._waited = 0
        self._events: list[tuple[torch.cuda.Event, int]] = []
        self._times: list[float] = []
        self.lap(0)

    def lap(self, flops: int) -> None:
        """A step has been launched; on a CPU it has ended."""
        if not self._gpu:
            self._times.append(time.perf_counter())
            return
        self._launched += flops
        event = torch.cuda.Event(enable_timing=self._timing)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((event, self._launched))
        while self._launched - self._events[self._waited][1] > AHEAD:
            self._waited += 1
            self._events[self._waited][0].synchronize()

    def laps(self) -> list[float]:
        """Seconds from the start of the run to its beginning and the end of each step."""
        if not self._gpu:
            return [each - self._times[0] for each in self._times]
        self._events[-1][0].synchronize()
        first = self._events[0][0]
        return [first.elapsed_time(each) / 1000 for each, _ in self._events]


def _new_result(shape: Shape, dtype: torch.dtype, levels: bool, device: torch.device) -> Tensor:
    """Memory for the result on the caller's device."""
    if not levels:
        return torch.empty(shape, dtype=dtype, device=device)
    batch, channels, height, width = shape
    last = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=device)
    return last.permute(0, 3, 1, 2)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set the number of torch's threads during a block; `None` changes nothing."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
