"""A stand-in for the few members of ComfyUI that its nodes touch, and the package of the nodes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[1] / "integrations" / "comfyui"


class Interrupted(BaseException):
    """As ComfyUI's exception for a cancelled run, which is no `Exception`."""


@dataclass
class ComfyUI:
    """What a test sees and decides of ComfyUI.

    Attributes:
        vae_folders: Where models are.
        cancelled: Whether the user has cancelled.
        asked: How often that was asked.
        bars: The positions of each bar, as parts of its length.
        dtype: Of images, on this machine.
    """

    vae_folders: list[Path]
    cancelled: bool = False
    asked: int = 0
    bars: list[list[float]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def throw_exception_if_processing_interrupted(self) -> None:
        self.asked += 1
        if self.cancelled:
            self.cancelled = False
            raise Interrupted


class LoadedVAE:
    """A VAE as ComfyUI's own nodes hand it out: weights in the layout of the model's authors."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.first_stage_model = torch.nn.Module()
        self._weights = dict(weights)

    def get_sd(self) -> dict[str, Tensor]:
        return self._weights


class ModelPatcher:
    def __init__(self, model: torch.nn.Module, load_device: Any, offload_device: Any) -> None:
        self.model = model

    def clone(self) -> ModelPatcher:
        return ModelPatcher(self.model, None, None)


def stand_in(vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    """Let imports of ComfyUI find the stand-in, whose models are in one folder at first."""
    found = ComfyUI([vae_folder])

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total
            self.positions: list[float] = []
            found.bars.append(self.positions)

        def update_absolute(self, value: int, total: int | None = None) -> None:
            self.total = self.total if total is None else total
            self.positions.append(value / self.total)

    members: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": (
                found.throw_exception_if_processing_interrupted
            ),
            "intermediate_device": lambda: torch.device("cpu"),
            "intermediate_dtype": lambda: found.dtype,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "folder_paths": {"get_folder_paths": lambda kind: list(map(str, found.vae_folders))},
    }
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return found


class loaded_package:  # noqa: N801
    """The package under a name made of its path, as ComfyUI executes it."""

    name = "/ComfyUI/custom_nodes/any name"

    def __enter__(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(self.name, PACKAGE / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[self.name] = package
        spec.loader.exec_module(package)
        return package

    def __exit__(self, *_: Any) -> None:
        for name in list(sys.modules):
            if name == self.name or name.startswith(f"{self.name}."):
                del sys.modules[name]
