"""The benchmarks import each other in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

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
