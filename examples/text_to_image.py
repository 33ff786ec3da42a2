"""Make an image from a prompt, with the decoder of the pipeline compiled.

It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/text_to_image.py --prompt "a lighthouse in a storm"
python examples/text_to_image.py --tiny     # offline, random weights: noise
"""

from __future__ import annotations

import argparse

import tiny
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline

from rbln_vae import RBLNAutoencoderKL

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a lighthouse in a storm, oil painting")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="text_to_image.png")
parser.add_argument("--tiny", action="store_true", help="random weights, no downloads")
arguments = parser.parse_args()

if arguments.tiny:
    pipe = StableDiffusionPipeline(
        **tiny.stable_diffusion(), vae=tiny.vae(), requires_safety_checker=False
    )
else:
    pipe = AutoPipelineForText2Image.from_pretrained(arguments.model)

pipe.vae = RBLNAutoencoderKL.from_model(pipe.vae, rbln_uses_encoder=False)
image = pipe(arguments.prompt, num_inference_steps=arguments.steps).images[0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
