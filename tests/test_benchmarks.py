"""The benchmarks import each other in one direction, and fit what they say that they fit."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from benchmarks.kernels import Timing, fit, measure, time_case
from benchmarks.shapes import CONVOLUTIONS

from rbln_vae.targets.cpu.runtime import usable_kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def imports(file: Path) -> set[str]:
    """The modules beside a file that it imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").removeprefix("benchmarks").strip(".")
        if node.level == 1 or (node.module or "").split(".")[0] == "benchmarks":
            found |= {module} if module else {alias.name for alias in node.names}
    return found


def test_no_module_imports_itself_by_way_of_others():
    modules = {file.stem: imports(file) for file in BENCHMARKS.glob("*.py")}
    assert modules["speed"] >= {"report", "worker"}
    TopologicalSorter(modules).prepare()  # raises CycleError


def timing(counts: tuple[float, ...], costs: tuple[float, ...]) -> Timing:
    seconds = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    return Timing(CONVOLUTIONS[0], "definition", seconds, 0, counts)


def test_constants_that_explain_all_times_are_found():
    costs = (1e-9, 24e-9, 6e-9)
    counts = [(1e6, 100.0, 0.0), (1e6, 5000.0, 70.0), (3e3, 20.0, 900.0), (8e9, 1e4, 3e6)]
    assert fit([timing(each, costs) for each in counts]) == pytest.approx(costs)


def test_a_constant_that_no_shape_tells_is_left_out():
    counts = [(1e6, 0.0, 10.0), (1e3, 0.0, 900.0)]
    found = fit([timing(each, (2e-9, 1.0, 8e-9)) for each in counts])
    assert found == [pytest.approx(2e-9), None, pytest.approx(8e-9)]


def test_kernels_are_not_timed_on_instruction_sets_that_are_not_there():
    with pytest.raises(ValueError, match="abacus"):
        measure(["abacus"], ["cases"], 1)


@pytest.mark.parametrize("kernels", usable_kernels(), ids=lambda k: f"{k.isa} {k.dtype}")
def test_kernels_are_timed_by_either_algorithm_where_they_have_both(kernels, monkeypatch):
    monkeypatch.setenv("RBLN_VAE_ISA", kernels.isa)  # so that it is put back, too
    case = next(case for case in CONVOLUTIONS if case.suits_winograd)
    definition = {each.kind for each in time_case(case, kernels, False, 1)}
    assert "definition" in definition
    assert not definition & {"Winograd", "its kernels"}
    if kernels.winograd:
        assert {each.kind for each in time_case(case, kernels, True, 1)} >= {
            "Winograd",
            "its kernels",
        }


def test_noise_takes_no_constant_below_zero_nor_leaves_out_the_others():
    counts = [(1e9, 10.0), (2e9, 1000.0), (4e9, 50.0)]
    timings = [timing(each, (1e-9, 0.0)) for each in counts]
    timings[1] = Timing(CONVOLUTIONS[0], "definition", 1.9, 0, counts[1])
    product, other = fit(timings)
    assert product == pytest.approx(1e-9, rel=0.05)
    assert other is None
