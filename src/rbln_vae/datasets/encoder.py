"""The encoder of a job: turns prepared images into the tensors and records of shards."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..artifact import SUFFIX
from ..images import check_takes_pictures, with_opacity
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.family import ENCODER
from ..models.opening import open_found
from ..targets.base import get_target
from .buckets import Placer
from .options import Options
from .pictures import Prepared
from .seeds import seed_of
from .trainers.base import MASK

MIRRORED = "_flipped"
"""The suffix of the names of tensors of a mirrored image."""


@dataclass(frozen=True)
class Encoded:
    """An encoded image, as a shard stores it.

    Attributes:
        record: Key, caption, sizes and columns, as JSON values.
        tensors: Tensors `(C, h, w)` by name: `mean` and `logvar`, or `latent`, and those of
            the mirrored image if it was encoded. For a trainer that keeps it, also the opacity
            `(H, W)`.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class Encoder(Protocol):
    """An encoder, as a pipeline uses it."""

    @property
    def batch_size(self) -> int:
        """The most images of a run."""

    def encode(self, images: Sequence[Prepared]) -> list[Encoded | None]:
        """Encode images of the same size; `None` stands for a latent that is not finite."""


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
        self._scaling = vae.latent_scaling
        self._dtype: torch.dtype = getattr(torch, options.latent_dtype)

    def encode(self, images: Sequence[Prepared]) -> list[Encoded | None]:
        """Encode images of the same size.

        Args:
            images: At most `batch_size` images.

        Returns:
            One result per image; `None` if the latent is not finite in the stored dtype.
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
            Encoded(self._record(image), tensors)
            if all(bool(tensor.isfinite().all()) for tensor in tensors.values())
            else None
            for image, tensors in zip(images, kept, strict=True)
        ]

    def _kept(self, pixels: Tensor, keys: Sequence[str], suffix: str) -> list[dict[str, Tensor]]:
        count = len(pixels)
        if self._padded and count < self.batch_size:
            pixels = torch.cat(
                [pixels, pixels.new_zeros(self.batch_size - count, *pixels.shape[1:])]
            )
        channels = self._vae.resolved_config.in_channels
        encoded = self._vae.encode_images(with_opacity(pixels, channels))
        result = []
        for i, key in enumerate(keys):
            if isinstance(encoded, Tensor):
                tensors = {"latent": encoded[i]}
            elif self._options.kept == "mean":
                tensors = {"latent": encoded.mean[i]}
            elif self._options.kept == "drawn":
                mean, logvar = encoded.mean[i], encoded.logvar[i]
                generator = torch.Generator().manual_seed(
                    seed_of(self._options.seed, "sample" + suffix, key)
                )
                noise = torch.randn(mean.shape, generator=generator)
                tensors = {"latent": mean + torch.exp(0.5 * logvar) * noise}
            else:
                tensors = {"mean": encoded.mean[i], "logvar": encoded.logvar[i]}
            if self._options.scaled:
                tensors = {
                    name: self._scaling.scale_log_variance(tensor)
                    if name == "logvar"
                    else self._scaling.scale(tensor)
                    for name, tensor in tensors.items()
                }
            result.append({name + suffix: t.to(self._dtype) for name, t in tensors.items()})
        return result

    def _record(self, image: Prepared) -> dict[str, Any]:
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
