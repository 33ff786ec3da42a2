"""A model is opened by its name in one way, whatever the name stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from vaes import default_compiled, default_vae, make_vae, noise

from rbln_vae import demo_model
from rbln_vae.config import CONFIG_NAME
from rbln_vae.models.opening import open_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model: compiled, of diffusers, and each of them in a pipeline."""
    root = tmp_path_factory.mktemp("models")
    index = json.dumps(
        {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    )
    for name, model in (("compiled", default_compiled()), ("original", default_vae())):
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"pipeline of {name}" / "vae")
        (root / f"pipeline of {name}" / "model_index.json").write_text(index, encoding="utf-8")
    return root


@pytest.mark.parametrize("kind", ["compiled", "original"])
@pytest.mark.parametrize("within", ["{}", "pipeline of {}"])
def test_a_name_may_be_of_a_model_or_of_a_pipeline(models: Path, kind: str, within: str) -> None:
    vae = open_model(models / within.format(kind), {"dtype": "float32", "target": "cpu"})
    latent = noise(1, 4, 6, 5)
    assert torch.equal(vae.decode(latent).sample, default_compiled().decode(latent).sample)


def test_a_model_may_be_anywhere_within(models: Path) -> None:
    vae = open_model(models, {}, subfolder="compiled")
    assert vae.rbln_config.vae_scale_factor == 2


def test_the_kind_of_a_single_file_tells_the_scaling(tmp_path: Path) -> None:
    make_vae(block_out_channels=(32, 64), norm_num_groups=32).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    for kind, factor in (("sdxl", 0.13025), (None, None)):
        vae = open_model(file, {"create_runtimes": False}, kind=kind)
        assert vae.latent_scaling.scaling_factor == factor


def test_no_name_is_the_model_that_comes_with_the_package() -> None:
    vae = open_model(None, {"create_runtimes": False})
    assert vae.config["latent_channels"] == 16
    assert not (demo_model() / CONFIG_NAME).exists()  # compiled in memory


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(OSError, match="/there/is/no/such"):
        open_model("/there/is/no/such/model", {})
