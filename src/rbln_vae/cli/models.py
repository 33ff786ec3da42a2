"""Models by the name that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from diffusers import AutoencoderKL

from .. import RBLNAutoencoderKL, demo_model
from .terminal import working


def given(**options: Any) -> dict[str, Any]:
    """The options for a loader that aren't `None`."""
    return {name: value for name, value in options.items() if value is not None}


def open_model(name: str | None, settings: Mapping[str, Any], **loading: Any) -> RBLNAutoencoderKL:
    """A model that is ready to run; one of diffusers is compiled in memory.

    Args:
        name: A directory, a hub id or a file; `None` is the shipped checkpoint.
        settings: For `rbln_config`.
        **loading: For the loader, such as `subfolder`; what is `None` is left out.
    """
    where = demo_model() if name is None else name
    with working(f"Loading {name or 'the shipped model'} …"):
        return RBLNAutoencoderKL.from_pretrained(
            where, export=None, rbln_config=dict(settings), **given(**loading)
        )


def open_reference(name: str, **loading: Any) -> AutoencoderKL:
    """The same model in diffusers and float32, ready to run.

    Args:
        name: A directory, a hub id or a .safetensors file.
        **loading: For the loader, such as `subfolder`; what is `None` is left out.
    """
    with working(f"Loading {name} in diffusers …"):
        model = RBLNAutoencoderKL._load_original(name, **given(**loading))
    return cast(AutoencoderKL, model.float().eval())
