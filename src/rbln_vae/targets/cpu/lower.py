"""From a schedule to a program: each task becomes one step of the engine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ...graph.ir import (
    Activation,
    Attention,
    Conv2d,
    Operation,
    Pad,
    Scale,
    Shape,
    Upsample,
)
from ...schedule.arena import Buffer, View
from ...schedule.schedule import Kind, Schedule, Task
from ...schedule.sweep import top_row
from .packing import BLOCK, PANEL, bias_name
from .program import Program, Step
from .rules import CpuRules, statistics_tile
from .tiles import attention_blocks, convolution_work, kernels_work

Sizes = tuple[int, int, int, int, int, int]


def lower(schedule: Schedule, rules: CpuRules) -> Program:
    """The steps for a schedule.

    Args:
        schedule: Made with the rules.
        rules: Of the engine, for the graph and the shape.
    """
    lowering = _Lowering(rules)
    return Program(schedule, rules.machine, tuple(map(lowering.step, schedule.tasks)))


class _Lowering:
    def __init__(self, rules: CpuRules) -> None:
        self.rules = rules
        self.machine = rules.machine
        self.batch = rules.batch
        self.weights = rules.graph.weights

    def step(self, task: Task) -> Step:
        match task.kind:
            case Kind.IMPORT:
                return self.transfer("import_image", task, task.output)
            case Kind.EXPORT:
                return self.transfer("export_image", task, task.inputs[0])
            case Kind.KEEP:
                return self.pointwise(task)
            case Kind.MOVE:
                return self.move(task)
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
            case Kind.COMPUTE:
                return self.pointwise(task)

    def make(
        self,
        call: str,
        task: Task,
        arguments: dict[str, Any],
        *,
        kind: str | None = None,
        weights: dict[str, str] | None = None,
        work: float | None = None,
        extra_bytes: int = 0,
    ) -> Step:
        views = (*task.inputs, *([task.output] if task.output is not None else []))
        size = extra_bytes + sum(buffer.bytes for buffer in task.buffers.values())
        for view in views:
            size += self.batch * view.height * self.rules.row_bytes(view.channels, view.width)
        return Step(
            call,
            task.value,
            kind or task.kind.value,
            task.flops,
            task.flops if work is None else work,
            size,
            {"batch": self.batch, **arguments},
            weights or {},
            task.sweep,
        )

    def image(self, view: View | None) -> Sizes | None:
        """An image as the engine takes it."""
        if view is None:
            return None
        channels, rows = view.room
        plane = rows * view.width
        blocks = -(-channels // BLOCK)
        offset = view.buffer.offset + view.row * view.width * BLOCK * self.machine.element_bytes
        return (offset, view.channels, view.height, view.width, plane, blocks * plane)

    def transfer(self, call: str, task: Task, view: View | None) -> Step:
        return self.make(call, task, {"image": self.image(view), "first_row": task.rows[0]})

    def move(self, task: Task) -> Step:
        first, last = task.rows
        arguments = {"image": self.image(task.output), "from_row": first, "rows": last - first}
        return self.make("move_rows", task, arguments)

    def reading(self, task: Task, activation: str | None) -> dict[str, Any]:
        """What is done with the input while it is read."""
        coefficients = task.buffers.get("coefficients")
        return {"coefficients": _offset(coefficients), "activation": activation}

    # Convolutions.

    def winograd_kernels(self, task: Task, operation: Conv2d) -> Step:
        conv = self.rules.convolution(operation)
        arguments = {
            "panels": conv.panels,
            "blocks": -(-conv.inputs // BLOCK),
            "upsample": conv.upsample,
            "kernels": _offset(task.buffers["kernels"]),
        }
        return self.make(
            "winograd_kernels",
            task,
            arguments,
            kind="Winograd",
            weights={"weights": operation.weight},
            work=2 * kernels_work(conv, self.machine),
        )

    def convolution(self, task: Task, operation: Conv2d) -> Step:
        rules, machine = self.rules, self.machine
        whole = rules.convolution(operation)
        scale = 2 if operation.upsample else 1
        begin, end = task.rows[0] // scale, task.rows[1] // scale
        conv = dataclasses.replace(whole, grid=(end - begin, whole.grid[1]))
        sums, kernels = task.buffers.get("sums"), task.buffers.get("kernels")
        # Sums are made by tiles of the whole image; else strips have tiles of their own.
        tall, wide = rules.tile(conv if sums is None else whole)
        tile = (min(tall, end - begin), wide)
        splits = rules.splits(conv, tile)
        partials = None
        if sums is not None:
            above = begin // tall * -(-whole.grid[1] // wide)
            partials = sums.offset + above * whole.sums_bytes
        weights = {"weights": operation.weight, "bias": bias_name(operation)}
        weight_bytes = 0
        if kernels is not None:
            del weights["weights"]
        else:
            phases = 4 if operation.upsample else 1
            elements = math.prod(conv.kernel) * conv.inputs * conv.outputs * phases
            weight_bytes = elements * machine.element_bytes
        source, *residual = task.inputs
        # In a sketch the first strip stands for all of them.
        rows = task.rows[1] - task.rows[0]
        whole_flops = operation.flops(rules.shapes, self.weights)
        strips = task.flops * rules.shapes[operation.output][2] / (whole_flops * rows)
        work = 2 * self.batch * convolution_work(conv, tile, machine) * strips
        return self.make(
            "convolution",
            task,
            dict(
                input=self.image(source),
                output=self.image(task.output),
                kernels=_offset(kernels),
                kernel=conv.kernel,
                stride=operation.stride,
                above=task.source_row - top_row(operation, task.rows[0]),
                left=operation.padding[2],
                upsample=operation.upsample,
                residual=self.image(residual[0]) if residual else None,
                partials=partials,
                tile=tile,
                splits=splits,
                together=conv.together(tile, self.batch, splits, machine),
                **self.reading(task, operation.activation),
            ),
            kind=operation.kind,
            weights=weights,
            work=work,
            extra_bytes=weight_bytes,
        )

    # Norms.

    def statistics(self, task: Task) -> Step:
        (view,) = task.inputs
        arguments = {
            "input": self.image(view),
            "tile": statistics_tile(self.shape(task)),
            "partials": _offset(task.buffers["sums"]),
        }
        return self.make("statistics", task, arguments)

    def norm(self, task: Task) -> Step:
        norm, operation = task.norm, task.operation
        assert norm is not None
        _, channels, height, width = self.shape(task)
        if isinstance(operation, Conv2d):
            conv = self.rules.convolution(operation)
            summed, grid, tile = conv.panels * PANEL, conv.grid, self.rules.tile(conv)
            points = 4 if operation.upsample else 1
        else:
            summed, grid = -(-channels // BLOCK) * BLOCK, (height, width)
            tile, points = statistics_tile(self.shape(task)), 1
        arguments = {
            "channels": channels,
            "groups": norm.groups,
            "eps": norm.eps,
            "partials": _offset(task.buffers["sums"]),
            "partial_channels": summed,
            "grid": grid,
            "tile": tile,
            "points": points,
            "coefficients": _offset(task.buffers["coefficients"]),
        }
        return self.make(
            "norm", task, arguments, weights={"weight": norm.weight, "bias": norm.bias}
        )

    def shape(self, task: Task) -> Shape:
        return self.rules.shapes[task.value]

    # Everything else.

    def attention_pack(self, task: Task, operation: Attention) -> Step:
        key, value = task.inputs
        arguments = {
            "key": self.image(key),
            "value": self.image(value),
            "heads": operation.heads,
            "packed_keys": _offset(task.buffers["keys"]),
            "packed_values": _offset(task.buffers["values"]),
        }
        return self.make("attention_pack", task, arguments, kind="AttentionPack")

    def attention(self, task: Task, operation: Attention) -> Step:
        query, *residual = task.inputs
        matrices = self.batch * operation.heads
        queries, keys = attention_blocks(query.height * query.width, matrices, self.machine)
        arguments = {
            "query": self.image(query),
            "output": self.image(task.output),
            "heads": operation.heads,
            "scale": operation.scale,
            "residual": self.image(residual[0]) if residual else None,
            "queries": queries,
            "keys": keys,
            "packed_keys": _offset(task.buffers["keys"]),
            "packed_values": _offset(task.buffers["values"]),
        }
        return self.make("attention", task, arguments, kind=operation.kind)

    def pointwise(self, task: Task) -> Step:
        operation: Operation = task.operation
        activation: str | None = None
        factor, above, left = 1.0, 0, 0
        match operation:
            case Activation(function=activation):
                pass
            case Scale():
                factor = operation.factor
            case Pad(padding=(above, _, left, _)):
                pass
        source, *residual = task.inputs
        arguments = dict(
            input=self.image(source),
            output=self.image(task.output),
            factor=factor,
            upsample=isinstance(operation, Upsample),
            above=above,
            left=left,
            residual=self.image(residual[0]) if residual else None,
            **self.reading(task, activation),
        )
        return self.make("pointwise", task, arguments, kind=operation.kind)


def _offset(buffer: Buffer | None) -> int | None:
    return None if buffer is None else buffer.offset
