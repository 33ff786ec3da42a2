"""The encoder of a job: turns prepared images into the tensors and records of shards."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..artifact import SUFFIX
from ..images import check_takes_pictures, with_opacity
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.family import ENCODER
from ..models.opening import open_found
from ..models.video import RBLNVideoAutoencoder
from ..sizes import Placement, Size
from ..targets.base import get_target
from ..videos import require_pyav
from .buckets import Placer
from .options import Options
from .pictures import UNREADABLE, Clip, Prepared, Rejected, unreadable
from .seeds import seed_of
from .trainers.base import MASK

MIRRORED = "_flipped"
"""The suffix of the names of tensors of a mirrored image."""


@dataclass(frozen=True)
class Encoded:
    """An encoded image or video, as a shard stores it.

    Attributes:
        record: Key, caption, sizes and columns, as JSON values; of a video its `frames` and
            `fps`, too.
        tensors: Tensors `(C, h, w)`, of a video `(C, t, h, w)`, by name: `mean` and `logvar`, or
            `latent`, and those of the mirrored image if it was encoded. For a trainer that keeps
            it, also the opacity `(H, W)`.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class Encoder(Protocol):
    """An encoder, as a pipeline uses it."""

    @property
    def batch_size(self) -> int:
        """The most images of a run."""

    @property
    def at_once(self) -> int:
        """How many threads may call `encode` at the same time, with gain."""

    def encode(self, images: Sequence[Any]) -> list[Encoded | Rejected]:
        """Encode what was prepared and has the same size; what can't be is rejected."""

    def seconds(self, size: Size) -> float:
        """About how long an image or a video of that size takes."""


NOT_FINITE = "its latent holds values that aren't finite in latent_dtype"


class LatentEncoder:
    """The encoder of both engines: a compiled model and the options of the job.

    Args:
        vae: A model with an encoder.
        options: The options of the job.

    Raises:
        ValueError: The model does not take RGB images, has no encoder, or does not take the
            sizes.

    Example:
        >>> encoder = LatentEncoder(vae, Options())  # doctest: +SKIP
        >>> encoder.encode([prepared])[0].tensors["mean"].shape  # doctest: +SKIP
        torch.Size([4, 64, 64])
    """

    def __init__(self, vae: RBLNAutoencoderModel, options: Options) -> None:
        config = vae.resolved_config
        if not config.uses_encoder:
            raise ValueError(
                "the model has a decoder only; compile it again with its encoder "
                "(rbln_uses_encoder=True)"
            )
        check_takes_pictures(config.in_channels)
        if options.scaled:
            vae.latent_scaling.check_known()
        sizes = sizing_for(vae, options).sizes
        self._vae, self._options = vae, options
        self._padded = vae.static_shapes
        self.batch_size = options.batch_size or config.batch_size
        if self._padded and (
            sizes != (config.sample_size,) or options.batch_size not in (None, config.batch_size)
        ):
            raise ValueError(
                f"the target {config.target!r} takes only the shape that the model was compiled "
                f"for: size {config.sample_size}, batch {config.batch_size}"
            )
        # A GPU computes one batch while the host prepares another and copies it.
        self.at_once = 2 if vae.device.type == "cuda" else 1
        self._scaling = vae.latent_scaling
        self._dtype: torch.dtype = getattr(torch, options.latent_dtype)

    def encode(self, images: Sequence[Prepared]) -> list[Encoded | Rejected]:
        """Encode images of the same size.

        Args:
            images: At most `batch_size` images.

        Returns:
            One result per image; it is rejected if the latent is not finite in the stored dtype.
        """
        pixels = torch.stack([torch.from_numpy(image.pixels) for image in images])
        kept = self._kept(pixels, [image.key for image in images], "")
        if self._options.flip:
            mirrored = pixels.flip(2)
            for i, image in enumerate(images):
                if image.mirrored is not None:
                    mirrored[i] = torch.from_numpy(image.mirrored)
            other = self._kept(mirrored, [image.key for image in images], MIRRORED)
            kept = [{**one, **two} for one, two in zip(kept, other, strict=True)]
        for image, tensors in zip(images, kept, strict=True):
            if image.opacity is not None:
                tensors[MASK] = torch.from_numpy(image.opacity) / 255
        return [
            self._finite(image.key, Encoded(self._record(image), tensors))
            for image, tensors in zip(images, kept, strict=True)
        ]

    def seconds(self, size: Size) -> float:
        """Seconds per image, after a warm-up run."""
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        image = Prepared("", None, {}, Placement(size, size, (0, 0), size), pixels)
        batch = [image] * self.batch_size
        self.encode(batch)
        start = time.perf_counter()
        self.encode(batch)
        return (time.perf_counter() - start) / len(batch)

    def _kept(self, pixels: Tensor, keys: Sequence[str], suffix: str) -> list[dict[str, Tensor]]:
        count = len(pixels)
        if self._padded and count < self.batch_size:
            pixels = torch.cat(
                [pixels, pixels.new_zeros(self.batch_size - count, *pixels.shape[1:])]
            )
        channels = self._vae.resolved_config.in_channels
        encoded = self._vae.encode_images(with_opacity(pixels, channels))
        if isinstance(encoded, Tensor):
            return [self._scaled({"latent": latent}, suffix) for latent in encoded[: len(keys)]]
        return [
            self._scaled(self._of_moments(encoded.mean[i], encoded.logvar[i], key, suffix), suffix)
            for i, key in enumerate(keys)
        ]

    def _of_moments(self, mean: Tensor, logvar: Tensor, key: str, suffix: str) -> dict[str, Tensor]:
        """What is kept of a distribution."""
        if self._options.kept == "mean":
            return {"latent": mean}
        if self._options.kept == "drawn":
            generator = torch.Generator().manual_seed(
                seed_of(self._options.seed, "sample" + suffix, key)
            )
            noise = torch.randn(mean.shape, generator=generator)
            return {"latent": mean + torch.exp(0.5 * logvar) * noise}
        return {"mean": mean, "logvar": logvar}

    def _scaled(self, tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
        """Tensors `(…, C, h, w)` as they are stored."""
        if self._options.scaled:
            tensors = {
                name: self._scaling.scale_log_variance(tensor)
                if name == "logvar"
                else self._scaling.scale(tensor)
                for name, tensor in tensors.items()
            }
        return {name + suffix: tensor.to(self._dtype) for name, tensor in tensors.items()}

    def _finite(self, key: str, encoded: Encoded) -> Encoded | Rejected:
        finite = all(bool(tensor.isfinite().all()) for tensor in encoded.tensors.values())
        return encoded if finite else Rejected(key, NOT_FINITE)

    def _record(self, image: Prepared | Clip) -> dict[str, Any]:
        place = image.placement
        record = {
            "key": image.key,
            "caption": image.caption,
            "original_size": list(place.original),
            "crops_coords_top_left": list(place.offset),
            "target_size": list(place.size),
            "columns": dict(image.columns),
        }
        if self._options.flip:
            record["crops_coords_top_left" + MIRRORED] = list(place.mirrored_offset)
        return record


class VideoEncoder(LatentEncoder):
    """The same of videos, each of which is read and encoded frame by frame.

    Args:
        vae: A model of videos with an encoder.
        options: The options of the job, with `frames`.

    Raises:
        ValueError: As `LatentEncoder`; or the model runs images only, or has no such number of
            frames.
        RBLNRuntimeError: PyAV is not installed.
    """

    def __init__(self, vae: RBLNAutoencoderModel, options: Options) -> None:
        if not isinstance(vae, RBLNVideoAutoencoder) or not vae.resolved_config.videos:
            raise ValueError(
                f"frames is {options.frames}, and the model, {type(vae).__name__}, was compiled "
                "for images; name a model of videos, such as Wan's, or omit frames"
            )
        assert options.frames is not None
        require_pyav()
        self._video, self._step = vae, vae.temporal_compression_ratio
        self._most = options.frames
        if rest := (self._most - 1) % self._step:
            below = self._most - rest
            raise ValueError(
                f"frames is {self._most}, expected 1 + {self._step} n, such as {below} or "
                f"{below + self._step}"
            )
        super().__init__(vae, dataclasses.replace(options, batch_size=None))
        self._options = options
        self.batch_size = self.at_once = 1

    def encode(self, images: Sequence[Clip]) -> list[Encoded | Rejected]:  # type: ignore[override]
        """Encode one video.

        Args:
            images: The video.

        Returns:
            One result; it is rejected if it is damaged, missing or not finite.

        Raises:
            OSError: It can't be read at present.
        """
        (clip,) = images
        tensors: dict[str, Tensor] = {}
        try:
            for suffix in ("", MIRRORED) if self._options.flip else ("",):
                mean, logvar = self._moments(clip.frames(), bool(suffix)).chunk(2)
                # As of DiagonalGaussianDistribution, which `encode` gives.
                kept = self._of_moments(mean, logvar.clamp(-30, 20), clip.key, suffix)
                by_frame = {name: tensor.transpose(0, 1) for name, tensor in kept.items()}
                for name, tensor in self._scaled(by_frame, suffix).items():
                    tensors[name] = tensor.transpose(0, 1).contiguous()
        except ValueError as error:
            return [Rejected(clip.key, str(error))]
        except UNREADABLE as error:
            return [unreadable(clip.key, error)]
        latent = next(iter(tensors.values()))
        frames = 1 + (latent.shape[1] - 1) * self._step
        record = {**self._record(clip), "frames": frames, "fps": clip.fps}
        return [self._finite(clip.key, Encoded(record, tensors))]

    def seconds(self, size: Size) -> float:
        """Seconds for a video of the most frames, from those for a few."""
        few = min(self._most, 1 + self._step)
        noise = np.random.default_rng(0).integers(0, 256, (few, *size, 3), np.uint8)
        self._moments(iter(noise), False)
        start = time.perf_counter()
        self._moments(iter(noise), False)
        return (time.perf_counter() - start) * self._most / few

    def _moments(self, frames: Iterator[npt.NDArray[np.uint8]], mirrored: bool) -> Tensor:
        """Mean and log-variance `(2 * C, t, h, w)` of a video."""
        channels = self._vae.resolved_config.in_channels

        def whole_chunks() -> Iterator[Tensor]:
            chunk: list[Tensor] = []
            taken = 1
            for frame in itertools.islice(frames, self._most):
                pixels = torch.from_numpy(frame)[None]
                chunk.append(with_opacity(pixels.flip(2) if mirrored else pixels, channels))
                if len(chunk) == taken:
                    yield from chunk
                    chunk.clear()
                    taken = self._step

        moments = [each[0].float().cpu() for each in self._video.encode_frames(whole_chunks())]
        if not moments:
            raise ValueError("it has no frames")
        return torch.stack(moments, 1)


def encoder_for(vae: RBLNAutoencoderModel, options: Options) -> LatentEncoder:
    """The encoder of images, or of videos if the options have `frames`.

    Raises:
        ValueError: As the encoder.
    """
    return (LatentEncoder if options.frames is None else VideoEncoder)(vae, options)


def load_model(
    model: str | os.PathLike[str] | RBLNAutoencoderModel,
    settings: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> RBLNAutoencoderModel:
    """Load a model, unless it is loaded already.

    Args:
        model: A loaded model, or the name of one.
        settings: Options of the model, for `rbln_config`.
        loading: The result of `hub.find_vae` for the name.
    """
    if isinstance(model, RBLNAutoencoderModel):
        return model
    return open_found(model, settings, loading)


def sizing_for(vae: RBLNAutoencoderModel, options: Options) -> Placer:
    """The sizes that images can be given for a model.

    Their sides are multiples of a latent cell or, if latents are scaled, of a patch of cells.

    Raises:
        ValueError: A size in the options is not such a multiple.
    """
    patch = vae.latent_scaling.patch_size if options.scaled else 1
    return options.sizing(patch * vae.resolved_config.vae_scale_factor)


def identity_of(vae: RBLNAutoencoderModel, directory: Path | None) -> dict[str, Any]:
    """The identity of a compiled model in the record of a job.

    Args:
        vae: The model.
        directory: The directory that it was loaded from, if any, for targets whose compiled
            models do not record their source.
    """
    config = vae.resolved_config
    encoder = vae.compiled_models.get(ENCODER)
    digest = None if encoder is None else encoder.source.get("sha256")
    file = directory and directory / f"{ENCODER}{SUFFIX}"
    if digest is None and file and file.exists():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "sha256": digest,
        "target": config.target,
        "dtype": config.dtype_of(ENCODER),
        "arithmetic": get_target(config.target).arithmetic,
        "vae_scale_factor": config.vae_scale_factor,
        "latent_channels": config.latent_channels,
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(vae.latent_scaling).items()
            if name != "known"
        },
    }
