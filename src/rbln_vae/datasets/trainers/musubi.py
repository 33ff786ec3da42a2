"""musubi-tuner: a safetensors file for each image in the cache directory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from ...files import atomic_path
from ...sizes import Size, format_size
from .base import (
    Architecture,
    down,
    nearest,
    quoted,
    safetensors_file,
    switch,
)
from .kohya import KohyaTrainer

if TYPE_CHECKING:
    from torch import Tensor


def _flux2(name: str, full_name: str) -> Architecture:
    # The encoder of the trainer gives the mean, in patches, normalised.
    return Architecture("flux2", name, full_name, 16, drawn=False, scaled=True, by_size=False)


class Musubi(KohyaTrainer):
    """Caches of musubi-tuner."""

    architectures: ClassVar[Mapping[str, Architecture]] = {
        "z-image": Architecture("z-image", "zi", "z_image", 16, drawn=False, by_size=False),
        "flux2-dev": _flux2("f2d", "flux_2_dev"),
        "flux2-klein-4b": _flux2("f2k4b", "flux_2_klein_4b"),
        "flux2-klein-9b": _flux2("f2k9b", "flux_2_klein_9b"),
    }
    suffix = ".safetensors"
    offers = frozenset({"upscale"})
    conflict = "musubi-tuner has one text encoder cache for both"

    def _rectangles(self) -> set[Size]:
        step, side = self.options.bucket_step, math.isqrt(self._area)
        least = down(side // 2, step)
        if not least:
            raise ValueError(
                f"musubi-tuner has no buckets for {format_size(self.options.sizes[0])}; it needs "
                f"at least {2 * step}"
            )
        found = set()
        for one in range(least, side + step, step):
            other = down(self._area // one, step)
            found |= {(one, other), (other, one)}
        return found

    def _fit(self, width: int, height: int) -> tuple[Size, Size]:
        step = self.options.bucket_step
        if not self.options.upscale and width * height <= self._area:
            bucket = down(width, step), down(height, step)
        else:
            bucket = nearest(self._buckets, width / height)
        if bucket == (width, height):
            return bucket, bucket
        ratio = max(bucket[0] / width, bucket[1] / height)
        return (int(width * ratio + 0.5), int(height * ratio + 0.5)), bucket

    def read(self, image: Image.Image) -> Image.Image:
        return image if image.mode in ("RGB", "RGBA") else image.convert("RGB")

    def write(
        self, out: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, list[str]]:
        height, width = record["original_size"]
        name = self.file_of(record)
        latent = tensors["latent"]
        # A latent of Z-Image is named as a frame of a video, one of FLUX.2 is not.
        frames = "" if self.architecture.scaled else "1x"
        dtype = str(latent.dtype).removeprefix("torch.")
        array = f"latents_{frames}{format_size(latent.shape[1:])}_{dtype}"
        metadata = {
            "architecture": str(self.architecture.full_name),
            "width": str(width),
            "height": str(height),
            "format_version": "1.0.1",
        }
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(safetensors_file(array, latent, metadata))
        return {name: [array]}

    def configuration(self, source: str, out: str) -> str:
        options = self.options
        height, width = options.sizes[0]
        lines = [
            "[[datasets]]  # one for each folder of images",
            f"resolution = [{width}, {height}]",
            f"enable_bucket = {switch(options.aspect)}",
            f"bucket_no_upscale = {switch(not options.upscale)}",
            f"image_directory = {quoted(source)}",
            f"cache_directory = {quoted(out)}",
        ]
        return "\n".join(lines)
