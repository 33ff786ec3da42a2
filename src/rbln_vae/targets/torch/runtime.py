"""Runs a part of a model by PyTorch's kernels, on a CPU or a GPU."""

from __future__ import annotations

import collections
import contextlib
import os
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import RBLNRuntimeError
from ...graph.ir import Graph, Shape
from ...profiler import RunProfile
from ...profiler import Step as StepTime
from ..allocation import torch_allocates
from ..base import OnRows, RuntimeOptions
from ..graph_runtime import GraphRuntime, beyond_float16
from ..stream import Stream, frame_shape
from ..watch import Progress, ShouldStop, Watch
from .description import describe_images, describe_videos
from .device import Clock, SideStreams, exactly, threads
from .planner import TorchPlanner
from .program import Frame, Program
from .recording import RECORDED, Recording, Recordings
from .rules import Machine
from .weights import Weights

KEPT_PROFILES = 16

ROUNDED = 2**26
"""Limits that vary with free memory are rounded down to multiples of this many bytes."""


class TorchRuntime(GraphRuntime[Program]):
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

    images: TorchPlanner

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        device: torch.device | str,
        options: RuntimeOptions,
        free_memory: Callable[[], int] | None = None,
    ) -> None:
        machine = Machine.of(torch.device(device), dtype, options.num_threads)
        self._options = options
        self._free_memory = free_memory
        self._wide: TorchRuntime | None = None
        self._recordings: Recordings | None = None
        self._side_streams: SideStreams | None = None
        if machine.device.type == "cuda":
            most = RECORDED * torch.cuda.get_device_properties(machine.device).total_memory
            self._recordings = Recordings(machine.device, dtype, int(most))
            self._side_streams = SideStreams(machine.device)
        self._profiles: collections.deque[RunProfile] = collections.deque(maxlen=KEPT_PROFILES)
        self._process = os.getpid()
        weights = Weights(graph, machine)
        super().__init__(graph, lambda each: TorchPlanner(each, machine, weights), options.timeout)

    @property
    def machine(self) -> Machine:
        """The device, and what is computed at once on it."""
        return self.images.machine

    @property
    def memory_limit(self) -> int:
        """The most bytes of a run besides the weights."""
        limit = self._options.memory_limit
        most = 2**62 if limit is None else limit
        if self._free_memory is None:
            return most
        return min(most, self._free_memory() // ROUNDED * ROUNDED)

    def seconds_expected(self, shape: Shape) -> float | None:
        """Always `None`: how fast PyTorch's kernels are here isn't known."""
        return None

    def describe(self, shape: Shape, *, steps: bool = False) -> str:
        """The memory and the work of a run, and those of other schedules."""
        shape = tuple(shape)
        if len(shape) == 5:
            return describe_videos(self.streams(frame_shape(shape)), self.images, shape)
        return describe_images(self.images, self.planned(shape), shape, steps=steps)

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Take less memory than the limit allows, and give recordings back."""
        super().save_memory(slicing=slicing, tiling=tiling)
        if self._recordings is not None:
            self._recordings.keep(0)

    def stream(
        self, shape: Shape, result_bytes: int | None = None, memory_limit: int | None = None
    ) -> Stream:
        """Begin to run the part on a batch of videos; see `Runtime.stream`."""
        self._check_process()
        return super().stream(shape, result_bytes, memory_limit)

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
        with torch.no_grad(), threads(self._options.num_threads), exactly(self.machine.device):
            self._execute(planned, 0, inputs, outputs, dtype, watch, None, None, 0, state)

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
        If both are on the host, it takes a stream of its own, and has ended when this returns.
        `progress` counts the steps that are launched there, by their floating-point operations.
        """
        shape = tuple(image.shape)
        self.images.check(shape)
        watch = Watch(self.timeout, should_stop, progress, shape[0])
        watch.check()
        self._check_process()
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise TypeError(
                f"The input is {image.dtype}, expected a floating-point tensor, or uint8."
            )
        source = image.detach()
        taken = 0 if out is not None else self.images.result_bytes(shape, 1 if levels else 4)
        limit = self.memory_limit if memory_limit is None else min(memory_limit, self.memory_limit)
        program = self.images.fitted(shape, limit, taken)
        expected = (shape[0], *program.schedule.output_shape[1:])
        dtype = source.dtype if source.is_floating_point() else torch.float32
        with (
            torch_allocates(),
            threads(self._options.num_threads),
            exactly(self.machine.device),
            self._stream_for(source, out, finite),
        ):
            result = _new_result(expected, dtype, levels, source.device) if out is None else out
            if tuple(result.shape) != expected:
                raise ValueError(f"out has the shape {tuple(result.shape)}, expected {expected}.")
            in_range = self._runs(program, limit, taken, source, result, dtype, watch, on_rows)
            if finite is not None:
                finite.copy_(in_range)
        watch.finish()
        return result

    def _stream_for(self, *given: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """What runs on a stream of its own if nothing that is given is on a GPU."""
        if self._side_streams is None or any(each is not None and each.is_cuda for each in given):
            return contextlib.nullcontext()
        return self._side_streams.one()

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
                program = self.images.fitted(tuple(part.shape), limit, taken)
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
            program = self._wide.images.fitted(tuple(source[alone].shape), limit, taken)
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
        program.rehearse()
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
        clock = Clock(self.machine.device, timing=self._options.activate_profiler)
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
        if self._recordings is None or self.images.tiling or self._options.activate_profiler:
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


def _new_result(shape: Shape, dtype: torch.dtype, levels: bool, device: torch.device) -> Tensor:
    """Memory for the result on the caller's device."""
    if not levels:
        return torch.empty(shape, dtype=dtype, device=device)
    batch, channels, height, width = shape
    last = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=device)
    return last.permute(0, 3, 1, 2)
