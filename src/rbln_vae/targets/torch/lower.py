"""From a schedule to a program: each task becomes calls of PyTorch on rows of images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.interpreter import with_earlier, with_neighbours
from ...graph.ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    GroupNorm,
    Identity,
    Modulate,
    Operation,
    Pad,
    PixelNorm,
    RMSNorm,
    Scale,
    Shape,
    Shuffle,
    Upsample,
)
from ...levels import levels_of, sample_of
from ...schedule.arena import Buffer, View
from ...schedule.schedule import Kind, Schedule, Task
from ...schedule.sweep import Rows, rows_read, top_row
from . import kernels
from .kernels import Reading
from .program import Call, Frame, Program, Step
from .rules import TorchRules
from .weights import Weights

Take = Callable[[Frame], Tensor]
Lowered = tuple[int, Call]
"""The workspace of a step in bytes, and what it does."""


def lower(schedule: Schedule, rules: TorchRules, weights: Weights) -> Program:
    """The steps for a schedule.

    Args:
        schedule: Made with the rules.
        rules: Of PyTorch's kernels, for the graph and the shape.
        weights: Of the graph, on the device.
    """
    lowering = _Lowering(rules, weights, schedule.arena_bytes)
    return Program(schedule, tuple(map(lowering.step, schedule.tasks)))


class _Lowering:
    def __init__(self, rules: TorchRules, weights: Weights, arena_bytes: int) -> None:
        self.rules = rules
        self.arena_bytes = arena_bytes
        self.graph = rules.graph
        self.weights = weights
        self.batch = 0  # the images of a task
        self.dtype = rules.machine.dtype
        self.size = self.dtype.itemsize
        self.kernels = rules.machine.kernels

    def step(self, task: Task) -> Step:
        operation = task.operation
        self.batch = self.rules.shapes[task.value][0]
        kind = operation.kind if task.kind is Kind.COMPUTE else task.kind.value
        match task.kind:
            case Kind.IMPORT:
                workspace, run = self.importing(task)
            case Kind.EXPORT:
                workspace, run = self.exporting(task)
            case Kind.MOVE:
                workspace, run = 0, self.move(task)
            case Kind.COPY:
                workspace, run = 0, self.copy(task)
            case Kind.STATISTICS:
                workspace, run = self.statistics(task)
            case Kind.NORM:
                workspace, run = self.norm(task)
            case Kind.COMPUTE if isinstance(operation, Attention):
                workspace, run = self.attention(task, operation)
            case Kind.COMPUTE if isinstance(operation, Conv2d):
                workspace, run = self.convolution(task, operation)
            case Kind.COMPUTE:
                workspace, run = self.other(task)
            case Kind.PREPARE:
                raise NotImplementedError("nothing is prepared")
        views = (*task.inputs, *([task.output] if task.output is not None else []))
        moved = sum(self.bytes_of(v.channels, v.height, v.width) for v in views)
        moved += sum(buffer.bytes for buffer in task.buffers.values())
        moved += sum(self.graph.weights[name].numel() for name in operation.weights) * self.size
        return Step(task.value, kind, task.flops, moved, workspace, run)

    def bytes_of(self, channels: int, height: int, width: int, size: int | None = None) -> int:
        """Bytes of an image for each of the batch, by default in the dtype of images."""
        return self.batch * channels * height * width * (self.size if size is None else size)

    # The arena.

    def image(self, view: View, batch: int | None = None) -> Take:
        """What returns the images of a view, by default as many as the task has."""
        shape = (batch or self.batch, view.channels, view.height, view.width)
        image, row = view.image_bytes // self.size, view.row_bytes // self.size
        strides = (image, 1, row, view.channels)
        offset = (view.buffer.offset + view.offset) // self.size
        begin = self.arena_bytes // self.size
        if offset >= begin:
            return lambda frame: frame.state.as_strided(shape, strides, offset - begin)
        return lambda frame: frame.images.as_strided(shape, strides, offset)

    def floats(self, buffer: Buffer, *shape: int) -> Take:
        """What returns a buffer of float32."""
        begin, length = buffer.offset // 4, math.prod(shape)
        return lambda frame: frame.floats[begin : begin + length].view(shape)

    def sums(self, buffer: Buffer, shape: Shape, rows: int) -> Take:
        """What returns the statistics of an image: `(N, chunks, 2, C)`."""
        _, channels, height, _ = shape
        return self.floats(buffer, self.batch, -(-height // rows), 2, channels)

    def summed(self, rows: Rows, at_once: int) -> slice:
        """Which statistics are those of some rows, where there are some for so many rows."""
        return slice(rows[0] // at_once, -(-rows[1] // at_once))

    def is_dense(self, view: View) -> bool:
        """Whether the rows of a view lie one after the other."""
        row = view.channels * view.width * self.size
        return view.row_bytes == row and (self.batch == 1 or view.image_bytes == view.height * row)

    def reading(self, task: Task, activation: str | None = None) -> Callable[[Frame], Reading]:
        """What returns how a task reads its first input."""
        norm = getattr(task.operation, "norm", None)
        if isinstance(norm, RMSNorm):
            weight = self.weights.vector(norm.weight)[None, :, None, None]
            constant = Reading(pixel_weight=weight, eps=norm.eps, activation=activation)
            return lambda frame: constant
        if norm is None:
            constant = Reading(activation=activation)
            return lambda frame: constant
        channels = task.inputs[0].channels
        take = self.floats(task.buffers["coefficients"], self.batch, 2, channels, 1, 1)

        def normed(frame: Frame) -> Reading:
            both = take(frame)
            return Reading(both[:, 0], both[:, 1], activation=activation)

        return normed

    # What is not computed.

    def importing(self, task: Task) -> Lowered:
        assert task.output is not None
        shape = self.rules.shapes[task.value]
        rows = self.rules.rows_copied(shape)
        chunks = [
            (chunk, self.image(task.output.rows(chunk[0] - task.rows[0], chunk[1] - task.rows[0])))
            for chunk in _chunks(task.rows, rows)
        ]

        def run(frame: Frame) -> None:
            for (begin, end), take in chunks:
                source = frame.sources[task.tensor][:, :, begin:end]
                if not source.is_floating_point():
                    source = sample_of(source.to(frame.images.device))
                take(frame).copy_(source)

        return self.bytes_of(shape[1], rows, shape[3], 8), run

    def exporting(self, task: Task) -> Lowered:
        (view,) = task.inputs
        shape = self.rules.shapes[task.value]
        rows = self.rules.rows_copied(shape)
        chunks = [
            (chunk, self.image(view.rows(chunk[0] - task.rows[0], chunk[1] - task.rows[0])))
            for chunk in _chunks(task.rows, rows)
        ]

        def run(frame: Frame) -> None:
            for (begin, end), take in chunks:
                image = take(frame)
                result = frame.results[task.tensor][:, :, begin:end]
                if not result.is_floating_point():
                    image = image.to(frame.dtype)
                if frame.finite is not None:
                    whole = image.isfinite().flatten(1).all(1)
                    frame.finite.logical_and_(whole.to(frame.finite.device))
                result.copy_(image if result.is_floating_point() else levels_of(image))
                if frame.on_rows is not None:
                    frame.on_rows(begin, end - begin)

        return self.bytes_of(shape[1], rows, shape[3], 16), run

    def move(self, task: Task) -> Call:
        assert task.output is not None
        first, last = task.rows
        # Rows that are read must not be written by the same copy.
        parts = [
            (
                self.image(task.output.rows(begin, begin + min(first, last - first - begin))),
                self.image(task.output.rows(first + begin, min(last, 2 * first + begin))),
            )
            for begin in range(0, last - first, first)
        ]

        def run(frame: Frame) -> None:
            for to, source in parts:
                to(frame).copy_(source(frame))

        return run

    def copy(self, task: Task) -> Call:
        (source,) = task.inputs
        assert task.output is not None
        take, give = self.image(source), self.image(task.output)

        def run(frame: Frame) -> None:
            give(frame).copy_(take(frame))

        return run

    # Norms.

    def statistics(self, task: Task) -> Lowered:
        (view,) = task.inputs
        shape = self.rules.shapes[task.value]
        rows = self.rules.rows_of(shape)
        at_once = self.rules.rows_summed_of(shape)
        take = self.sums(task.buffers["sums"], shape, at_once)
        chunks = [
            (self.image(view.rows(*chunk)), self.summed(chunk, at_once))
            for chunk in _chunks(task.rows, rows)
        ]

        def run(frame: Frame) -> None:
            sums = take(frame)
            for chunk, some in chunks:
                self.kernels.sum_up(chunk(frame), sums[:, some])

        copied = 0 if self.rules.machine.fused else 4
        return self.bytes_of(shape[1], rows, shape[3], copied), run

    def norm(self, task: Task) -> Lowered:
        norm, operation = task.norm, task.operation
        assert norm is not None
        shape = self.rules.shapes[task.value]
        _, channels, height, width = shape
        if isinstance(operation, Conv2d):
            rows = self.rules.rows_summed(operation)
        else:
            rows = self.rules.rows_summed_of(shape)
        counts = torch.tensor(
            [(end - begin) * width for begin, end in _chunks((0, height), rows)],
            dtype=torch.float64,
            device=self.rules.machine.device,
        )
        take = self.sums(task.buffers["sums"], shape, rows)
        give = self.floats(task.buffers["coefficients"], self.batch, 2, channels)
        weight, bias = self.weights.vector(norm.weight), self.weights.vector(norm.bias)
        # The parts of all frames of a clip are those of one image.
        images = 1 if norm.over_clip else self.batch
        counts = counts.repeat(self.batch // images)

        def run(frame: Frame) -> None:
            sums, out = take(frame).reshape(images, -1, 2, channels), give(frame)
            self.kernels.coefficients(
                sums, counts, norm.groups, norm.eps, weight, bias, out[:images]
            )
            if norm.over_clip:
                out[1:].copy_(out[:1])

        return images * channels * len(counts) * 40, run

    # Products.

    def convolution(self, task: Task, operation: Conv2d) -> Lowered:
        graph = self.graph
        height, width = self.rules.shapes[operation.input][2:]
        tall = operation.kernel(graph.weights)[2]
        doubles, phases = operation.doubles(graph.weights), operation.has_phases(graph.weights)
        above, _, left, right = operation.padding
        columns = (0, 0) if left == right else (left, right)
        count = len(task.inputs) - len(operation.earlier)
        source, *residual = task.inputs[:count]
        frames = [*task.inputs[count:], source]
        before = self.rules.shapes[operation.earlier[0]][0] if operation.earlier else None
        reading = self.reading(task, operation.activation)
        kernel = self.weights.kernel(operation, graph)
        if operation.left_out:
            kernel = kernel[:, -len(frames) * source.channels :]
        bias = None
        if operation.bias is not None:
            bias = self.weights.vector(operation.bias, self.dtype)
        fused = self.rules.machine.fused
        # cuDNN would add a bias in a pass of its own. That of phases is added before they meet.
        added_before, added_after = (None, bias) if fused and not phases else (bias, None)

        def convolve(image: Tensor, around: int) -> Tensor:
            if doubles:  # three rows more of padding take away what the halo makes
                return F.conv_transpose2d(image, kernel, added_before, 2, (3 - 2 * around, 1))
            side = left if left == right else 0
            result = F.conv2d(image, kernel, added_before, operation.stride, (around, side))
            return _beside(result) if phases else result

        rows = self.rules.chunk_rows(operation)
        at_once = self.rules.rows_summed(operation)
        sums = task.buffers.get("sums")
        take_sums = None
        if sums is not None:
            take_sums = self.sums(sums, self.rules.shapes[operation.output], at_once)
        chunks = []
        workspace = 0
        assert task.output is not None
        for begin, end in _chunks(task.rows, rows):
            top = top_row(operation, begin)
            bottom = top_row(operation, end - 1) + tall
            first, last = min(height, max(0, top)), max(0, min(height, bottom))
            above = first - top if first < last else bottom - top
            below = bottom - top - (last - first) - above
            # The convolution itself sees the zeros around a whole image.
            around = above if above == below else 0
            reads = [
                frame.rows(first - task.source_row, last - task.source_row) for frame in frames
            ]
            read = reads[-1]
            own = (begin - task.rows[0], end - task.rows[0])
            output = task.output.rows(*own)
            padding = (above - around, below - around, *columns)
            chunks.append(
                (
                    [*(self.image(each, before) for each in reads[:-1]), self.image(read)],
                    padding,
                    around,
                    self.image(output),
                    self.image(residual[0].rows(*own)) if residual else None,
                    self.summed((begin, end), at_once),
                )
            )
            changes = operation.norm is not None or operation.activation is not None
            # The libraries may take the kernel and the image in other layouts.
            image = self.bytes_of(read.channels, bottom - top, width + sum(columns))
            image *= operation.frames - operation.left_out
            library = self.rules.machine.library_bytes + kernel.numel() * self.size + image
            dense = not changes and not any(padding) and self.is_dense(read)
            # Several frames are read, and then put together.
            several = operation.frames - operation.left_out > 1
            copied = 2 * image if several else 0 if dense else image
            channels = output.channels if doubles or phases else len(kernel)
            made = self.bytes_of(channels, end - begin, output.width)
            # PyTorch's own kernels read and sum up copies in float32.
            wider = 0 if self.size == 4 or fused else 4 // self.size
            workspace = max(
                workspace,
                copied * (1 + wider * changes),
                copied + made * (1 + phases) + library,
                made * (1 + wider * (sums is not None)),
            )

        # Frames run alone where threads would share them in another way than the pixels of one.
        alone = self.graph.state and not self.rules.machine.batches
        images = [slice(n, n + 1) for n in range(self.batch)] if alone else [slice(None)]

        def run(frame: Frame) -> None:
            how = reading(frame)
            all_sums = None if take_sums is None else take_sums(frame)
            for takes, padding, around, out, added, some in chunks:
                read = [self.kernels.read(take(frame), how, padding) for take in takes]
                *earlier, image = read
                if earlier:
                    image = with_earlier(image, earlier)
                if operation.over_clip:
                    image = with_neighbours(image)
                result, beside = out(frame), None if added is None else added(frame)
                some_sums = None if all_sums is None else all_sums[:, some]
                for each in images:
                    self.kernels.write(
                        convolve(image[each], around),
                        result[each],
                        added_after,
                        None if beside is None else beside[each],
                        operation.output_activation,
                        None if some_sums is None else some_sums[each],
                    )

        return workspace, run

    def attention(self, task: Task, operation: Attention) -> Lowered:
        query, key, value, *residual = task.inputs
        assert task.output is not None
        heads, (height, width) = operation.heads, (query.height, query.width)
        rows = self.rules.queries(operation)
        multiplies = self.rules.machine.multiplies(query.channels // heads)
        attend = (self.kernels if multiplies else kernels).attend
        take_key, take_value = self.image(key), self.image(value)
        chunks = [
            (
                self.image(query.rows(*chunk)),
                self.image(task.output.rows(*chunk)),
                self.image(residual[0].rows(*chunk)) if residual else None,
            )
            for chunk in _chunks((0, height), rows)
        ]

        def run(frame: Frame) -> None:
            keys, values = (_pixels(take(frame), heads) for take in (take_key, take_value))
            for take, output, added in chunks:
                queries = _pixels(take(frame), heads)
                found = attend(queries, keys, values, operation.scale)
                out = output(frame)
                result = found.transpose(1, 2).reshape(len(found), -1, width, value.channels)
                self.kernels.write(
                    result.permute(0, 3, 1, 2), out, None, None if added is None else added(frame)
                )

        copied = sum(
            self.bytes_of(view.channels, height, width)
            for view in (key, value)
            if not self.is_dense(view)
        )
        # Queries, the result, and its order of channels.
        chunk = self.bytes_of(2 * value.channels + query.channels, rows, width)
        scores = self.batch * heads * rows * width * height * width * 4
        if multiplies:
            scores += scores // 4 * self.size  # and the weights that they give
        else:
            scores = min(scores, self.rules.machine.scored_bytes)
        library = self.rules.machine.library_bytes if multiplies else 0
        return copied + chunk + scores + library, run

    # Everything else.

    def other(self, task: Task) -> Lowered:
        """Operations that compute rows from the same rows, or from others by a fixed factor."""
        operation = task.operation
        assert task.output is not None
        starts = [rows[0] for rows in self.rows_read(operation, task.rows)]
        chunks = []
        for begin, end in _chunks(task.rows, self.rules.chunk_rows(operation)):
            views = [
                view.rows(rows[0] - start, rows[1] - start)
                for view, rows, start in zip(
                    task.inputs, self.rows_read(operation, (begin, end)), starts, strict=True
                )
            ]
            out = task.output.rows(begin - task.rows[0], end - task.rows[0])
            chunks.append((begin, [self.image(view) for view in views], self.image(out)))
        compute = self.pointwise(task)

        def run(frame: Frame) -> None:
            for begin, images, out in chunks:
                compute(frame, begin, [take(frame) for take in images], out(frame))

        rows = self.rules.chunk_rows(operation)
        shapes = [self.rules.shapes[each] for each in (*operation.inputs, operation.output)]
        most = max(self.bytes_of(c, h, w, 4) // task.output.height for _, c, h, w in shapes)
        return 4 * rows * most, run

    def rows_read(self, operation: Operation, rows: Rows) -> list[Rows]:
        """The rows of each input that some rows of an output need."""
        begin, end = rows
        match operation:
            case Modulate() | Shuffle():
                heights = {value: shape[2] for value, shape in self.rules.shapes.items()}
                return [found for _, found in rows_read(operation, rows, 1, heights)]
            case Upsample():
                return [(begin // 2, -(-end // 2))]
            case Pad(padding=(above, *_)):
                height = self.rules.shapes[operation.input][2]
                return [(min(height, max(0, begin - above)), max(0, min(height, end - above)))]
        return [rows] * len(operation.inputs)

    def pointwise(self, task: Task) -> Callable[[Frame, int, list[Tensor], Tensor], None]:
        """What computes rows of an output: from its first row, the inputs, and the output."""
        operation = task.operation
        match operation:
            case Identity():
                return lambda frame, begin, images, out: kernels.apply(images[0], Reading(), out)
            case Add():
                return lambda frame, begin, images, out: kernels.write(images[0] + images[1], out)
            case Scale(factor=factor, offset=offset):
                return lambda frame, begin, images, out: kernels.write(
                    (images[0] * factor).add_(offset), out
                )
            case GroupNorm() | PixelNorm() | Activation():
                reading = self.reading(task, getattr(operation, "function", None))
                return lambda frame, begin, images, out: self.kernels.apply(
                    images[0], reading(frame), out
                )
            case Modulate():
                return self.modulation(task, operation)
            case Upsample():
                return lambda frame, begin, images, out: kernels.write(
                    F.interpolate(images[0], scale_factor=2.0, mode="nearest"), out
                )
            case Shuffle(way=way):
                order = torch.tensor(operation.order, device=self.rules.machine.device)

                def shuffle(frame: Frame, begin: int, images: list[Tensor], out: Tensor) -> None:
                    image = F.pixel_unshuffle(images[0], 2) if way == "down" else images[0]
                    image = image[:, order]
                    kernels.write(F.pixel_shuffle(image, 2) if way == "up" else image, out)

                return shuffle
            case Pad(padding=(above, _, left, _)):

                def pad(frame: Frame, begin: int, images: list[Tensor], out: Tensor) -> None:
                    height, width = images[0].shape[2:]
                    top = max(0, above - begin)
                    out.zero_()
                    out[:, :, top : top + height, left : left + width].copy_(images[0])

                return pad
        raise NotImplementedError(f"no calls for {operation.kind}")

    def modulation(
        self, task: Task, operation: Modulate
    ) -> Callable[[Frame, int, list[Tensor], Tensor], None]:
        reading = self.reading(task)
        shapes = self.rules.shapes
        factor = shapes[operation.input][2] // shapes[operation.scale][2]

        def modulate(frame: Frame, begin: int, images: list[Tensor], out: Tensor) -> None:
            image, *others = images
            work = torch.empty_like(image, dtype=torch.float32)
            kernels.apply(image.float(), reading(frame), work)
            first = begin % factor
            for other, change in zip(others, (work.mul_, work.add_), strict=False):
                wide = other.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
                change(wide[:, :, first : first + image.shape[2]])
            out.copy_(work)

        return modulate


def _chunks(rows: Rows, height: int) -> list[Rows]:
    """A range of rows, which begins where a chunk does, in chunks of a height."""
    begin, end = rows
    return [(first, min(end, first + height)) for first in range(begin, end, height)]


def _pixels(image: Tensor, heads: int) -> Tensor:
    """An image as `(N, heads, H * W, C / heads)`; a view of it if its rows are dense."""
    batch, channels, height, width = image.shape
    pixels = image.permute(0, 2, 3, 1).reshape(batch, height * width, heads, channels // heads)
    return pixels.transpose(1, 2)


def _beside(phases: Tensor) -> Tensor:
    """An image of 2x2 phases, which are its first channels, `(N, 4 * C, H, W)`."""
    batch, channels, height, width = phases.shape
    result = torch.empty(
        (batch, channels // 4, 2 * height, 2 * width),
        dtype=phases.dtype,
        device=phases.device,
        memory_format=torch.channels_last,
    )
    for index, phase in enumerate(phases.chunk(4, 1)):
        result[:, :, index // 2 :: 2, index % 2 :: 2].copy_(phase)
    return result
