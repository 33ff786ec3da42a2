"""What is installed with the package is what the package imports."""

from __future__ import annotations

import ast
import re
from importlib.metadata import requires
from pathlib import Path

import pytest

import rbln_vae

SOURCES = Path(rbln_vae.__file__).parent
NAMES = {"pillow": "PIL"}
"""Modules whose names are not those of their packages."""

DEPENDENCIES = [
    re.split(r"[^\w-]", each)[0] for each in requires("rbln-vae") or [] if "extra ==" not in each
]


def imported(source: str) -> set[str]:
    """The packages that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_there_are_dependencies():
    assert {"diffusers", "torch"} <= set(DEPENDENCIES)


@pytest.mark.parametrize("package", DEPENDENCIES)
def test_the_package_imports_what_it_depends_on(package):
    module = NAMES.get(package, package.replace("-", "_"))
    assert any(module in imported(file.read_text()) for file in SOURCES.rglob("*.py"))
