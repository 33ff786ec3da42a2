"""The models of a service, and the interface through which other modules use them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ..config import format_dtypes
from ..levels import levels_of
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.family import DECODER, ENCODER
from ..models.latents import LatentScaling, mode
from ..models.opening import open_model
from ..models.video import RBLNVideoAutoencoder
from ..targets.base import get_target
from ..targets.watch import ShouldStop

Shape = tuple[int, ...]

Output: TypeAlias = Literal["sample", "pictures", "frames"]
"""What a run gives: floats, the levels that show them, or a video frame by frame."""

_USUAL_SIDES = (256, 512, 1024, 2048)
"""The sides of the images, in pixels, that a plan is shown for."""
LONGEST_NAME = 100
"""The most characters of a model's name."""


class NotFiniteError(ArithmeticError):
    """A frame can't be shown, because it has NaN or infinity."""


@dataclass(frozen=True)
class ModelInfo:
    """The public facts about a model, from which requests are interpreted.

    Attributes:
        name: The name for `?model=`.
        class_name: The diffusers class that was compiled.
        frames: Whether latents and images have an axis of frames.
        frames_per_latent: The number of frames of each further frame of a latent after the first,
            which is one; `None` if the model runs images only.
        parts: `"decoder"`, and `"encoder"` if it was compiled.
        in_channels: The number of channels of an input image.
        latent_channels: The number of channels of a latent.
        vae_scale_factor: Pixels per latent cell in each direction.
        sample_size: The `(height, width)` in pixels that the model was compiled for.
        scaling: The scaling that pipelines apply to the latents.
        dtype: In what images and weights are stored, by part if parts differ.
        target: The name of the target.
    """

    name: str
    class_name: str
    frames: bool
    frames_per_latent: int | None
    parts: tuple[str, ...]
    in_channels: int
    latent_channels: int
    vae_scale_factor: int
    sample_size: tuple[int, int]
    scaling: LatentScaling
    dtype: str
    target: str

    @classmethod
    def of(cls, name: str, vae: RBLNAutoencoderModel) -> ModelInfo:
        """The facts about a compiled model."""
        resolved = vae.resolved_config
        runs_videos = isinstance(vae, RBLNVideoAutoencoder) and resolved.videos
        return cls(
            name=name,
            class_name=vae.family.original_class_name,
            frames=vae.frames,
            frames_per_latent=vae.temporal_compression_ratio if runs_videos else None,
            parts=resolved.parts,
            in_channels=resolved.in_channels,
            latent_channels=resolved.latent_channels,
            vae_scale_factor=resolved.vae_scale_factor,
            sample_size=resolved.sample_size,
            scaling=vae.latent_scaling,
            dtype=format_dtypes(resolved.dtype),
            target=resolved.target,
        )

    def pixels(self, part: str, shape: Shape) -> int:
        """The pixels of all images that an input of a part stands for; of videos, of a frame."""
        count = shape[0] * math.prod(shape[-2:])
        return count if part == ENCODER else count * self.vae_scale_factor**2

    def frame_count(self, shape: Shape) -> int:
        """The frames of each of the videos of a latent, or 1 if it has no axis of frames."""
        return 1 + (shape[2] - 1) * (self.frames_per_latent or 1) if len(shape) == 5 else 1


def named_models(texts: Iterable[str]) -> dict[str, str]:
    """Parse `NAME=MODEL`, or `MODEL`, whose name is the last part of its path.

    A name contains no slash, so `runs/lr=1/vae` is a model without a name. A directory in the
    working directory whose name has an equals sign must be written `./lr=1`, or with a name:
    `vae=lr=1`.

    Args:
        texts: At least one text; the first is the default model.

    Returns:
        The models by name.

    Raises:
        ValueError: A name or a model is empty, two names are equal, or a name is too long.

    Example:
        >>> named_models(["models/sdxl", "flux=black-forest-labs/FLUX.1-dev"])
        {'sdxl': 'models/sdxl', 'flux': 'black-forest-labs/FLUX.1-dev'}
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, model = text.strip().partition("=")
        if not equals or "/" in name:
            name, model = Path(text.strip()).name, text.strip()
        if not name or not model:
            raise ValueError(
                f"{text!r} lacks a name or a model: expected NAME=MODEL, such as sdxl=compiled-sdxl"
            )
        if len(name) > LONGEST_NAME:
            raise ValueError(
                f"the name {name!r} has {len(name)} characters, expected at most {LONGEST_NAME}; "
                "give a shorter one, as NAME=MODEL"
            )
        if name in named:
            raise ValueError(
                f"two models are named {name!r}, {named[name]} and {model}; give each a name of "
                "its own, as NAME=MODEL"
            )
        named[name] = model
    return named


@dataclass(frozen=True)
class PlannedRun:
    """What one run takes.

    Attributes:
        part: The name of the part.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        memory: Bytes besides the weights; `None` if it is more than the service may take.
        seconds: About how long it takes alone; `None` if that isn't known.
    """

    part: str
    height: int
    width: int
    memory: int | None
    seconds: float | None


class Runner(Protocol):
    """A model as the batcher uses it: it maps tensors to tensors, and needs memory."""

    @property
    def name(self) -> str:
        """The unique name of the model."""

    @property
    def exact_batches(self) -> bool:
        """Whether each sample of a batch gets the same bits as in a run of its own."""

    def memory_needed(self, part: str, shape: Shape) -> int:
        """The bytes that a run needs. May take seconds; called in threads.

        Of a video, `(N, C, T, H, W)`, those that it takes frame by frame.
        """

    def whole_video(self, shape: Shape, output: Output) -> int:
        """The bytes of a video that is given as a whole, which come on top; else 0."""

    def weight(self, part: str, shape: Shape) -> float:
        """The approximate time of a run, in images of the size that the model is tuned for."""

    def run(self, part: str, tensor: Tensor, should_stop: ShouldStop) -> Tensor:
        """Run a part. Blocks; several threads may call it.

        Args:
            part: The name of the part.
            tensor: The input of the part: floats, or the levels of pictures to encode.
            should_stop: Called during the run; it returns true to stop the run.

        Raises:
            RBLNCancelledError: `should_stop` returned true.
        """

    def decode_images(self, latent: Tensor, should_stop: ShouldStop) -> tuple[Tensor, Tensor]:
        """Decode to pictures, in the same way.

        Returns:
            The pictures, uint8 `(N, H, W, C)`, of videos `(N, T, H, W, C)`, and whether all
            values of each were finite.
        """

    def decode_frames(
        self, latent: Tensor, should_stop: ShouldStop
    ) -> Generator[Tensor, None, None]:
        """Decode a video, in the same way, and yield each frame as it is done.

        Args:
            latent: `(N, C, T, H, W)`.
            should_stop: As of `run`.

        Raises:
            NotFiniteError: A frame has NaN or infinity.
        """


class ServedModel:
    """A compiled model with a name, shared by all requests."""

    def __init__(self, name: str, vae: RBLNAutoencoderModel) -> None:
        self.info = ModelInfo.of(name, vae)
        self._vae = vae

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def exact_batches(self) -> bool:
        return self._vae.exact_batches

    def memory_needed(self, part: str, shape: Shape) -> int:
        return self._vae.memory_needed(part, shape)

    def plan(self) -> list[PlannedRun]:
        """What images of usual sizes take, part by part. May take seconds."""
        resolved = self._vae.resolved_config
        sizes = [resolved.sample_size]
        if not self._vae.static_shapes:
            sizes = [(side, side) for side in _USUAL_SIDES if side % resolved.vae_scale_factor == 0]
        runs = []
        for part in (part for part in (ENCODER, DECODER) if part in self.info.parts):
            for size in sizes:
                shape = resolved.input_shapes(size, batch_size=1)[part]
                memory: int | None
                seconds: float | None
                try:
                    memory = self._vae.memory_needed(part, shape)
                    seconds = self._vae.seconds_expected(part, shape)
                except MemoryError:
                    memory = seconds = None
                runs.append(PlannedRun(part, *size, memory, seconds))
        return runs

    def weight(self, part: str, shape: Shape) -> float:
        height, width = self.info.sample_size
        return self.info.frame_count(shape) * self.info.pixels(part, shape) / (height * width)

    def whole_video(self, shape: Shape, output: Output) -> int:
        if len(shape) != 5 or output == "frames":
            return 0
        size = torch.uint8.itemsize if output == "pictures" else torch.float32.itemsize
        channels = self._vae.resolved_config.out_channels
        pixels = self.info.frame_count(shape) * self.info.pixels(DECODER, shape)
        return size * channels * pixels

    def run(self, part: str, tensor: Tensor, should_stop: ShouldStop) -> Tensor:
        if tensor.dim() == 5:
            videos = self._videos().decode(tensor, return_dict=False, should_stop=should_stop)
            assert isinstance(videos, tuple)
            return videos[0]
        if part == DECODER:
            return self._vae.decode_latents(tensor, should_stop=should_stop)
        images = tensor if tensor.is_floating_point() else tensor.permute(0, 2, 3, 1)
        return mode(self._vae.encode_images(images, should_stop=should_stop))

    def decode_images(self, latent: Tensor, should_stop: ShouldStop) -> tuple[Tensor, Tensor]:
        finite = torch.ones(len(latent), dtype=torch.bool)
        if latent.dim() == 5:
            return self._decode_videos(latent, should_stop, finite), finite
        images = self._vae.decode_images(latent, should_stop=should_stop, finite=finite)
        return images, finite

    def decode_frames(
        self, latent: Tensor, should_stop: ShouldStop
    ) -> Generator[Tensor, None, None]:
        frames = self._videos().decode_frames(latent, should_stop=should_stop)
        with contextlib.closing(frames):
            for number, frame in enumerate(frames):
                if not bool(frame.isfinite().all()):
                    raise NotFiniteError(f"Frame {number} of the video isn't finite.")
                yield frame

    def _decode_videos(self, latent: Tensor, should_stop: ShouldStop, finite: Tensor) -> Tensor:
        """The pictures of the frames; `finite` gets whether all of each video were finite."""
        factor, channels = self.info.vae_scale_factor, self._vae.resolved_config.out_channels
        batch, _, _, height, width = latent.shape
        shape = (batch, self.info.frame_count(latent.shape), factor * height, factor * width)
        pictures = torch.empty((*shape, channels), dtype=torch.uint8)
        frames = self._videos().decode_frames(latent, should_stop=should_stop)
        with contextlib.closing(frames):
            for number, frame in enumerate(frames):
                finite &= frame.isfinite().flatten(1).all(1)
                pictures[:, number] = levels_of(frame).movedim(1, -1)
        return pictures

    def _videos(self) -> RBLNVideoAutoencoder:
        assert isinstance(self._vae, RBLNVideoAutoencoder)
        return self._vae


def open_models(
    named: Mapping[str, str | None],
    settings: Mapping[str, Any],
    memory_limit: int | None,
    **loading: str | None,
) -> tuple[list[ServedModel], int]:
    """Open the models of a service, and set the memory limit of their runs.

    Args:
        named: The models by name, each as in `open_model`.
        settings: Options of the models, for `rbln_config`.
        memory_limit: The most bytes that all runs together may need. `None` is half of the
            memory of the models' device (of the smallest, if they run on several); the other
            half is for weights, requests, responses and other processes.
        **loading: `subfolder`, `revision` and `kind` of all models.

    Returns:
        The models, and the limit in bytes.
    """
    if settings.get("target") is not None:
        get_target(str(settings["target"])).require()  # fail before the work, not after it
    # The target of a model is known after loading, and its runtimes need the limit.
    models = {
        name: open_model(model, {**settings, "create_runtimes": False}, **loading)
        for name, model in named.items()
    }
    if memory_limit is None:
        memory_limit = min(vae.usable_memory for vae in models.values()) // 2
    return [
        ServedModel(name, vae.with_runtimes(memory_limit=memory_limit))
        for name, vae in models.items()
    ], memory_limit
