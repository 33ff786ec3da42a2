"""Packages whose names are imported when first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package that loads some names when first used.

    Args:
        package: Its name; its `__all__` is what `dir` lists.
        modules: The names that each of its modules gives, by `".module"`.

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
