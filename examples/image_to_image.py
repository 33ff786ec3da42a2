"""Change a picture by a prompt, with both parts of the pipeline's VAE compiled.

It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/image_to_image.py photo.jpg --prompt "a watercolour"
python examples/image_to_image.py --tiny    # offline, random weights: noise
"""

from __future__ import annotations

import argparse

import tiny
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image
from PIL import Image

from rbln_vae import RBLNAutoencoderKL

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("image", nargs="?", help="a file or an address; needed without --tiny")
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a watercolour")
parser.add_argument("--strength", type=float, default=0.6)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="image_to_image.png")
parser.add_argument("--tiny", action="store_true", help="random weights, no downloads")
arguments = parser.parse_args()

if arguments.tiny:
    pipe = StableDiffusionImg2ImgPipeline(
        **tiny.stable_diffusion(), vae=tiny.vae(), requires_safety_checker=False
    )
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
elif arguments.image is None:
    parser.error("name an image, or give --tiny")
else:
    pipe = AutoPipelineForImage2Image.from_pretrained(arguments.model)
    picture = load_image(arguments.image)

pipe.vae = RBLNAutoencoderKL.from_model(pipe.vae)
image = pipe(
    arguments.prompt,
    image=picture,
    strength=arguments.strength,
    num_inference_steps=arguments.steps,
).images[0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
