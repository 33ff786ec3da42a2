"""A compiled model is saved with its pipeline, and comes back compiled in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_vaes
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKL

OPTIONS = {"num_inference_steps": 1, "output_type": "pt"}

LOAD_AND_RUN = """
import sys, torch
{imports}
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe.vae).__name__ == "RBLNAutoencoderKL", type(pipe.vae)
image = pipe("a cat", num_inference_steps=1, output_type="pt", generator=torch.manual_seed(0))
torch.save(image.images, sys.argv[2])
"""


def generate(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", **OPTIONS, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def saved(compiled, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A saved pipeline, and what it gave before."""
    directory = tmp_path_factory.mktemp("pipeline")
    pipe = StableDiffusionPipeline(
        **tiny.stable_diffusion(), vae=compiled, requires_safety_checker=False
    )
    pipe.save_pretrained(directory)
    return directory, generate(pipe)


def test_the_index_names_the_public_class(saved):
    directory, _ = saved
    index = json.loads((directory / "model_index.json").read_text())
    assert index["vae"] == ["rbln_vae", "RBLNAutoencoderKL"]
    files = {path.name for path in (directory / "vae").iterdir()}
    assert files == {"config.json", "rbln_config.json", "encoder.rbln", "decoder.rbln"}


@pytest.mark.parametrize(
    "imports",
    [
        "import rbln_vae\nfrom diffusers import StableDiffusionPipeline",
        pytest.param(
            "from diffusers import StableDiffusionPipeline\nimport rbln_vae",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import diffusers, rbln_vae\nfrom diffusers import StableDiffusionPipeline",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fresh_process_loads_it_compiled(saved, tmp_path, imports):
    directory, expected = saved
    script = LOAD_AND_RUN.format(imports=imports)
    result = tmp_path / "image.pt"
    subprocess.run([sys.executable, "-c", script, directory, result], check=True)
    assert torch.equal(torch.load(result), expected)


def test_any_pipeline_class_loads_it(saved):
    directory, expected = saved
    pipe = DiffusionPipeline.from_pretrained(directory)
    assert isinstance(pipe.vae, RBLNAutoencoderKL)
    assert torch.equal(generate(pipe), expected)


def test_it_is_loaded_and_exchanged_in_one_call(saved, compiled):
    directory, expected = saved
    pipe = StableDiffusionPipeline.from_pretrained(directory, vae=compiled)
    assert pipe.vae is compiled
    assert torch.equal(generate(pipe), expected)


def test_a_pipeline_of_originals_takes_it_after_loading(vae, compiled, saved, tmp_path):
    original = StableDiffusionPipeline(
        **tiny.stable_diffusion(), vae=vae, requires_safety_checker=False
    )
    original.save_pretrained(tmp_path / "original")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "original")
    pipe.vae = compiled
    pipe.save_pretrained(tmp_path / "exchanged")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "exchanged")
    assert isinstance(again.vae, RBLNAutoencoderKL)
    assert torch.equal(generate(again), saved[1])


def test_the_vae_of_a_saved_pipeline_is_compiled_by_its_subfolder(vae, compiled, tmp_path):
    original = StableDiffusionPipeline(
        **tiny.stable_diffusion(), vae=vae, requires_safety_checker=False
    )
    original.save_pretrained(tmp_path)
    model = RBLNAutoencoderKL.from_pretrained(
        tmp_path, subfolder="vae", export=True, rbln_target="cpu", rbln_dtype="float32"
    )
    latent = torch.randn(1, 4, 4, 4)
    assert torch.equal(model.decode(latent).sample, compiled.decode(latent).sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "flux2-klein",
        "qwen-image",
        "wan",
        "sd-taesd",
        "sd-inpaint-asymmetric",
        "hunyuan-image",
        "kandinsky",
    ],
)
def test_a_pipeline_of_any_family_is_saved_and_loaded(name, tmp_path):
    case = tiny.PIPELINES[name]
    parts = case.parts()
    vae = RBLNAutoencoder.from_model(
        tiny_vaes.make(case.vae, **case.options), rbln_target="cpu", rbln_dtype="float32"
    )
    pipe = case.build(vae, parts)
    pipe.save_pretrained(tmp_path)
    absent = {part: None for part, found in parts.items() if found is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded) is type(pipe)
    loaded_vae = getattr(loaded, case.vae_name)
    assert type(loaded_vae) is type(vae)
    before, after = (
        case.build(each, parts)(
            **{**case.prompt, **case.call, **OPTIONS},
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
        )[0]
        for each in (vae, loaded_vae)
    )
    assert torch.equal(before, after)


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    script = "import rbln_vae, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
