"""Fill the white parts of a mask by a prompt, with both parts of the pipeline's VAE compiled.

It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/inpainting.py photo.jpg mask.png --prompt "a cat on the bench"
python examples/inpainting.py --tiny                      # offline, random weights: noise
python examples/inpainting.py --tiny qwen-image-inpaint   # the same in Qwen-Image's pipeline
"""

from __future__ import annotations

import argparse

import tiny
from diffusers import AutoPipelineForInpainting
from diffusers.utils import load_image

from rbln_vae import compile_pipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("image", nargs="?", help="a file or an address; needed without --tiny")
parser.add_argument("mask", nargs="?", help="white is filled; needed without --tiny")
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a cat")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="inpainting.png")
tiny.add_argument(parser, "inpainting", default="sd-inpaint-9")
arguments = parser.parse_args()

if arguments.tiny:
    pipe, call = tiny.pipeline(arguments.tiny)
elif arguments.mask is None:
    parser.error("name an image and a mask, or give --tiny")
else:
    pipe = AutoPipelineForInpainting.from_pretrained(arguments.model)
    picture = load_image(arguments.image)
    call = {
        "prompt": arguments.prompt,
        "image": picture,
        "mask_image": load_image(arguments.mask),
        "height": picture.height // 8 * 8,
        "width": picture.width // 8 * 8,
    }

compile_pipeline(pipe)
call["num_inference_steps"] = arguments.steps
image = pipe(**call).images[0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
