"""Train the small AutoencoderKL that the package ships as its demo checkpoint.

The data are the photographs inside the scikit-image wheel, so the script needs no
download. Two of them are held out; the script reports the PSNR on those.

    python tools/train_demo_checkpoint.py OUTPUT_DIRECTORY --steps 14000
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data

COLOURED = (
    "astronaut",
    "cat",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "stereo_motorcycle",
)
GREY = ("brick", "camera", "clock", "coins", "grass", "gravel", "moon")
HELD_OUT = ("coffee", "rocket")
ARCHITECTURE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "sample_size": 512,
    "force_upcast": False,
}
# Pixels and batch: many small crops teach the texture, large ones at the end the attention.
SMALL_CROPS, LARGE_CROPS = (64, 8), (160, 4)


def photographs(names: tuple[str, ...]) -> list[Image.Image]:
    """The named scikit-image photographs, as RGB."""
    images = []
    for name in names:
        loaded = getattr(data, name)()
        views = loaded[:2] if isinstance(loaded, tuple) else (loaded,)
        images += [Image.fromarray(view).convert("RGB") for view in views]
    return images


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square of `size` pixels at a random place, scale, turn and colouring, in [-1, 1]."""
    shortest = min(image.size)
    side = min(shortest, size * math.exp(rng.uniform(math.log(0.5), math.log(2.0))))
    left = rng.uniform(0, image.width - side)
    top = rng.uniform(0, image.height - side)
    crop = image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(crop, np.float32) / 127.5 - 1
    pixels = np.rot90(pixels, rng.integers(4))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.7:  # few photographs, so few colours: make more of them
        mix = np.eye(3) + rng.normal(0, 0.35, (3, 3))
        mix /= np.abs(mix.sum(axis=1, keepdims=True)).clip(0.5)
        pixels = pixels @ mix[rng.permutation(3)].T * rng.uniform(0.6, 1.2)
        pixels = pixels + rng.normal(0, 0.15, 3)
    return pixels.clip(-1, 1).transpose(2, 0, 1).astype(np.float32)


def square(image: Image.Image, size: int) -> torch.Tensor:
    """The centre of the image at `size` by `size`, as a batch of one in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    scaled = image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    pixels = torch.from_numpy(np.asarray(scaled, np.float32) / 127.5 - 1)
    return pixels.permute(2, 0, 1)[None]


@torch.no_grad()
def held_out_psnr(model: AutoencoderKL) -> dict[str, float]:
    """PSNR in dB at 512 x 512 of each held-out photograph."""
    result = {}
    for name, image in zip(HELD_OUT, photographs(HELD_OUT), strict=True):
        original = square(image, 512)
        error = (model(original).sample.clamp(-1, 1) - original) / 2
        result[name] = -10 * math.log10(error.square().mean().item())
    return result


def quiet_branches(model: AutoencoderKL) -> None:
    """Start every residual branch at zero, so that training begins with a linear model."""
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def average_into(average: AutoencoderKL, model: AutoencoderKL, decay: float) -> None:
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


def train(steps: int, rate: float, output: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    coloured, grey = photographs(COLOURED), photographs(GREY)
    model = AutoencoderKL(**ARCHITECTURE).to(memory_format=torch.channels_last)
    quiet_branches(model)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    warm_up = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / warm_up)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        ),
    )
    start, recent = time.monotonic(), 0.0
    for step in range(steps):
        crop, batch = SMALL_CROPS if step < 0.88 * steps else LARGE_CROPS
        sources = [coloured if rng.random() < 0.8 else grey for _ in range(batch)]
        crops = [random_crop(s[rng.integers(len(s))], crop, rng) for s in sources]
        pixels = torch.from_numpy(np.stack(crops))
        posterior = model.encode(pixels.to(memory_format=torch.channels_last)).latent_dist
        decoded = model.decode(posterior.sample()).sample
        mse = (decoded - pixels).square().mean()
        recent = mse.item() if step == 0 else 0.98 * recent + 0.02 * mse.item()
        loss = mse + 0.05 * (decoded - pixels).abs().mean() + 1e-6 * posterior.kl().mean() / 1024
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average_into(average, model, min(0.998, (step + 1) / (step + 10)))
        if step % 100 == 99:
            seconds = time.monotonic() - start
            print(f"step {step + 1}: mean mse {recent:.5f}, {seconds:.0f} s", flush=True)
        if step % 2000 == 1999 or step == steps - 1:
            save(average, coloured + grey, output)


def save(model: AutoencoderKL, images: list[Image.Image], output: Path) -> None:
    """Store the model in float16 with the scaling factor that gives its latents unit variance."""
    with torch.no_grad():
        latents = [model.encode(square(image, 256)).latent_dist.mean for image in images]
    scale = 1 / torch.cat(latents).std().item()
    model.register_to_config(scaling_factor=round(scale, 4))
    stored = copy.deepcopy(model).half()
    stored.save_pretrained(output)
    psnr = held_out_psnr(stored.float())
    print(json.dumps({"held-out PSNR, dB": psnr}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    train(options.steps, options.rate, options.output)


if __name__ == "__main__":
    main()
