"""Make an image from a prompt by Kandinsky 2.2, with the decoder of its MoVQ compiled.

Its prior turns the prompt into the embedding of an image, and its decoder that into the image.
It needs what `pip install 'rbln-vae[examples]'` installs.

python examples/kandinsky.py --prompt "a lighthouse in a storm"
python examples/kandinsky.py --tiny     # offline, random weights: noise
"""

from __future__ import annotations

import argparse

import tiny
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

from rbln_vae import compile_pipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--prior", default="kandinsky-community/kandinsky-2-2-prior")
parser.add_argument("--model", default="kandinsky-community/kandinsky-2-2-decoder")
parser.add_argument("--prompt", default="a lighthouse in a storm, oil painting")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="kandinsky.png")
parser.add_argument("--tiny", action="store_true", help="random weights, no downloads")
arguments = parser.parse_args()

if arguments.tiny:
    pipe, call = tiny.pipeline("kandinsky")
else:
    prior = KandinskyV22PriorPipeline.from_pretrained(arguments.prior)
    pipe, call = KandinskyV22Pipeline.from_pretrained(arguments.model), prior(arguments.prompt)

compile_pipeline(pipe, rbln_uses_encoder=False)
image = pipe(**call, num_inference_steps=arguments.steps).images[0]
image.save(arguments.output)
print(f"{image.width}x{image.height} pixels in {arguments.output}")
