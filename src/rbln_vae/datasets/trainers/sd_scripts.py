"""sd-scripts: an .npz file beside each image."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...files import atomic_path
from ...sizes import Size, format_size
from .base import (
    MASK,
    Architecture,
    down,
    nearest,
    quoted,
    stem_of,
    switch,
)
from .kohya import KohyaTrainer

if TYPE_CHECKING:
    from torch import Tensor


Array = npt.NDArray[Any]


class SdScripts(KohyaTrainer):
    """Caches of kohya's sd-scripts."""

    architectures: ClassVar[Mapping[str, Architecture]] = {
        "sd": Architecture("sd", "sd", by_size=False),
        "sdxl": Architecture("sdxl", "sdxl", by_size=False),
        "sd3": Architecture("sd3", "sd3"),
        "flux": Architecture("flux", "flux", scaled=True),
        "lumina": Architecture("flux", "lumina", scaled=True),
    }
    suffix = ".npz"
    offers = frozenset({"flip", "upscale", "min_bucket", "max_bucket", "alpha_mask"})
    conflict = "sd-scripts may read the cache of one for the other"

    def _rectangles(self) -> set[Size]:
        (height, width), step = self.options.sizes[0], self.options.bucket_step
        low = down(self.options.min_bucket or 0, step)
        high = -down(-(self.options.max_bucket or 0), step)
        if min(width, height) < low or max(width, height) > high:
            raise ValueError(
                f"sd-scripts refuses {format_size((height, width))} with buckets from {low} to "
                f"{high}; change size, min_bucket or max_bucket"
            )
        side = down(math.isqrt(self._area), step)
        found = {(side, side)}
        for one in range(max(low, step), high + 1, step):
            other = min(high, down(self._area // one, step))
            if other >= max(low, step):
                found |= {(one, other), (other, one)}
        return found

    @classmethod
    def defaults(cls, architecture: str | None) -> dict[str, Any]:
        return {**super().defaults(architecture), "min_bucket": 256, "max_bucket": 1024}

    @classmethod
    def fixed(cls, architecture: str) -> tuple[str, ...]:
        return (*super().fixed(architecture), "latent_dtype")

    def _fit(self, width: int, height: int) -> tuple[Size, Size]:
        aspect = width / height
        if not self.options.upscale:
            scaled = self._shrunk(width, height)
            step = self.options.bucket_step
            return scaled, (down(scaled[0], step), down(scaled[1], step))
        size = (width, height)
        bucket = size if size in self._buckets else nearest(self._buckets, aspect)
        wide = aspect > bucket[0] / bucket[1]
        ratio = bucket[1] / height if wide else bucket[0] / width
        return (int(width * ratio + 0.5), int(height * ratio + 0.5)), bucket

    def _shrunk(self, width: int, height: int) -> Size:
        """The size to which an image is scaled if none is enlarged."""
        if width * height <= self._area:
            return width, height
        aspect = width / height
        wide = math.sqrt(self._area * aspect)
        by_width, by_height = self._rounded(wide), self._rounded(self._area / wide)
        of_width = by_width / self._rounded(by_width / aspect)
        of_height = self._rounded(by_height * aspect) / by_height
        if abs(of_width - aspect) < abs(of_height - aspect):
            return by_width, int(by_width / aspect + 0.5)
        return int(by_height * aspect + 0.5), by_height

    def _rounded(self, side: float) -> int:
        return down(int(side + 0.5), self.options.bucket_step)

    def read(self, image: Image.Image) -> Image.Image:
        return image.convert("RGBA" if self.options.alpha_mask else "RGB")

    def write(
        self, out: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, list[str]]:
        height, width = record["original_size"]
        name = self.file_of(record)
        latent = tensors["latent"]
        ending = "_" + format_size(latent.shape[1:]) if self.architecture.by_size else ""
        arrays: dict[str, Array] = {
            "latents": latent.numpy(),
            "original_size": np.array([width, height], np.int64),
            "crop_ltrb": np.array(_crop(record["target_size"], (height, width)), np.float64),
        }
        if "latent_flipped" in tensors:
            arrays["latents_flipped"] = tensors["latent_flipped"].numpy()
        if MASK in tensors:
            arrays[MASK] = tensors[MASK].numpy()
        arrays = {key + ending: array for key, array in arrays.items()}
        path = out / name
        kept = _others(path, ending) if ending else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            _write(temporary, {**kept, **arrays})
        return {name: list(arrays)}

    def holds(self, path: Path, arrays: Sequence[str]) -> bool:
        try:
            with np.load(path) as stored:
                return set(arrays) <= set(stored.files)
        except (OSError, ValueError, zipfile.BadZipFile):
            return False

    def shadows(self, name: str) -> str | None:
        return None if self.architecture.by_size else f"{stem_of(name)}.npz"

    def configuration(self, source: str, out: str) -> str:
        options = self.options
        height, width = options.sizes[0]
        lines = [
            "[[datasets]]",
            f"resolution = {width if width == height else [width, height]}",
            f"enable_bucket = {switch(options.aspect)}",
        ]
        if options.aspect:
            lines += [
                f"bucket_reso_steps = {options.bucket_step}",
                f"min_bucket_reso = {options.min_bucket}",
                f"max_bucket_reso = {options.max_bucket}",
                f"bucket_no_upscale = {switch(not options.upscale)}",
            ]
        lines += [
            "",
            "  [[datasets.subsets]]  # one for each folder of images",
            f"  image_dir = {quoted(out)}",
            f"  flip_aug = {switch(options.flip)}",
            f"  alpha_mask = {switch(options.alpha_mask)}",
            "",
            "# and on the command line: --cache_latents --cache_latents_to_disk",
        ]
        return "\n".join(lines)


def _crop(bucket: Sequence[int], original: Sequence[int]) -> tuple[float, ...]:
    """Left, top, right and bottom, as the trainer conditions SDXL on them."""
    (high, wide), (height, width) = bucket, original
    aspect = width / height
    across, along = (high * aspect, high) if wide / high > aspect else (wide, wide / aspect)
    left, top = (wide - across) // 2, (high - along) // 2
    return left, top, left + across, top + along


def _others(path: Path, ending: str) -> dict[str, Array]:
    """The arrays of other resolutions in a file; none if it is missing or damaged."""
    try:
        with np.load(path) as stored:
            return {key: stored[key] for key in stored.files if not key.endswith(ending)}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}


def _write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write what `numpy.savez` writes, without the time, so that equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
