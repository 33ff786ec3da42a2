"""AI Toolkit: a safetensors file in a folder `_latent_cache` beside each image."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from ...files import atomic_path
from ...sizes import Size
from .base import (
    Architecture,
    Pixels,
    Trainer,
    quoted,
    safetensors_file,
    stem_of,
    suffix_of,
    switch,
)

_FOLDER = "_latent_cache"
_CONTROLS = "_controls"
"""A folder with images that the trainer made, which it doesn't train on."""

if TYPE_CHECKING:
    from torch import Tensor

    from ..options import Options


def _flux2(name: str) -> Architecture:
    # The encoder of the trainer gives the mean, in patches, normalised.
    return Architecture("flux2", name, step=16, drawn=False, scaled=True)


class AiToolkit(Trainer):
    """Caches of Ostris' AI Toolkit."""

    architectures: ClassVar[Mapping[str, Architecture]] = {
        "sd": Architecture("sd", "sd1", step=16, scaled=True),
        "sdxl": Architecture("sdxl", "sdxl", step=16, scaled=True),
        "sd3": Architecture("sd3", "sd3", step=32, scaled=True),
        "flux": Architecture("flux", "flux1", step=32, scaled=True),
        "z-image": Architecture("z-image", "zimage", step=16, scaled=True),
        "flux2-dev": _flux2("flux2"),
        "flux2-klein-4b": _flux2("flux2_klein_4b"),
        "flux2-klein-9b": _flux2("flux2_klein_9b"),
    }
    offers = frozenset({"flip", "upscale"})
    uses_opencv = False
    mirrors_first = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        height, width = options.sizes[0]
        if not options.aspect:
            raise ValueError("AI Toolkit always trains with buckets: set aspect (--aspect)")
        if height != width:
            raise ValueError(
                f"the resolution of AI Toolkit is one number, found {height}x{width}; name one side"
            )
        self._area = width * width

    @property
    def sizes(self) -> tuple[Size, ...]:
        return ()

    def _fit(self, width: int, height: int) -> tuple[Size, Size]:
        bucket = self._bucket(width, height)
        ratio = max(bucket[0] / width, bucket[1] / height)
        return (math.ceil(width * ratio), math.ceil(height * ratio)), bucket

    def _bucket(self, width: int, height: int) -> Size:
        step, area = self.options.bucket_step, width * height
        target = min(area, self._area)
        ratio = (target / area) ** 0.5
        across, along = width * ratio / step, height * ratio / step
        candidates = [
            (x * step, y * step)
            for x in (math.floor(across), math.ceil(across))
            for y in (math.floor(along), math.ceil(along))
            if x > 0 and y > 0 and x * y * step * step <= self._area
        ]
        if not candidates:
            return max(1, math.floor(across)) * step, max(1, math.floor(along)) * step
        return min(candidates, key=lambda size: abs(size[0] * size[1] - target))

    def takes(self, name: str) -> bool:
        folder = name.rpartition("/")[0].rpartition("/")[2]
        return suffix_of(name).lower() in ("jpg", "jpeg", "png", "webp") and folder != _CONTROLS

    def read(self, image: Image.Image) -> Image.Image:
        return ImageOps.exif_transpose(image).convert("RGB")

    def scale(self, picture: Image.Image, size: Size) -> Pixels:
        return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))

    def write(
        self, out: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, list[str]]:
        folder, slash, name = record["key"].rpartition("/")
        height, width = record["original_size"]
        placement = self.place((height, width))
        info: dict[str, Any] = {
            "filename": name,
            "scale_to_width": placement.scaled[1],
            "scale_to_height": placement.scaled[0],
            "crop_x": placement.offset[1],
            "crop_y": placement.offset[0],
            "crop_width": placement.size[1],
            "crop_height": placement.size[0],
            "latent_space_version": self.architecture.name,
            "latent_version": 1,
        }
        written = {}
        for kept, mirrored in (("latent", {}), ("latent_flipped", {"flip_x": True})):
            if kept in tensors:
                file = f"{folder}{slash}{_FOLDER}/{stem_of(name)}_{_hash({**info, **mirrored})}"
                path = out / f"{file}.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    temporary.write_bytes(
                        safetensors_file("latent", tensors[kept], _metadata({**info, **mirrored}))
                    )
                written[f"{file}.safetensors"] = ["latent"]
        return written

    @property
    def temporaries(self) -> str:
        return f"{_FOLDER}/.*.safetensors.*.tmp"

    def configuration(self, source: str, out: str) -> str:
        options = self.options
        return "\n".join(
            [
                "datasets:",
                f"  - folder_path: {quoted(out)}",
                f"    resolution: [{options.sizes[0][0]}]",
                "    buckets: true",
                "    cache_latents_to_disk: true",
                f"    flip_x: {switch(options.flip)}",
                "    flip_y: false",
                "    random_crop: false",
                "    random_scale: false",
                "    square_crop: false",
                "    scale: 1.0",
            ]
        )


def _hash(info: Mapping[str, Any]) -> str:
    digest = hashlib.md5(json.dumps(info, sort_keys=True).encode(), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _metadata(info: Mapping[str, Any]) -> dict[str, str]:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()}
    return {**texts, "format": "pt"}
