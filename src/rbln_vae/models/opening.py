"""Opens models by the names that users give: for commands, services and data sets alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..demo import demo_model
from ..hub import find_vae
from .auto import RBLNAutoencoder
from .autoencoder import RBLNAutoencoderModel


def open_model(
    name: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    kind: str | None = None,
) -> RBLNAutoencoderModel:
    """Load a compiled model, or compile one of diffusers in memory.

    Args:
        name: A directory, a hub id or a `.safetensors` file, of a VAE or of a pipeline with
            one; `None` is the shipped checkpoint.
        settings: For `rbln_config`.
        subfolder: Where in it the VAE is, unless it is a pipeline.
        revision: Of a model on the hub.
        kind: Of the model in a `.safetensors` file.

    Returns:
        A model ready to run, unless `settings` say `create_runtimes=False`.

    Raises:
        OSError: There is no such model.
        ValueError, RBLNError: As `RBLNAutoencoder.from_pretrained`.

    Example:
        >>> open_model(None, {"dtype": "float32"}).rbln_config.vae_scale_factor
        8
    """
    where = os.fspath(demo_model() if name is None else name)
    found = find_vae(where, subfolder=subfolder, revision=revision, kind=kind)
    return open_found(where, settings, found)


def open_found(
    name: str | os.PathLike[str], settings: Mapping[str, Any], found: Mapping[str, Any]
) -> RBLNAutoencoderModel:
    """As `open_model`, where it is known already where the VAE is.

    Args:
        name: As of `open_model`.
        settings: For `rbln_config`.
        found: What `hub.find_vae` gave for the name.
    """
    return RBLNAutoencoder.from_pretrained(name, export=None, rbln_config=dict(settings), **found)
