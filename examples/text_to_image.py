"""Make an image from a prompt, with the decoder of the pipeline compiled.

It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/text_to_image.py --prompt "a lighthouse in a storm"
python examples/text_to_image.py --model Qwen/Qwen-Image --prompt "a lighthouse in a storm"
python examples/text_to_image.py --tiny              # offline, random weights: noise
python examples/text_to_image.py --tiny qwen-image   # the same in Qwen-Image's pipeline
"""

from __future__ import annotations

import argparse
import inspect

import tiny
from diffusers import DiffusionPipeline

from rbln_vae import compile_pipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a lighthouse in a storm, oil painting")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="text_to_image.png")
tiny.add_argument(parser, "text-to-image", default="sd")
arguments = parser.parse_args()

if arguments.tiny:
    pipe, call = tiny.pipeline(arguments.tiny)
else:
    pipe, call = DiffusionPipeline.from_pretrained(arguments.model), {"prompt": arguments.prompt}
    if "num_frames" in inspect.signature(pipe.__call__).parameters:
        call["num_frames"] = 1  # an image is a video of one frame

compile_pipeline(pipe, rbln_uses_encoder=False)
call["num_inference_steps"] = arguments.steps
output = pipe(**call, output_type="pil")
image = output.images[0] if hasattr(output, "images") else output.frames[0][0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
