"""Change a picture by a prompt, with both parts of the pipeline's VAE compiled.

It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/image_to_image.py photo.jpg --prompt "a watercolour"
python examples/image_to_image.py photo.jpg --model Qwen/Qwen-Image-Edit --prompt "at night"
python examples/image_to_image.py --tiny                   # offline, random weights: noise
python examples/image_to_image.py --tiny qwen-image-edit   # the same in Qwen-Image's pipeline
"""

from __future__ import annotations

import argparse

import tiny
from diffusers import AutoPipelineForImage2Image
from diffusers.utils import load_image

from rbln_vae import compile_pipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("image", nargs="?", help="a file or an address; needed without --tiny")
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a watercolour")
parser.add_argument(
    "--strength", type=float, help="how much changes, up to 1; pipelines made for editing take none"
)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="image_to_image.png")
tiny.add_argument(parser, "image-to-image", default="sd-img2img")
arguments = parser.parse_args()

if arguments.tiny:
    pipe, call = tiny.pipeline(arguments.tiny)
elif arguments.image is None:
    parser.error("name an image, or give --tiny")
else:
    pipe = AutoPipelineForImage2Image.from_pretrained(arguments.model)
    call = {"prompt": arguments.prompt, "image": load_image(arguments.image)}
if arguments.strength is not None:
    call["strength"] = arguments.strength

compile_pipeline(pipe)
call["num_inference_steps"] = arguments.steps
image = pipe(**call).images[0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
