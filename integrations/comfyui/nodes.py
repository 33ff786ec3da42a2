"""The nodes. ComfyUI reads their class attributes, and shows an exception's text to the user."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .vae import RBLNVAE

Inputs = dict[str, dict[str, tuple[Any, ...]]]

_AUTO = "auto"
_DTYPES = (_AUTO, "float32", "float16", "bfloat16")
_CATEGORY = "latent/rbln-vae"
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": (
        list(_DTYPES),
        {
            "default": _AUTO,
            "tooltip": "In what images and weights are kept during a run. auto: what is fastest "
            "on this machine; for a compiled model, what it was compiled for.",
        },
    ),
}
_MEMORY_LIMIT: tuple[Any, ...] = (
    "STRING",
    {
        "default": "",
        "tooltip": "The most memory that a run may take besides the weights, such as 2GiB. Less "
        "memory takes more time and changes no pixel. Empty: all that there is.",
    },
)
_SIDE = {"default": 1024, "min": 8, "max": 65536, "step": 8}


class RBLNVAELoader:
    """Loads a compiled VAE, or compiles one in full precision."""

    DESCRIPTION = (
        "Loads a VAE that rbln-vae has compiled, or compiles a .safetensors file or a diffusers "
        "directory. What it compiles is kept on disk for the next start."
    )
    CATEGORY = _CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("For every node that takes a VAE.",)
    SEARCH_ALIASES: ClassVar = ["load vae", "rbln"]

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        from . import files

        model = (files.names(), {"tooltip": "A model in the folders for VAEs (models/vae)."})
        return {
            "required": {"model": model},
            "optional": {**_OPTIONS, "memory_limit": _MEMORY_LIMIT},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, memory_limit: str | None = None) -> bool | str:  # noqa: N802
        return _check_limit(memory_limit)

    @classmethod
    def IS_CHANGED(cls, model: str, **_: Any) -> int:  # noqa: N802
        from . import files

        return files.last_change(model)

    def load(self, model: str, dtype: str = _AUTO, memory_limit: str = "") -> tuple[RBLNVAE]:
        check_installed()
        from rbln_vae.models.opening import open_model

        from . import files
        from .vae import RBLNVAE

        with torch.inference_mode(False), torch.no_grad():
            opened = open_model(files.find(model), _settings(dtype, memory_limit))
        return (RBLNVAE(opened, model),)


class RBLNVAECompile:
    """Compiles a VAE that ComfyUI has loaded."""

    DESCRIPTION = (
        "Compiles the VAE of Load Checkpoint or Load VAE. The result is kept on disk for the next "
        "start."
    )
    CATEGORY = _CATEGORY
    FUNCTION = "compile"
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("For every node that takes a VAE.",)
    SEARCH_ALIASES: ClassVar = ["compile vae", "rbln"]

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        vae = ("VAE", {"tooltip": "From Load Checkpoint or Load VAE."})
        return {
            "required": {"vae": vae},
            "optional": {**_OPTIONS, "memory_limit": _MEMORY_LIMIT},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, memory_limit: str | None = None) -> bool | str:  # noqa: N802
        return _check_limit(memory_limit)

    def compile(self, vae: Any, dtype: str = _AUTO, memory_limit: str = "") -> tuple[RBLNVAE]:
        check_installed()
        from rbln_vae import RBLNAutoencoder
        from rbln_vae.models.single_file import open_weights

        from .vae import RBLNVAE

        if isinstance(vae, RBLNVAE):
            raise ValueError(f"{vae.name} is compiled already. Leave this node out.")
        name = f"The {type(vae.first_stage_model).__name__} that ComfyUI has loaded"
        # Tensors made in inference mode can't be compiled, so each is copied outside of it.
        with torch.inference_mode(False), torch.no_grad():
            weights = {key: tensor.to("cpu", copy=True) for key, tensor in vae.get_sd().items()}
            original = open_weights(weights, name).load(torch.float32)
            model = RBLNAutoencoder.from_model(
                original, rbln_config=_settings(dtype, memory_limit), cache=True
            )
        scale, shift = weights.get("vae_scale"), weights.get("vae_shift")
        return (
            RBLNVAE(
                model,
                name,
                scale=None if scale is None else scale.item(),
                shift=0.0 if shift is None else shift.item(),
            ),
        )


class RBLNVAEDecode:
    """Decodes latents within a memory limit of its own."""

    DESCRIPTION = "Decodes latents with a compiled VAE, within a memory limit for this run alone."
    CATEGORY = _CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The whole image, without tiles and seams.",)
    SEARCH_ALIASES: ClassVar = ["vae decode", "rbln"]

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latents to decode."}),
                "vae": ("VAE", {"tooltip": "From a node of rbln-vae."}),
            },
            "optional": {"memory_limit": _MEMORY_LIMIT},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, memory_limit: str | None = None) -> bool | str:  # noqa: N802
        return _check_limit(memory_limit)

    def decode(self, samples: dict[str, Any], vae: Any, memory_limit: str = "") -> tuple[Tensor]:
        latents = samples["samples"]
        if latents.is_nested:  # several kinds of latents, of which the image's is the first
            latents = latents.unbind()[0]
        pixels = _compiled(vae).decode(latents, memory_limit=memory_limit)
        return (pixels.reshape(-1, *pixels.shape[-3:]),)


class RBLNVAEPlan:
    """Says what images of a size take, before they are run."""

    DESCRIPTION = (
        "The memory and the time that images of a size take, and what a lower memory limit costs. "
        "Connect Preview Any to read it."
    )
    CATEGORY = _CATEGORY
    FUNCTION = "plan"
    RETURN_TYPES = ("STRING",)
    OUTPUT_TOOLTIPS = ("The plan, as text.",)
    SEARCH_ALIASES: ClassVar = ["memory", "rbln"]

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "From a node of rbln-vae."}),
                "width": ("INT", {**_SIDE, "tooltip": "Of the image, in pixels."}),
                "height": ("INT", {**_SIDE, "tooltip": "Of the image, in pixels."}),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 4096, "tooltip": "Images of one run."},
                ),
            },
        }

    def plan(self, vae: Any, width: int, height: int, batch_size: int) -> tuple[str]:
        return (_compiled(vae).plan(width, height, batch_size),)


def check_installed() -> None:
    """Raise a `RuntimeError` that says how to install rbln-vae, unless it is installed."""
    try:
        import rbln_vae  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"The package rbln-vae can't be imported ({error}). Install it where ComfyUI runs, and "
            f"start ComfyUI again: {sys.executable} -m pip install rbln-vae"
        ) from error


def _compiled(vae: Any) -> RBLNVAE:
    check_installed()
    from .vae import RBLNVAE

    if not isinstance(vae, RBLNVAE):
        raise ValueError(
            "The VAE is not a compiled one. Put Compile VAE (rbln-vae) before this node, or load "
            "one with Load compiled VAE (rbln-vae)."
        )
    return vae


def _settings(dtype: str, memory_limit: str) -> dict[str, str]:
    """The options of rbln-vae; what is left open is left out."""
    given = {"dtype": "" if dtype == _AUTO else dtype, "memory_limit": memory_limit.strip()}
    return {name: value for name, value in given.items() if value}


def _check_limit(memory_limit: str | None) -> bool | str:
    """Whether a memory limit can be read; else what is wrong with it."""
    try:
        from rbln_vae.units import optional_byte_count
    except ImportError:
        return True  # the node says what is missing
    try:
        optional_byte_count(memory_limit)
    except ValueError as error:
        return f"memory_limit={memory_limit!r}: {error}, or nothing for no limit."
    return True


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (RBLNVAELoader, RBLNVAECompile, RBLNVAEDecode, RBLNVAEPlan)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RBLNVAELoader": "Load compiled VAE (rbln-vae)",
    "RBLNVAECompile": "Compile VAE (rbln-vae)",
    "RBLNVAEDecode": "VAE Decode (rbln-vae)",
    "RBLNVAEPlan": "Plan VAE (rbln-vae)",
}
