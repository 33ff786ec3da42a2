"""Imports the names of a package at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of a package that imports names at their first use.

    Args:
        package: The name of the package; `dir` lists its `__all__`.
        modules: The names from each module, by `".module"`.

    Example:
        >>> __getattr__, __dir__ = lazy_names(__name__, {".model": ("RBLNModel",)})
        ... # doctest: +SKIP
    """
    where = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(where[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, lambda: sorted(sys.modules[package].__all__)
