"""Trainers whose caches of latents can be written: sd-scripts, musubi-tuner, AI Toolkit."""

from __future__ import annotations

from collections.abc import Mapping

from .ai_toolkit import AiToolkit
from .base import Trainer
from .musubi import Musubi
from .sd_scripts import SdScripts

__all__ = ["TRAINERS", "Trainer"]

TRAINERS: Mapping[str, type[Trainer]] = {
    "sd-scripts": SdScripts,
    "musubi": Musubi,
    "ai-toolkit": AiToolkit,
}
"""Every trainer by the name of its format."""
