"""Compile the shipped checkpoint and reconstruct a photograph that it never saw.

Run it with `make demo`. The picture is written to demo_output/.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from skimage import data

from rbln_vae import RBLNAutoencoderKL, demo_model
from rbln_vae.images import error_image, side_by_side, to_image, to_tensor
from rbln_vae.metrics import psnr, ssim

SIZE = 512
OUTPUT = Path(__file__).parents[1] / "demo_output"
NEEDED_AGREEMENT = 80
"""Decibels between the compiled model and diffusers, in float32."""

Result = TypeVar("Result")


def photograph() -> Image.Image:
    """A cup of coffee: the middle square, at 512x512."""
    whole = Image.fromarray(data.coffee())
    return ImageOps.fit(whole, (SIZE, SIZE), Image.Resampling.LANCZOS)


def reconstruct(vae: RBLNAutoencoderKL | AutoencoderKL, sample: torch.Tensor) -> torch.Tensor:
    """Encode and decode; the two classes are used alike."""
    with torch.no_grad():
        latents = vae.encode(sample).latent_dist.mode()
        return vae.decode(latents).sample


def timed(work: Callable[[], Result], runs: int = 3) -> tuple[Result, float]:
    """The result, and the seconds of the quickest of some runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main() -> None:
    original = photograph()
    sample = to_tensor(original)

    start = time.perf_counter()
    compiled = RBLNAutoencoderKL.from_pretrained(demo_model(), export=True, rbln_dtype="float32")
    print(f"compiled {demo_model().name} in {time.perf_counter() - start:.2f} s")
    reference = AutoencoderKL.from_pretrained(demo_model()).float().eval()

    result, ours = timed(lambda: reconstruct(compiled, sample))
    expected, theirs = timed(lambda: reconstruct(reference, sample))
    quality = psnr(result.clamp(-1, 1), sample)
    agreement = psnr(result, expected)

    shown = to_image(result)
    OUTPUT.mkdir(exist_ok=True)
    picture = OUTPUT / "coffee.png"
    side_by_side(
        {
            "original": original,
            f"reconstruction, {quality:.1f} dB": shown,
            "error x8": error_image(original, shown, gain=8),
        }
    ).save(picture)

    similarity = ssim(result.clamp(-1, 1), sample)
    print(f"against the original:  PSNR {quality:.2f} dB, SSIM {similarity:.4f}")
    print(f"against diffusers:     PSNR {agreement:.1f} dB (at least {NEEDED_AGREEMENT} is needed)")
    print(f"encode and decode at {SIZE}x{SIZE}, best of 3, {torch.get_num_threads()} threads:")
    print(f"    rbln-vae   {ours:.3f} s")
    print(f"    diffusers  {theirs:.3f} s")
    print(f"the picture is {picture}")
    if agreement < NEEDED_AGREEMENT:
        sys.exit("The compiled model doesn't agree with diffusers.")


if __name__ == "__main__":
    main()
