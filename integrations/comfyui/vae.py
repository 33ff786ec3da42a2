"""The VAE that the nodes hand out: a compiled model with the members that ComfyUI calls.

Latents are those of ComfyUI's own VAE for the same model: unscaled for most families, the mode of
what the encoder gives; for FLUX.2 in patches and normalised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor


class RBLNVAE:
    """A compiled model for the sockets of ComfyUI that take a VAE.

    Args:
        model: The compiled autoencoder.
        name: What messages call it.
        scale: By which the latents of a TAESD are larger than ComfyUI's. By default unknown; no
            other class has one.
        shift: What is subtracted from ComfyUI's before. By default 0.

    Raises:
        ValueError: ComfyUI has no latents for models of this class, or their scale is unknown.
    """

    def __init__(
        self, model: Any, name: str, *, scale: float | None = None, shift: float = 0.0
    ) -> None:
        facts = model.resolved_config
        self.model = model
        self.name = name
        self._to_model, self._from_model = _latents(model, name, scale, shift)
        if facts.out_channels != 3 or facts.in_channels != 3:
            raise ValueError(
                f"{name} has images of {facts.in_channels} and {facts.out_channels} channels, and "
                "those of ComfyUI have 3. Use ComfyUI's own VAE for it."
            )
        patch = model.latent_scaling.patch_size
        # What nodes of ComfyUI and of others read.
        self.latent_channels = facts.latent_channels * patch**2
        self.latent_dim = 3 if model.frames else 2
        self.output_channels = 3
        self.downscale_ratio: int = facts.vae_scale_factor * patch
        self.upscale_ratio: int = facts.decoder_scale_factor * patch
        self.vae_dtype = torch.float32
        self.device = torch.device("cpu")
        self.output_device = comfy.model_management.intermediate_device()
        self.first_stage_model = torch.nn.Module()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=self.device
        )

    # Latents to images

    def decode(self, samples: Tensor, *_: Any, memory_limit: str = "", **__: Any) -> Tensor:
        """Decode latents.

        Args:
            samples: `(N, C, h, w)` or `(N, C, 1, h, w)`.
            memory_limit: For this run, such as `"2GiB"`. By default, or if that of the model is
                smaller, that of the model.

        Returns:
            Images `(N, H, W, 3)` in `[0, 1]`; `(N, 1, H, W, 3)` where latents have frames.
        """
        z = self._to_model(self._checked(samples).to("cpu", torch.float32))
        with self._errors("Decoding", self.model.resolved_config.image_shape(tuple(z.shape))):
            sample = self.model.decode_latents(
                z, should_stop=_cancelled, progress=_Progress(), memory_limit=memory_limit
            )
        pixels: Tensor = sample.add_(1).div_(2).clamp_(0, 1).movedim(1, -1)
        pixels = pixels.unsqueeze(1) if self.latent_dim == 3 else pixels
        management = comfy.model_management
        dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
        return pixels.to(management.intermediate_device(), dtype)

    def decode_tiled(self, samples: Tensor, *_: Any, **__: Any) -> Tensor:
        """As `decode`: the whole image at once, and no tiles."""
        return self.decode(samples)

    def _checked(self, samples: Tensor) -> Tensor:
        """Latents without an axis of frames."""
        if samples.ndim == 5:
            if self.latent_dim == 3 and samples.shape[2] != 1:
                raise ValueError(
                    f"The latent has {samples.shape[2]} frames, and {self.name} is compiled for "
                    "images of one. Use ComfyUI's own VAE for videos."
                )
            samples = samples[:, :, 0]
        if samples.ndim != 4 or samples.shape[1] != self.latent_channels:
            raise ValueError(
                f"The latent has the shape {tuple(samples.shape)}, and {self.name} takes (N, "
                f"{self.latent_channels}, h, w). Connect the VAE of the model that made the latent."
            )
        return samples

    # Images to latents

    def encode(self, pixels: Tensor, *_: Any, **__: Any) -> Tensor:
        """Encode images.

        Args:
            pixels: `(N, H, W, 3)` in `[0, 1]`, or with more channels, of which three are taken.
                Borders are cut as ComfyUI does it, to multiples of the scale factor.

        Returns:
            Latents `(N, C, h, w)`; `(1, C, 1, h, w)` where latents have frames.
        """
        if pixels.ndim != 4 or pixels.shape[-1] < 3:
            raise ValueError(
                f"The image has the shape {tuple(pixels.shape)}, and (N, H, W, 3) is needed."
            )
        if self.latent_dim == 3 and len(pixels) != 1:
            raise ValueError(
                f"{self.name} is a VAE for videos, of which ComfyUI takes {len(pixels)} images as "
                "frames, and it is compiled for images of one. Encode the images one by one."
            )
        cut = self.vae_encode_crop_pixels(pixels)[..., :3].to("cpu", torch.float32)
        x = cut.movedim(-1, 1) * 2 - 1
        with self._errors("Encoding", tuple(x.shape)):
            encoded = self.model.encode_images(x, should_stop=_cancelled, progress=_Progress())
        latent: Tensor = self._from_model(encoded.mode() if self.model.draws else encoded)
        latent = latent.unsqueeze(2) if self.latent_dim == 3 else latent
        return latent.to(comfy.model_management.intermediate_device())

    def encode_tiled(self, pixels: Tensor, *_: Any, **__: Any) -> Tensor:
        """As `encode`: the whole image at once, and no tiles."""
        return self.encode(pixels)

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """The middle of images `(N, H, W, C)`, whose sides are multiples of the scale factor.

        Raises:
            ValueError: Nothing is left.
        """
        factor = self.downscale_ratio
        height, width = (side // factor * factor for side in pixels.shape[1:3])
        if not height or not width:
            raise ValueError(
                f"The image has {pixels.shape[2]}x{pixels.shape[1]} pixels, and {self.name} takes "
                f"{factor}x{factor} or more."
            )
        top, left = (side % factor // 2 for side in pixels.shape[1:3])
        return pixels[:, top : top + height, left : left + width]

    # Before a run

    def plan(self, width: int, height: int, batch_size: int) -> str:
        """The memory and the time that encoding and decoding images of a size take."""
        shapes = self.model.resolved_config.input_shapes((height, width), batch_size)
        with self._errors("Planning", (batch_size, 3, height, width)):
            return "\n\n".join(self.model.describe(part, shape) for part, shape in shapes.items())

    # What else ComfyUI asks

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        """Nothing: there is one frame."""

    def throw_exception_if_invalid(self) -> None:
        """Nothing: a compiled model is checked when it is made."""

    def get_sd(self) -> dict[str, Tensor]:
        raise RuntimeError(
            f"{self.name} is compiled, and has no weights that a checkpoint could hold. Connect "
            "the VAE that it was compiled from to the node that saves."
        )

    @contextmanager
    def _errors(self, what: str, shape: tuple[int, ...]) -> Iterator[None]:
        """Complete what the engine says when memory is short; other errors stand alone."""
        try:
            yield
        except MemoryError as error:
            images = f"{shape[0]} images" if shape[0] > 1 else "an image"
            raise MemoryError(
                f"{what} {images} of {shape[3]}x{shape[2]} with {self.name} is not possible: "
                f"{_in_gib(str(error))}"
            ) from error


_Latents = Callable[[Tensor], Tensor]


def _latents(model: Any, name: str, scale: float | None, shift: float) -> tuple[_Latents, _Latents]:
    """What turns ComfyUI's latents into those of the model, and back."""
    from rbln_vae.models.latents import LatentScaling

    class_name = model.family.original_class_name
    if class_name == "VQModel":
        raise ValueError(f"{name} is a {class_name}, and ComfyUI has no models with its latents.")
    if class_name == "AutoencoderTiny":
        if scale is None:
            raise ValueError(
                f"{name} is a small autoencoder (TAESD), whose latents are scaled by what the file "
                "doesn't tell. Load it with ComfyUI's Load VAE, which knows it, and connect that "
                "to Compile VAE (rbln-vae)."
            )
        scaling = LatentScaling(scaling_factor=scale, shift_factor=shift)
        return scaling.scale, scaling.unscale
    if class_name == "AutoencoderKLFlux2":
        return model.latent_scaling.unscale, model.latent_scaling.scale
    return _unchanged, _unchanged


def _unchanged(latent: Tensor) -> Tensor:
    return latent


def _cancelled() -> None:
    """Asked during a run: ends it with ComfyUI's own exception if the user has cancelled it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class _Progress:
    """The bar of the node that runs."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update_absolute(done, total)


def _in_gib(text: str) -> str:
    """A message with its sizes in GiB, rounded up, so that a limit that it names suffices."""

    def rounded(found: re.Match[str]) -> str:
        return f"{math.ceil(float(found[1].replace(',', '')) / 1024 * 100) / 100:.2f} GiB"

    return re.sub(r"([\d,]+(?:\.\d+)?) ?MiB", rounded, text)
