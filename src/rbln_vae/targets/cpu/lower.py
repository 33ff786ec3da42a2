"""From a schedule to a program: each task becomes one step of the engine."""

from __future__ import annotations

import dataclasses

from ... import _engine
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
    RMSNorm,
    Scale,
    Shape,
    Shuffle,
    Upsample,
)
from ...schedule.arena import Buffer, View
from ...schedule.schedule import Kind, Schedule, Task
from ...schedule.sweep import top_row
from ...units import format_bytes
from .packing import BLOCK, PANEL, bias_name, factor_name, kernels_name, order_name
from .program import Kernels, Native, Program, Step
from .rules import CpuRules, statistics_cell
from .tiles import attention_blocks, convolution_work, kernels_work

ADDRESSABLE = 2**62
"""Bytes that the engine can count in any sum of two sizes."""


def lower(schedule: Schedule, rules: CpuRules) -> Program:
    """The steps for a schedule.

    Args:
        schedule: Made with the rules.
        rules: Of the engine, for the graph and the shape.

    Raises:
        MemoryError: Its arena is larger than any address.
    """
    if schedule.arena_bytes > ADDRESSABLE:
        raise MemoryError(
            f"A run needs {format_bytes(schedule.arena_bytes)}, more than can be addressed. "
            "Run a smaller image."
        )
    lowering = _Lowering(rules)
    return Program(schedule, rules.machine, tuple(map(lowering.step, schedule.tasks)))


class _Lowering:
    def __init__(self, rules: CpuRules) -> None:
        self.rules = rules
        self.machine = rules.machine
        self.weights = rules.graph.weights

    def step(self, task: Task) -> Step:
        match task.kind:
            case Kind.IMPORT:
                return self.transfer(_engine.ImportStep, task, task.output)
            case Kind.EXPORT:
                return self.transfer(_engine.ExportStep, task, task.inputs[0])
            case Kind.MOVE:
                return self.move(task)
            case Kind.COPY:
                return self.copy(task)
            case Kind.PREPARE if isinstance(task.operation, Conv2d):
                return self.winograd_kernels(task, task.operation)
            case Kind.PREPARE:
                assert isinstance(task.operation, Attention)
                return self.attention_pack(task, task.operation)
            case Kind.STATISTICS:
                return self.statistics(task)
            case Kind.NORM:
                return self.norm(task)
            case Kind.COMPUTE if isinstance(task.operation, Conv2d):
                return self.convolution(task, task.operation)
            case Kind.COMPUTE if isinstance(task.operation, Attention):
                return self.attention(task, task.operation)
            case Kind.COMPUTE if isinstance(task.operation, Modulate):
                return self.modulation(task, task.operation)
            case Kind.COMPUTE if isinstance(task.operation, Shuffle):
                return self.shuffle(task, task.operation)
            case Kind.COMPUTE:
                return self.pointwise(task)

    def make(
        self,
        task: Task,
        native: Native,
        *weights: str | None,
        kind: str | None = None,
        work: float | None = None,
        extra_bytes: int = 0,
        kernels: Kernels | None = None,
    ) -> Step:
        views = (*task.inputs, *([task.output] if task.output is not None else []))
        size = extra_bytes + sum(buffer.bytes for buffer in task.buffers.values())
        for view in views:
            size += self.batch(task) * view.height * self.rules.row_bytes(view.channels, view.width)
        return Step(
            name=task.value,
            kind=kind or task.kind.value,
            flops=task.flops,
            work=task.flops if work is None else work,
            bytes=size,
            sweep=task.sweep,
            native=native,
            weights=weights,
            kernels=kernels,
        )

    def batch(self, task: Task) -> int:
        """The images that a task reads and writes."""
        return self.shape(task)[0]

    def image(self, view: View | None = None) -> _engine.Image:
        """An image as the engine takes it, or one without channels."""
        if view is None:
            return _engine.Image()
        pixel = BLOCK * self.machine.element_bytes
        return _engine.Image(
            offset=view.buffer.offset + view.offset,
            channels=view.channels,
            height=view.height,
            width=view.width,
            row=view.row_bytes // pixel,
            sample=view.image_bytes // pixel,
        )

    def transfer(
        self,
        kind: type[_engine.ImportStep] | type[_engine.ExportStep],
        task: Task,
        view: View | None,
    ) -> Step:
        native = kind(
            batch=self.batch(task),
            image=self.image(view),
            first_row=task.rows[0],
            tensor=task.tensor,
        )
        return self.make(task, native)

    def copy(self, task: Task) -> Step:
        (source,) = task.inputs
        native = _engine.PointwiseStep(
            batch=self.batch(task), input=self.image(source), output=self.image(task.output)
        )
        return self.make(task, native)

    def move(self, task: Task) -> Step:
        first, last = task.rows
        image = self.image(task.output)
        native = _engine.MoveRowsStep(
            batch=self.batch(task), image=image, from_row=first, rows=last - first
        )
        return self.make(task, native)

    def reading(self, task: Task, activation: str | None) -> _engine.Reading:
        """What is done with the input while it is read."""
        return _engine.Reading(
            coefficients=_offset(task.buffers.get("coefficients")),
            activation=_activation(activation),
        )

    # Convolutions.

    def winograd_kernels(self, task: Task, operation: Conv2d) -> Step:
        conv = self.rules.convolution(operation)
        native = _engine.WinogradStep(
            panels=conv.panels,
            blocks=-(-conv.inputs // BLOCK),
            skipped=self.rules.skipped_blocks(operation),
            phases=conv.phases,
            stride=conv.stride,
            at_once=conv.at_once,
            kernels=_offset(task.buffers["kernels"]),
        )
        work = 2 * kernels_work(conv, self.machine)
        kernels = self.transformed(operation, task.buffers["kernels"])
        name = kernels_name(operation)
        return self.make(task, native, name, kind="Winograd", work=work, kernels=kernels)

    def transformed(self, operation: Conv2d, buffer: Buffer | None) -> Kernels | None:
        """The transformed kernels in a buffer; they are others for other frames."""
        if buffer is None:
            return None
        name, at_once = kernels_name(operation), self.rules.convolution(operation).at_once
        if operation.left_out:
            name += f" without {operation.left_out} frames"
        if at_once > 1:
            name += f" for {at_once} frames"
        return Kernels(name, buffer.bytes)

    def convolution(self, task: Task, operation: Conv2d) -> Step:
        rules, machine = self.rules, self.machine
        whole = rules.convolution(operation)
        scale = 2 if operation.upsample else 1
        begin, end = task.rows[0] // scale, task.rows[1] // scale
        conv = dataclasses.replace(whole, grid=(end - begin, whole.grid[1]))
        sums, kernels = task.buffers.get("sums"), task.buffers.get("kernels")
        # Sums are made by cells of the whole image; else tiles are free.
        tall, wide = conv.unit if sums is None else rules.cell(whole)
        parts = self.batch(task) // conv.at_once
        tile, splits = rules.partition(conv, (tall, wide), parts)
        assert task.output is not None
        if self.image(task.output).offset == self.image(task.inputs[0]).offset:
            splits = 1  # no other item may read what one has overwritten
        cell = tile if sums is None else (min(tall, end - begin), wide)
        partials = _offset(sums)
        if sums is not None:
            partials += begin // tall * -(-whole.grid[1] // wide) * whole.sums_bytes
        weights: list[str | None] = [bias_name(operation), None, None, None]
        weight_bytes, eps = 0, 0.0
        if isinstance(operation.norm, RMSNorm):
            weights[2], eps = operation.norm.weight, operation.norm.eps
        if machine.dtype == "float16":
            weights[3] = factor_name(operation)
        if kernels is None:
            weights[1] = kernels_name(operation)
            weight_bytes = conv.weights * machine.element_bytes
        count = len(task.inputs) - len(operation.earlier)
        source, *residual = task.inputs[:count]
        earlier = [self.image(view) for view in task.inputs[count:]]
        absent = _engine.ConvStep().earlier[len(earlier) :]
        # In a sketch the first strip stands for all of them.
        rows = task.rows[1] - task.rows[0]
        whole_flops = operation.flops(rules.shapes, self.weights)
        strips = task.flops * rules.shapes[operation.output][2] / (whole_flops * rows)
        work = 2 * parts * convolution_work(conv, tile, machine) * strips
        native = _engine.ConvStep(
            batch=self.batch(task),
            input=self.image(source),
            earlier=[*earlier, *absent],
            left_out=operation.left_out,
            stacked=rules.stacked(operation),
            at_once=conv.at_once,
            over_clip=operation.over_clip,
            output=self.image(task.output),
            reading=self.reading(task, operation.activation),
            eps=eps,
            residual=self.image(*residual),
            output_activation=_activation(operation.output_activation),
            kernel_height=conv.kernel[0],
            kernel_width=conv.kernel[1],
            stride=operation.stride,
            above=task.source_row - top_row(operation, task.rows[0]),
            left=operation.padding[2],
            upsample=operation.upsample,
            doubles=conv.doubles,
            kernels=_offset(kernels),
            tile_height=tile[0],
            tile_width=tile[1],
            cell_height=cell[0],
            cell_width=cell[1],
            image_cells=0 if sums is None else whole.tiles((tall, wide)),
            splits=splits,
            together=rules.together(conv, tile, splits, parts),
            partials=partials,
        )
        return self.make(
            task,
            native,
            *weights,
            kind=operation.kind,
            work=work,
            extra_bytes=weight_bytes,
            kernels=self.transformed(operation, kernels),
        )

    # Norms.

    def statistics(self, task: Task) -> Step:
        (view,) = task.inputs
        cell = statistics_cell(self.shape(task))
        native = _engine.StatisticsStep(
            batch=self.batch(task),
            input=self.image(view),
            cell_height=cell[0],
            cell_width=cell[1],
            partials=_offset(task.buffers["sums"]),
        )
        return self.make(task, native)

    def norm(self, task: Task) -> Step:
        norm, operation = task.norm, task.operation
        assert norm is not None
        _, channels, height, width = self.shape(task)
        if isinstance(operation, Conv2d):
            conv = self.rules.convolution(operation)
            summed, grid, cell = conv.panels * PANEL, conv.grid, self.rules.cell(conv)
            points = 4 if operation.upsample else 1
        else:
            summed, grid = -(-channels // BLOCK) * BLOCK, (height, width)
            cell, points = statistics_cell(self.shape(task)), 1
        native = _engine.NormStep(
            batch=self.batch(task),
            channels=channels,
            groups=norm.groups,
            over_clip=norm.over_clip,
            eps=norm.eps,
            partials=_offset(task.buffers["sums"]),
            partial_channels=summed,
            grid_height=grid[0],
            grid_width=grid[1],
            cell_height=cell[0],
            cell_width=cell[1],
            points=points,
            coefficients=_offset(task.buffers["coefficients"]),
        )
        return self.make(task, native, norm.weight, norm.bias)

    def shape(self, task: Task) -> Shape:
        return self.rules.shapes[task.value]

    # Everything else.

    def attention_pack(self, task: Task, operation: Attention) -> Step:
        key, value = task.inputs
        native = _engine.AttentionPackStep(
            batch=self.batch(task),
            key=self.image(key),
            value=self.image(value),
            heads=operation.heads,
            packed_keys=_offset(task.buffers["keys"]),
            packed_values=_offset(task.buffers["values"]),
        )
        return self.make(task, native, kind="AttentionPack")

    def attention(self, task: Task, operation: Attention) -> Step:
        query, *residual = task.inputs
        matrices = self.batch(task) * operation.heads
        queries, keys = attention_blocks(query.height * query.width, matrices, self.machine)
        native = _engine.AttentionStep(
            batch=self.batch(task),
            query=self.image(query),
            output=self.image(task.output),
            heads=operation.heads,
            scale=operation.scale,
            packed_keys=_offset(task.buffers["keys"]),
            packed_values=_offset(task.buffers["values"]),
            residual=self.image(*residual),
            queries=queries,
            keys=keys,
        )
        return self.make(task, native, kind=operation.kind)

    def modulation(self, task: Task, operation: Modulate) -> Step:
        source, scale, *shift = task.inputs
        native = _engine.ModulateStep(
            batch=self.batch(task),
            input=self.image(source),
            output=self.image(task.output),
            coefficients=_offset(task.buffers.get("coefficients")),
            scale=self.image(scale),
            shift=self.image(*shift),
            factor=source.height // scale.height,
        )
        return self.make(task, native, kind=operation.kind)

    def shuffle(self, task: Task, operation: Shuffle) -> Step:
        (source,) = task.inputs
        native = _engine.ShuffleStep(
            batch=self.batch(task), input=self.image(source), output=self.image(task.output)
        )
        return self.make(task, native, order_name(operation), kind=operation.kind)

    def pointwise(self, task: Task) -> Step:
        operation: Operation = task.operation
        activation: str | None = None
        factor, offset, above, left = 1.0, 0.0, 0, 0
        match operation:
            case Activation(function=activation):
                pass
            case Scale(factor=factor, offset=offset):
                pass
            case Pad(padding=(above, _, left, _)):
                pass
            case GroupNorm() | Add() | Identity() | Upsample():
                pass
            case _:
                raise NotImplementedError(f"no step for {operation.kind}")
        source, *residual = task.inputs
        native = _engine.PointwiseStep(
            batch=self.batch(task),
            input=self.image(source),
            output=self.image(task.output),
            reading=self.reading(task, activation),
            factor=factor,
            offset=offset,
            upsample=isinstance(operation, Upsample),
            above=above,
            left=left,
            residual=self.image(*residual),
        )
        return self.make(task, native, kind=operation.kind)


def _activation(function: str | None) -> _engine.Activation:
    return _engine.Activation[function or "none"]


def _offset(buffer: Buffer | None) -> int:
    return _engine.NONE if buffer is None else buffer.offset
