"""Rehearses a program, so that Triton compiles its kernels side by side before the first run.

A run would compile each kernel when it first calls it, one after the other. A rehearsal makes the
same calls with tensors that have shapes and no memory (torch's device `meta`), for which `fused`
compiles alone.
"""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.overrides import TorchFunctionMode

from ...host import usable_processors
from .lower import lower
from .program import COPIES, Frame, Program
from .rules import TorchRules
from .weights import Weights

_log = logging.getLogger(__name__)

_NOWHERE = torch.device("meta")


class _ChannelsLast(TorchFunctionMode):
    """Gives what convolutions return the layout that cuDNN gives it; on `meta` it has another."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.conv_transpose2d):
            return result.contiguous(memory_format=torch.channels_last)
        return result


def rehearse(program: Program, rules: TorchRules, weights: Weights) -> None:
    """Compile the kernels of a program for the current GPU.

    Args:
        program: What is about to run.
        rules: Those of its schedule.
        weights: Those of its graph.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:  # before Triton 3.4
        return
    schedule, machine = program.schedule, dataclasses.replace(rules.machine, device=_NOWHERE)
    copied = lower(
        schedule, TorchRules(rules.graph, schedule.input_shape, machine), weights.on(_NOWHERE)
    )
    arena, state = (
        torch.empty(size, dtype=torch.uint8, device=_NOWHERE)
        for size in (schedule.arena_bytes, schedule.state_bytes)
    )
    frame = Frame.on(arena, machine.dtype, [], [], machine.dtype, state.view(machine.dtype))
    try:
        with ThreadPoolExecutor(usable_processors()) as pool, mode(pool), _ChannelsLast():
            for task, step in zip(schedule.tasks, copied.steps, strict=True):
                if task.kind not in COPIES:
                    step.run(frame)
    except Exception as error:  # of torch's or Triton's version; a run compiles by itself, too
        _log.warning("Triton's kernels are compiled one by one: %r", error)
