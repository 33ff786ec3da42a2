"""Compile a diffusers `AutoencoderKL` once; save, load, encode and decode with it anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import RBLNAutoConfig, RBLNModelConfig
from .demo import demo_model
from .errors import (
    RBLNArtifactError,
    RBLNCompileError,
    RBLNDatasetError,
    RBLNError,
    RBLNRuntimeError,
    RBLNTargetUnavailableError,
)
from .registration import register
from .version import __version__

if TYPE_CHECKING:
    from .autoencoder_kl import RBLNAutoencoderKL, RBLNAutoencoderKLConfig
    from .model import RBLNModel

__all__ = [
    "RBLNArtifactError",
    "RBLNAutoConfig",
    "RBLNAutoencoderKL",
    "RBLNAutoencoderKLConfig",
    "RBLNCompileError",
    "RBLNDatasetError",
    "RBLNError",
    "RBLNModel",
    "RBLNModelConfig",
    "RBLNRuntimeError",
    "RBLNTargetUnavailableError",
    "__version__",
    "demo_model",
]

register()

# Loaded when first used: torch takes a second or two to import.
_LAZY = {
    "RBLNAutoencoderKL": ".autoencoder_kl",
    "RBLNAutoencoderKLConfig": ".autoencoder_kl",
    "RBLNModel": ".model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
