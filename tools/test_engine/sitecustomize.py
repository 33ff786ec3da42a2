"""Puts the engine that `RBLN_VAE_TEST_ENGINE` names in the place of the installed one.

Python imports this at its start where the directory is on `PYTHONPATH`, and so in every
process that a test starts. A path alone wouldn't do: an editable install finds its modules
before any path is looked at.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec

ENGINE = os.environ["RBLN_VAE_TEST_ENGINE"]


class EngineFinder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "rbln_vae._engine":
            return None
        return importlib.util.spec_from_file_location(name, ENGINE)


sys.meta_path.insert(0, EngineFinder)
