"""What tells the autoencoders of one diffusers class from those of others, in one adapter."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import hub
from ..errors import RBLNCompileError
from ..sizes import check_image_size, format_size
from .latents import LatentScaling
from .single_file import open_original

ENCODER, DECODER, CONDITIONED_DECODER = "encoder", "decoder", "conditioned_decoder"

CLASSES = (
    "AsymmetricAutoencoderKL",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImage21",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderKLWan",
    "AutoencoderTiny",
    "VQModel",
)
"""The classes of diffusers that can be compiled; ours has the same name after `RBLN`."""


def right_class(original: str) -> str:
    """The advice for a model of another class than was expected, as a sentence."""
    found = f"RBLN{original} compiles that, and " if original in CLASSES else ""
    return f"{found}RBLNAutoencoder finds the class for a model by itself."


ImageShape = tuple[int, int, int, int]
"""`(N, C, H, W)`."""


@dataclass(frozen=True)
class ResolvedConfig:
    """What a model is compiled for, with nothing left open.

    Attributes:
        target: The name of the target.
        dtype: In what it stores images and weights: `"float32"`, `"float16"` or `"bfloat16"`;
            if parts differ, a mapping from the name of each part.
        batch_size: Images of a run.
        sample_size: `(height, width)` of an image in pixels.
        uses_encoder: Whether it has an encoder, too.
        in_channels: Channels of an image that is encoded.
        out_channels: Channels of an image that was decoded.
        latent_channels: Channels of a latent.
        vae_scale_factor: Pixels per latent cell in a direction.
        decoder_scale_factor: The same of images that were decoded.
        condition_channels: Channels of the condition that the decoder may be given, as a part
            of its own. By default 0: there is no such part.
        videos: Whether it runs videos, too. By default `False`.
        decode_chunk_size: Frames of a clip that the decoder decodes together. By default 0: it
            decodes images.
    """

    target: str
    dtype: str | Mapping[str, str]
    batch_size: int
    sample_size: tuple[int, int]
    uses_encoder: bool
    in_channels: int
    out_channels: int
    latent_channels: int
    vae_scale_factor: int
    decoder_scale_factor: int
    condition_channels: int = 0
    videos: bool = False
    decode_chunk_size: int = 0

    def dtype_of(self, part: str) -> str:
        """In what a part stores images and weights."""
        return self.dtype if isinstance(self.dtype, str) else self.dtype[part]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts, in the order of a run."""
        parts = (ENCODER, DECODER) if self.uses_encoder else (DECODER,)
        return (*parts, CONDITIONED_DECODER) if self.condition_channels else parts

    def input_shapes(
        self, sample_size: tuple[int, int] | None = None, batch_size: int | None = None
    ) -> dict[str, ImageShape]:
        """The shape of the input of each part.

        Args:
            sample_size: `(height, width)` of the image in pixels. By default the model's own.
            batch_size: Images of a run. By default the model's own.

        Raises:
            ValueError: A side of the image is no multiple of `vae_scale_factor`.
        """
        height, width = size = sample_size or self.sample_size
        batch, factor = batch_size or self.batch_size, self.vae_scale_factor
        check_image_size(size, factor)
        latent = (batch, self.latent_channels, height // factor, width // factor)
        shapes = {
            ENCODER: (batch, self.in_channels, height, width),
            DECODER: (self.decode_chunk_size or batch, *latent[1:]),
            CONDITIONED_DECODER: (
                batch,
                self.latent_channels + self.condition_channels,
                *self.image_shape(latent)[2:],
            ),
        }
        return {part: shapes[part] for part in self.parts}

    def image_shape(self, latent_shape: tuple[int, ...]) -> ImageShape:
        """The shape of the images that the decoder makes of latents `(N, C, H, W)`."""
        batch, _, height, width = latent_shape
        factor = self.decoder_scale_factor
        return (batch, self.out_channels, factor * height, factor * width)


class Family(ABC):
    """The adapter of one diffusers class.

    Everything else about compiling, storing and running is the same for every family.
    """

    original_class_name: ClassVar[str]
    """The diffusers class."""
    videos: ClassVar[bool] = False
    """Whether its models can be compiled for videos; `video_module` makes their parts then."""
    clip_frames: ClassVar[int] = 0
    """Frames of the clips that its decoders are compiled for, unless an option says others; 0 of
    families whose decoders decode images."""
    frames_encoded: ClassVar[int] = 1
    """Frames of a video that are encoded together after the first."""

    @abstractmethod
    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What follows from the configuration of a diffusers model, and no option can change.

        Args:
            config: As diffusers stores it.

        Returns:
            `in_channels`, `out_channels`, `latent_channels` and `vae_scale_factor`; `None`
            stands for what the configuration doesn't say.

        Raises:
            ValueError: The configuration is not one of this family.
        """

    @abstractmethod
    def module(self, model: torch.nn.Module, part: str) -> torch.nn.Module:
        """One part of a model as a module from image to image, to be compiled.

        Args:
            model: The diffusers model. It is not changed.
            part: The name of one of `ResolvedConfig.parts`.

        Returns:
            A copy that shares the model's weights, so that a target may change it.
        """

    def video_module(self, model: torch.nn.Module, part: str) -> torch.nn.Module:
        """One part of a model for videos, as `BuildsGraph` says; only where `videos` is true.

        Args:
            model: As of `module`.
            part: As of `module`.

        Raises:
            RBLNCompileError: The model computes something else than this version knows.
        """
        raise NotImplementedError(f"no videos of {self.original_class_name}")

    def sample_size(self, config: Mapping[str, Any]) -> Any:
        """The image that a model is compiled for unless an option says another.

        Args:
            config: Of the diffusers model.

        Returns:
            One side or `(height, width)`, in pixels; `None` if it isn't known.
        """
        return config.get("sample_size")

    def check_image_size(
        self, size: tuple[int, int], factor: int, config: Mapping[str, Any]
    ) -> None:
        """Raise a `ValueError` if the encoder takes no images of this size.

        By default each level halves the sides and leaves out a last row or column, so that there
        must be a pixel in the end.

        Args:
            size: Height and width in pixels.
            factor: Pixels per latent cell in a direction.
            config: Of the diffusers model.
        """
        if min(size) < factor:
            raise ValueError(
                f"{format_size(size)} is no image size of this model: height and width must be "
                f"{factor} or more."
            )

    def buffers(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The small tensors that no part holds, but runs or pipelines read; by default none.

        Args:
            config: Of the diffusers model.

        Returns:
            The shape of each by its name in the model.
        """
        return {}

    def latent_scaling(
        self, config: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]
    ) -> LatentScaling:
        """How pipelines scale the latents of a model.

        Args:
            config: Of the diffusers model.
            buffers: Those that `buffers` names.
        """
        return LatentScaling.of(config)

    def original_class(self) -> Any:
        """The diffusers class itself."""
        import diffusers

        return getattr(diffusers, self.original_class_name)

    def load_original(self, model_id: str, **loader: Any) -> Any:
        """Load a diffusers model.

        Args:
            model_id: A directory, a hub id or a `.safetensors` file.
            **loader: Arguments of diffusers' loader; for a file as `open_original` takes them.

        Raises:
            TypeError: A name is none of the loader, nor of the model's configuration, of which
                diffusers' loaders take values as well.
            ValueError: The loader is told to read checkpoints that can hold code, or the kind
                doesn't fit.
            RBLNCompileError: What is there is a model of another class, or none.
        """
        original = self.original_class()
        if loader.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                "use_safetensors must be True: other checkpoints can hold code, and are not loaded."
            )
        if hub.is_single_file(model_id):
            file = open_original(model_id, loader, self.original_class_name)
            self._check_class(file.class_name, model_id)
            return file.load(loader.get("torch_dtype"))
        hub.check_loader_options(loader, inspect.signature(original).parameters)
        hub.reject_kind(model_id, loader)
        loader.pop("kind", None)
        found = original.load_config(model_id, **hub.options(loader)).get("_class_name")
        self._check_class(found or self.original_class_name, model_id)
        return original.from_pretrained(model_id, **loader)

    def _check_class(self, found: str, model_id: str) -> None:
        if found != self.original_class_name:
            raise RBLNCompileError(
                f"{model_id} holds {found}, but RBLN{self.original_class_name} compiles "
                f"{self.original_class_name}. Name such a model, or the subfolder that holds one. "
                f"{right_class(found)}"
            )
