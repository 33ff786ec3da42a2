"""Fill the white parts of a mask by a prompt, with both parts of the pipeline's VAE compiled.

It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/inpainting.py photo.jpg mask.png --prompt "a cat on the bench"
python examples/inpainting.py --tiny        # offline, random weights: noise
"""

from __future__ import annotations

import argparse

import tiny
from diffusers import AutoPipelineForInpainting, StableDiffusionInpaintPipeline
from diffusers.utils import load_image
from PIL import Image

from rbln_vae import RBLNAutoencoderKL

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("image", nargs="?", help="a file or an address; needed without --tiny")
parser.add_argument("mask", nargs="?", help="white is filled; needed without --tiny")
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a cat")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="inpainting.png")
parser.add_argument("--tiny", action="store_true", help="random weights, no downloads")
arguments = parser.parse_args()

if arguments.tiny:
    pipe = StableDiffusionInpaintPipeline(
        **tiny.stable_diffusion(in_channels=9), vae=tiny.vae(), requires_safety_checker=False
    )
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.linear_gradient("L").resize((64, 64)).point(lambda value: 255 * (value > 127))
elif arguments.mask is None:
    parser.error("name an image and a mask, or give --tiny")
else:
    pipe = AutoPipelineForInpainting.from_pretrained(arguments.model)
    picture, mask = load_image(arguments.image), load_image(arguments.mask)

pipe.vae = RBLNAutoencoderKL.from_model(pipe.vae)
image = pipe(
    arguments.prompt,
    image=picture,
    mask_image=mask,
    height=picture.height // 8 * 8,
    width=picture.width // 8 * 8,
    num_inference_steps=arguments.steps,
).images[0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
