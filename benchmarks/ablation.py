"""What each optimisation gains: the same model with one thing switched off."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.artifact import Artifact, read_artifact
from rbln_vae.graph import passes
from rbln_vae.graph.capture import capture
from rbln_vae.graph.ir import Conv2d, Graph, Identity, Operation
from rbln_vae.schedule import scheduler
from rbln_vae.targets.cpu.kernels import best_dtype, usable_kernels
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import FASTEST, Choices

from .contenders import Contender
from .machine import threads
from .models import load, make_model
from .report import write
from .worker import Worker

NOTHING = "nothing"
"""The case that all others are compared with."""

SAME = 0.02
"""How much the mean square of a result may change: the model must stay the same."""

_PR_SET_THP_DISABLE = 41


class Ablated(Contender):
    """This package's engine with one thing switched off, in a process of its own.

    Attributes:
        passes: Those that the graph goes through.
        dtype: In what to compute.
        before: Called before each run.
        native: The runtime.
    """

    def __init__(self, case: Case, directory: Path, part: str, size: int, threads: int) -> None:
        self.case = case
        super().__init__(directory, part, size, threads)

    def prepare(self) -> None:
        artifact = read_artifact(self.directory / f"{self.part}.rbln")
        self.passes: list[passes.Pass] = list(passes.PASSES)
        self.dtype = artifact.dtype
        self.before: Callable[[], object] = lambda: None
        self.case.switch_off(self)
        graph = artifact.graph
        for rewrite in self.passes:
            graph = rewrite(graph)
        self.native = CpuRuntime(
            graph,
            dtype=self.dtype,
            num_threads=self.threads,
            timeout=3600.0,
            choices=self.case.choices,
        )

    def run(self) -> torch.Tensor:
        self.before()
        return self.native.run(self.input)


@dataclass(frozen=True)
class Case:
    """One thing to switch off.

    Attributes:
        meaning: What it is, for the table.
        switch_off: Does so, before the runtime of an `Ablated` is made. It may change the
            process, which runs nothing else.
        parts: Where it can matter.
        choices: What the programs may do without it.
    """

    meaning: str
    switch_off: Callable[[Ablated], object] = lambda _: None
    parts: tuple[str, ...] = ("decode", "encode")
    choices: Choices = FASTEST


def _without(rewrite: passes.Pass) -> Callable[[Ablated], None]:
    return lambda contender: contender.passes.remove(rewrite)


def _summed_apart(graph: Graph) -> Graph:
    """The graph with a copy before each norm, which hides from a convolution who reads it.

    The scheduler gives the copy the memory of the original, so that nothing is copied; but
    the statistics are then a step of their own.
    """
    normed = {o.inputs[0] for o in graph.operations if getattr(o, "norm", None) is not None}
    operations: list[Operation] = []
    for operation in graph.operations:
        if isinstance(operation, Conv2d) and operation.output in normed:
            bare = f"{operation.output}.bare"
            operations.append(dataclasses.replace(operation, output=bare))
            operations.append(Identity(operation.output, bare))
        else:
            operations.append(operation)
    return dataclasses.replace(graph, operations=tuple(operations)).verify()


def _statistics(contender: Ablated) -> None:
    contender.passes.append(_summed_apart)


def _large_pages(contender: Ablated) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "large pages can't be switched off")


def _over_input(contender: Ablated) -> None:
    scheduler.REPLACED_BYTES = sys.maxsize


def _kept_memory(contender: Ablated) -> None:
    contender.before = lambda: contender.native.release_memory()


def _kept_plans(contender: Ablated) -> None:
    contender.before = lambda: contender.native.forget_plans()


def _instruction_set(contender: Ablated) -> None:
    best = usable_kernels()[-1].isa
    # The portable kernels are no step but a fall: only where there is nothing between.
    below = [k.isa for k in usable_kernels() if k.isa != best]
    if not below:
        raise ValueError(f"there is no instruction set below {best!r}; leave this case out")
    os.environ["RBLN_VAE_ISA"] = below[-1]
    contender.dtype = best_dtype()


def _threads(contender: Ablated) -> None:
    contender.threads = 1


CASES: dict[str, Case] = {
    NOTHING: Case("nothing"),
    "upsample": Case(
        "doubling as a part of convolutions", _without(passes.fold_upsample), ("decode",)
    ),
    "pad": Case("borders as padding of convolutions", _without(passes.fold_pad), ("encode",)),
    "norm": Case("norm and SiLU applied on reading", _without(passes.fuse_norm)),
    "residual": Case("sums added on writing", _without(passes.fuse_residual)),
    "value": Case(
        "attention's value and output projections folded", _without(passes.fold_value_projection)
    ),
    "statistics": Case("statistics summed on writing", _statistics),
    "winograd": Case(
        "convolutions of 3x3 by Winograd's algorithm (not AMX)", choices=Choices(winograd=0)
    ),
    "halving": Case(
        "those with stride 2, too (not AMX)", choices=Choices(halving=False), parts=("encode",)
    ),
    "splits": Case("output channels split where tiles are few", choices=Choices(splits=False)),
    "together": Case(
        "the next tile loaded during a product (AMX)", choices=Choices(together=False)
    ),
    "in-place": Case("sums written over their residual", choices=Choices(in_place=False)),
    "over-input": Case("large convolutions written over their input", _over_input),
    "large-pages": Case("the arena in large pages", _large_pages),
    "kept-memory": Case("the arena kept for the next run", _kept_memory),
    "kept-kernels": Case(
        "transformed kernels kept for the next run", choices=Choices(kept_kernels=False)
    ),
    "kept-plans": Case("the plan kept for the next run", _kept_plans),
    "isa": Case("the best instruction set: one lower, in its best dtype", _instruction_set),
    "threads": Case("all threads: one", _threads),
}


def usual_cases() -> list[str]:
    """Names of all cases that can matter on this machine."""
    amx = not usable_kernels()[-1].winograd
    others = ["winograd", "halving", "kept-kernels"] if amx else ["together"]
    return [name for name in CASES if name not in others]


@dataclass
class Comparison:
    """The runs of one case, each beside one of the whole model."""

    case: str
    part: str
    size: int
    whole: list[float] = field(default_factory=list)
    ablated: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [a / w for a, w in zip(self.ablated, self.whole, strict=True)]

    def row(self) -> str:
        ratios = self.ratios
        return (
            f"| {self.part} {self.size}² | {CASES[self.case].meaning} | "
            f"{statistics.median(self.whole):.3f} | {statistics.median(self.ablated):.3f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


HEAD = (
    "| | switched off | median s with it | median s without | times as long | min to max |\n"
    "| --- | --- | ---: | ---: | ---: | ---: |"
)


def measure(
    parts: Iterable[str], size: int, names: Iterable[str], rounds: int, dtype: str | None = None
) -> list[Comparison]:
    """Run each case in turn with the whole model, and print each row when it is known.

    Args:
        parts: `"decode"`, `"encode"` or both.
        size: Pixels a side.
        names: Keys of `CASES`.
        rounds: Counted pairs of runs of each case, after one that warms up.
        dtype: In what to compute; `None` is what is fastest here.

    Returns:
        A comparison for each part and each case that can matter to it.

    Raises:
        ValueError: A part or a case has an unknown name.
        RuntimeError: A case doesn't compute the same as the whole model.
    """
    parts, names = list(parts), list(names)
    for kind, given, known in (("parts", parts, ("decode", "encode")), ("cases", names, CASES)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"no {kind} {unknown}; there are {list(known)}")
    compared: list[Comparison] = []
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        _save(directory, parts, dtype or best_dtype())
        print(HEAD, flush=True)
        for part in parts:
            with Worker(f"without {NOTHING}", directory, part, size, threads()) as whole:
                expected = whole.run()["power"]
                for name in names:
                    if part not in CASES[name].parts:
                        continue
                    result = Comparison(name, part, size)
                    with Worker(f"without {name}", directory, part, size, threads()) as ablated:
                        power = ablated.run()["power"]
                        if not abs(power - expected) <= SAME * expected:
                            raise RuntimeError(
                                f"without {name} the {part} gives a mean square of {power}, and "
                                f"with it {expected}: it isn't the same model"
                            )
                        pair = [(whole, result.whole), (ablated, result.ablated)]
                        for _ in range(rounds):
                            for worker, seconds in pair:
                                seconds.append(worker.run()["seconds"])
                            pair.reverse()
                    print(result.row(), flush=True)
                    compared.append(result)
    return compared


def save(compared: Iterable[Comparison]) -> Path:
    """Write `benchmarks/results/ablation.md`."""
    return write("ablation", "\n".join([HEAD, *(comparison.row() for comparison in compared)]))


def _save(directory: Path, parts: Iterable[str], dtype: str) -> None:
    """Write a model with random weights, and its captured graphs before any pass."""
    make_model(directory)
    model = load(directory).eval()
    channels = {"encode": model.config.in_channels, "decode": model.config.latent_channels}
    for part in parts:
        name = f"{part}r"
        graph = capture(RBLNAutoencoderKL.family.module(model, name), name, channels[part])
        Artifact(graph, "cpu", dtype).save(directory / f"{part}.rbln")
