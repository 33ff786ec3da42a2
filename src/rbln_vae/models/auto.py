"""`RBLNAutoencoder`: finds the class for a model by itself."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from .. import hub
from ..errors import RBLNCompileError
from .autoencoder import RBLNAutoencoderModel
from .base import Config
from .family import CLASSES
from .single_file import open_original


class RBLNAutoencoder:
    """Compiles and loads an autoencoder whatever its class."""

    @staticmethod
    def from_pretrained(
        model_id: str | os.PathLike[str],
        export: bool | None = False,
        rbln_config: Config = None,
        **kwargs: Any,
    ) -> RBLNAutoencoderModel:
        """Load a compiled model, or compile one of diffusers, by the class in its `config.json`.

        Args:
            model_id: As of `RBLNModel.from_pretrained`. The class of a `.safetensors` file
                follows from its weights; one that suits both Wan and Qwen-Image is taken for
                an `AutoencoderKLWan`, which computes the same, unless `kind` says otherwise.
            export: As of `RBLNModel.from_pretrained`. By default `False`.
            rbln_config: Options, as a dict or an instance of a configuration class.
            **kwargs: As of `RBLNModel.from_pretrained`.

        Returns:
            A model of the class that fits.

        Raises:
            RBLNCompileError: There is no class for the model.
            OSError, ValueError, RBLNError: As `RBLNModel.from_pretrained`.

        Example:
            >>> vae = RBLNAutoencoder.from_pretrained(
            ...     "black-forest-labs/FLUX.2-dev", subfolder="vae", export=True
            ... )  # doctest: +SKIP
        """
        name = os.fspath(model_id)
        loader = {k: v for k, v in kwargs.items() if not k.startswith("rbln_")}
        loader = hub.reach(name, loader)
        return class_of(name, loader).from_pretrained(
            name, export=export, rbln_config=rbln_config, **{**kwargs, **loader}
        )

    @staticmethod
    def from_model(
        model: torch.nn.Module,
        *,
        rbln_config: Config = None,
        cache: bool = False,
        **kwargs: Any,
    ) -> RBLNAutoencoderModel:
        """Compile a loaded model, by its class.

        Args:
            model: A diffusers model.
            rbln_config: Options, as a dict or an instance of a configuration class.
            cache: As of `RBLNModel.from_model`. By default `False`.
            **kwargs: Options with the prefix `rbln_`.

        Raises:
            RBLNCompileError: There is no class for the model, or it can't be compiled.
            ValueError, RBLNError: As `RBLNModel.from_model`.
        """
        found = class_for(type(model).__name__, "The model")
        return found.from_model(model, rbln_config=rbln_config, cache=cache, **kwargs)


def class_of(name: str, loader: Mapping[str, Any]) -> type[RBLNAutoencoderModel]:
    """The class for a model that isn't loaded yet, by its `config.json`.

    Args:
        name: A local path or a hub id. The class of a single file follows from its weights.
        loader: Arguments of the Hugging Face loader.

    Raises:
        RBLNCompileError: There is no class for the model.
        OSError, ValueError: The single file can't be opened, as in `open_original`.
    """
    if hub.is_single_file(name):
        return class_for(open_original(name, loader).class_name, name)
    original = hub.find_class_name(name, **hub.options(loader)) or "AutoencoderKL"
    return class_for(original, name)


def class_for(original: str, what: str) -> type[RBLNAutoencoderModel]:
    """The class that compiles a class of diffusers.

    Args:
        original: The name of diffusers' class.
        what: The model, for the message.

    Raises:
        RBLNCompileError: There is none.
    """
    if original not in CLASSES:
        raise RBLNCompileError(
            f"{what} is a {original}. Autoencoders of these classes can be compiled: "
            f"{', '.join(CLASSES)}."
        )
    found: type[RBLNAutoencoderModel] = getattr(
        importlib.import_module(__package__.rpartition(".")[0]), f"RBLN{original}"
    )
    return found
