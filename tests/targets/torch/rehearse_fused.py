"""Rehearses a decode as on a GPU, without one, and then runs it, but for Triton's kernels.

Prints how many kernels the rehearsal compiled, and how many the run would have compiled after it.
"""

from __future__ import annotations

import functools
import sys

import torch
from test_torch_runtime import graph_of
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rbln_vae.targets.torch import fused
from rbln_vae.targets.torch.planner import TorchPlanner
from rbln_vae.targets.torch.program import Frame
from rbln_vae.targets.torch.rehearsal import rehearse
from rbln_vae.targets.torch.rules import Machine
from rbln_vae.targets.torch.weights import Weights

DTYPE = torch.bfloat16


class Driver:
    """Stands in for the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(name: str) -> None:
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["repr"])
    driver.set_active(Driver())
    graph = graph_of(name, "decoder")
    cpu = torch.device("cpu")
    machine = Machine(cpu, DTYPE, 2**12, 2**16, 2**16, 2**16, 0, fused=True)
    weights = Weights(graph, machine)
    planner = TorchPlanner(graph, machine, weights)
    shape = (1, graph.input_channels, 48, 24)
    program = planner.fitted(shape, 2**40, 0)
    rehearse(program, planner.rules(shape), weights)
    print(len(compiled))

    fused._called = lambda kernel, grid, tensor: functools.partial(kernel.warmup, grid=grid)
    arena = torch.empty(program.schedule.arena_bytes, dtype=torch.uint8)
    result = torch.empty(program.schedule.output_shape)
    state = torch.empty(program.schedule.state_bytes, dtype=torch.uint8)
    frame = Frame.on(arena, DTYPE, [torch.zeros(shape)], [result], DTYPE, state.view(DTYPE))
    for step in program.steps:
        step.run(frame)
    print(len(compiled))


if __name__ == "__main__":
    main(sys.argv[1])
