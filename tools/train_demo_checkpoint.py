"""Train the small AutoencoderKL that the package ships as its demo checkpoint.

The data are the photographs inside the scikit-image wheel, so the script needs no
download. Two of them are held out; the script reports the PSNR on those.

    python tools/train_demo_checkpoint.py OUTPUT_DIRECTORY
    python tools/train_demo_checkpoint.py OUTPUT_DIRECTORY --evaluate

The weights start as a linear transform coder (see linear_start.py) and are then trained by
mean square error, at last on larger crops. The default 1300 steps take about 12 minutes on
one thread of a busy two-core machine.
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
from linear_start import linear_start
from PIL import Image
from skimage import data

# Not moon and stereo_motorcycle: scikit-image states no terms for them.
COLOURED = ("astronaut", "cat", "hubble_deep_field", "immunohistochemistry", "retina")
GREY = ("brick", "camera", "clock", "coins", "grass", "gravel")
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
# Up to which share of the steps, crop size and batch size: many small crops teach the texture,
# few large ones the attention and the statistics of the norms.
PHASES = ((0.55, 64, 8), (0.85, 128, 2), (1.0, 192, 1))
START_CROPS = 150
WARM_UP, AVERAGE_DECAY, KL_WEIGHT = 50, 0.995, 1e-5


def photographs(names: tuple[str, ...]) -> list[Image.Image]:
    """The named scikit-image photographs, as RGB."""
    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]


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
    if rng.random() < 0.5:  # few photographs, so few colours: make more of them
        mix = np.eye(3) + rng.normal(0, 0.2, (3, 3))
        mix /= np.abs(mix.sum(axis=1, keepdims=True)).clip(0.5)
        pixels = pixels @ mix[rng.permutation(3)].T * rng.uniform(0.6, 1.2)
        pixels = pixels + rng.normal(0, 0.1, 3)
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


def average_into(average: AutoencoderKL, model: AutoencoderKL, decay: float) -> None:
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


class Crops:
    """Random batches of the training photographs, four of five from a coloured one."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.coloured, self.grey = photographs(COLOURED), photographs(GREY)

    def batch(self, count: int, size: int) -> torch.Tensor:
        crops = []
        for _ in range(count):
            images = self.coloured if self.rng.random() < 0.8 else self.grey
            crops.append(random_crop(images[self.rng.integers(len(images))], size, self.rng))
        return torch.from_numpy(np.stack(crops)).contiguous(memory_format=torch.channels_last)


def loss_of(model: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and the mean square error in it."""
    posterior = model.encode(pixels).latent_dist
    mse = (model.decode(posterior.sample()).sample - pixels).square().mean()
    return mse + KL_WEIGHT * posterior.kl().sum() / posterior.mean.numel(), mse


def relative_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1, (step + 1) / WARM_UP) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))


def train(steps: int, rate: float, seed: int, output: Path) -> None:
    torch.manual_seed(seed)
    crops = Crops(seed)
    model = AutoencoderKL(**ARCHITECTURE)
    linear_start(model, crops.batch(START_CROPS, 64).contiguous())
    model = model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    save(average, crops, output)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: relative_rate(step, steps))
    start, recent = time.monotonic(), 0.0
    for step in range(steps):
        size, count = next(phase[1:] for phase in PHASES if step < phase[0] * steps)
        loss, mse = loss_of(model, crops.batch(count, size))
        recent = mse.item() if step == 0 else 0.98 * recent + 0.02 * mse.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average_into(average, model, min(AVERAGE_DECAY, (step + 1) / (step + 10)))
        if step % 50 == 49:
            seconds = time.monotonic() - start
            print(f"step {step + 1}: mean mse {recent:.5f}, {seconds:.0f} s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            save(average, crops, output)


@torch.no_grad()
def save(model: AutoencoderKL, crops: Crops, output: Path) -> None:
    """Store the model in float16 with the scaling factor that gives its latents unit variance."""
    latents = [
        model.encode(square(image, 256)).latent_dist.mean for image in crops.coloured + crops.grey
    ]
    scale = 1 / torch.cat(latents).std().item()
    stored = copy.deepcopy(model).half()
    stored.register_to_config(scaling_factor=round(scale, 4))
    stored.save_pretrained(output)
    report(stored.float())


def report(model: AutoencoderKL) -> None:
    """Print the PSNR of each held-out photograph."""
    psnr = {name: round(value, 2) for name, value in held_out_psnr(model).items()}
    print(json.dumps({"held-out PSNR, dB": psnr}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="only print the held-out PSNR")
    options = parser.parse_args()
    if options.evaluate:
        report(AutoencoderKL.from_pretrained(options.output, torch_dtype=torch.float32))
    else:
        train(options.steps, options.rate, options.seed, options.output)


if __name__ == "__main__":
    main()
