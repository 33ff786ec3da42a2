"""Makes diffusers save and load compiled models with its pipelines, and imports nothing for it.

A pipeline stores a component through the tables of one module of diffusers. The entry is
made when that module is there, so that `import rbln_vae` stays light and may come before or
after `import diffusers`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_TABLES = "diffusers.pipelines.pipeline_loading_utils"
_METHODS = {"RBLNModel": ["save_pretrained", "from_pretrained"]}
"""The class, an attribute of the top-level package, whose subclasses are stored, and how."""


def register() -> None:
    """Enter compiled models in the tables of diffusers, now or as soon as it is imported."""
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
    """Finds one module as ever, and has the entry made once it has been run."""

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
