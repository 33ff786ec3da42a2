"""What the rules choose to be faster, and that it can be switched off."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from vaes import capture_part, make_vae

from rbln_vae import _engine
from rbln_vae.graph.ir import Conv2d, Graph, Operation, Shapes, Weights
from rbln_vae.graph.passes import optimise
from rbln_vae.targets.cpu.program import Program
from rbln_vae.targets.cpu.rules import CpuRules
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import FASTEST, Choices, Machine

SHAPE = (1, 4, 24, 16)


@pytest.fixture(scope="module")
def decoder() -> Graph:
    return optimise(
        capture_part(make_vae(block_out_channels=(32, 64), norm_num_groups=8), "decoder")
    )


def most_splits(program: Program) -> int:
    steps = (step.native for step in program.steps)
    return max(step.splits for step in steps if isinstance(step, _engine.ConvStep))


def in_place(program: Program) -> bool:
    """Whether a convolution writes over its residual."""
    steps = (step.native for step in program.steps)
    return any(
        step.residual.channels > 0 and step.residual.offset == step.output.offset
        for step in steps
        if isinstance(step, _engine.ConvStep)
    )


@pytest.mark.parametrize("choices", [Choices(splits=False), Choices(in_place=False)])
def test_what_is_switched_off_is_not_done_and_changes_no_bit(
    decoder: Graph, choices: Choices
) -> None:
    usual = CpuRuntime(decoder, dtype="float32", num_threads=4)
    other = CpuRuntime(decoder, dtype="float32", num_threads=4, choices=choices)
    for runtime in (usual, other):
        program = runtime.planned(SHAPE).program
        assert (most_splits(program) > 1) is runtime.images.choices.splits
        assert in_place(program) is runtime.images.choices.in_place
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(usual.run(image), other.run(image))


@pytest.mark.parametrize("kernels", _engine.built_kernels(), ids=lambda k: f"{k.isa} {k.dtype}")
def test_tiles_are_done_together_only_where_kernels_overlap_and_it_is_chosen(
    decoder: Graph, kernels: _engine.Kernels
) -> None:
    machine, shape = Machine(kernels, threads=1), (1, 4, 128, 128)
    for choices in (FASTEST, Choices(together=False)):
        rules = CpuRules(decoder, shape, machine, choices)
        convs = [rules.convolution(o) for o in decoder.operations if isinstance(o, Conv2d)]
        most = max(rules.together(conv, rules.tile(conv), 1, 1) for conv in convs)
        assert (most > 1) is (kernels.overlaps and choices.together)


def test_programs_that_are_forgotten_are_made_again(decoder: Graph) -> None:
    runtime = CpuRuntime(decoder, dtype="float32", num_threads=1)
    first = runtime.planned(SHAPE).program
    assert runtime.planned(SHAPE).program is first
    assert runtime.forget_plans() == 1
    assert runtime.planned(SHAPE).program is not first
    assert runtime.forget_plans() == 1


def test_an_operation_that_lowering_does_not_know_is_refused_not_taken_for_another() -> None:
    @dataclass(frozen=True)
    class Unknown(Operation):
        input: str = field(metadata={"role": "value"})

        def infer(self, shapes: Shapes, weights: Weights) -> tuple[int, ...]:
            return shapes[self.input]

    graph = Graph("part", ("x",), 4, ("y",), (Unknown("y", "x"),), {})
    with pytest.raises(NotImplementedError, match="no step for Unknown"):
        CpuRuntime(graph).planned(SHAPE)
