"""Registers compiled models with diffusers' pipelines, without importing diffusers.

A pipeline saves and loads its components according to tables in a module of diffusers. The
entry is added when that module is imported, so `import rbln_vae` stays fast and may come
before or after `import diffusers`. Registering when a class of ours is first used would be
too late: diffusers refuses a pipeline of the hub whose library is not in the tables before it
looks at any class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_TABLES = "diffusers.pipelines.pipeline_loading_utils"
_METHODS = {"RBLNModel": ["save_pretrained", "from_pretrained"]}
"""The base class of compiled models, and its methods for saving and loading."""


def register() -> None:
    """Add compiled models to the tables of diffusers, now or when diffusers is imported."""
    tables = sys.modules.get(_TABLES)
    if tables is not None and hasattr(tables, "ALL_IMPORTABLE_CLASSES"):
        _enter(tables)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(tables: ModuleType) -> None:
    assert __package__ is not None
    tables.LOADABLE_CLASSES[__package__] = _METHODS
    tables.ALL_IMPORTABLE_CLASSES.update(_METHODS)


class _Finder:
    """Finds the module of the tables as usual, with a loader that adds the entry."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _enter(module)
