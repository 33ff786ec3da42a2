"""`compile_pipeline` replaces the VAE of any pipeline; what is wrong with one is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import tiny
import tiny_vaes
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import rbln_vae
from rbln_vae import (
    RBLNAutoencoderKL,
    RBLNAutoencoderKLConfig,
    RBLNCompileError,
    RBLNModel,
    RBLNTargetUnavailableError,
    compile_pipeline,
)
from rbln_vae.metrics import psnr
from rbln_vae.targets.base import get_target

CPU = {"target": "cpu", "dtype": "float32"}
OF_EACH_FAMILY = (
    "sd-img2img",
    "flux2",
    "qwen-image-img2img",
    "qwen-image-2.1",
    "wan",
    "sd-taesd",
    "sd-inpaint-asymmetric",
    "hunyuan-image",
    "kandinsky-img2img",
)


def run(pipe: DiffusionPipeline, case: tiny.Pipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 1, "output_type": "pt", **case.prompt, **case.call}
    result: Tensor = pipe(**call, generator=generator, return_dict=False)[0]
    return result


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return tiny.PIPELINES["sd"].build()


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_a_pipeline_of_each_family_compiles_once_and_gives_the_same_images(
    name, monkeypatch, tmp_path
):
    monkeypatch.setenv("RBLN_VAE_CACHE", str(tmp_path))
    case = tiny.PIPELINES[name]
    parts = case.parts()
    pipe = case.build(parts=parts)
    expected = run(case.build(getattr(pipe, case.vae_name), parts), case)
    assert compile_pipeline(pipe, rbln_config=CPU) is pipe
    compiled = getattr(pipe, case.vae_name)
    assert type(compiled).__name__ == f"RBLN{case.vae}"
    found = run(case.build(compiled, parts), case)
    assert psnr(found, expected, 1.0) >= 80

    def fail(*args: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(get_target("cpu"), "compile_module", fail)
    again = compile_pipeline(case.build(parts=parts), rbln_config=CPU)
    assert torch.equal(run(case.build(getattr(again, case.vae_name), parts), case), found)


def test_options_are_those_of_from_model(pipe):
    compile_pipeline(
        pipe, rbln_config=RBLNAutoencoderKLConfig(num_threads=1, **CPU), rbln_uses_encoder=False
    )
    assert pipe.vae.rbln_config.num_threads == 1
    assert list(pipe.vae.compiled_models) == ["decoder"]


@pytest.mark.parametrize(("options", "side"), [({}, 32), ({"rbln_sample_size": 48}, 48)], ids=str)
def test_it_is_tuned_for_the_size_that_the_denoiser_was_trained_on(options, side):
    pipe = tiny.PIPELINES["sd"].build(parts=tiny.stable_diffusion(sample_size=4))
    assert pipe.vae_scale_factor == 8 and pipe.vae.config.sample_size != side
    compile_pipeline(pipe, rbln_config=CPU, **options)
    assert pipe.vae.resolved_config.sample_size == (side, side)


def test_nothing_is_kept_where_told_so(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("RBLN_VAE_CACHE", str(tmp_path))
    compile_pipeline(pipe, cache=False, rbln_config=CPU)
    assert list(tmp_path.iterdir()) == []


def test_the_pipelines_of_a_combined_one_get_it_too():
    case = tiny.PIPELINES["kandinsky"]
    prior = dict.fromkeys(
        ("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor")
    )
    combined = diffusers.KandinskyV22CombinedPipeline(
        **case.parts(),
        movq=tiny_vaes.make(case.vae),
        **{f"prior_{name}": part for name, part in prior.items()},
    )
    compile_pipeline(combined, rbln_config=CPU)
    assert isinstance(combined.movq, RBLNModel)
    assert combined.decoder_pipe.movq is combined.movq


def test_a_compiled_pipeline_is_saved_and_loaded(pipe, tmp_path):
    compile_pipeline(pipe, rbln_config=CPU)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, RBLNAutoencoderKL)
    with pytest.raises(ValueError, match="vae of the pipeline is compiled already"):
        compile_pipeline(loaded)


def test_weights_that_modules_share_are_compiled():
    vae = tiny_vaes.make()
    first, second = vae.decoder.mid_block.resnets
    second.conv1.weight = first.conv1.weight
    case = tiny.PIPELINES["sd"]
    parts = case.parts()
    expected = run(case.build(vae, parts), case)
    pipe = compile_pipeline(case.build(vae, parts), rbln_config=CPU)
    assert psnr(run(pipe, case), expected, 1.0) >= 80


# Devices


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that models are on a device that is not here."""
    monkeypatch.setattr(diffusers.AutoencoderKL, "device", torch.device(device))


def test_a_vae_on_a_gpu_is_compiled_for_it(pipe, monkeypatch):
    on("cuda:1", monkeypatch)
    compile_pipeline(pipe, rbln_dtype="float32", rbln_create_runtimes=False)
    assert pipe.vae.resolved_config.target == "cuda"
    assert pipe.vae.rbln_config.device == "cuda:1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be available")
def test_a_gpu_that_is_not_available_is_an_error(pipe, monkeypatch):
    on("cuda:0", monkeypatch)
    vae = pipe.vae
    with pytest.raises(RBLNTargetUnavailableError, match="'cuda' can't run here"):
        compile_pipeline(pipe, rbln_dtype="float32")
    assert pipe.vae is vae


def test_a_device_without_a_target_is_an_error_unless_a_target_is_named(pipe, monkeypatch):
    on("mps:0", monkeypatch)
    with pytest.raises(ValueError, match="on mps:0, which no target runs on"):
        compile_pipeline(pipe)
    compile_pipeline(pipe, rbln_target="cpu")
    assert pipe.vae.resolved_config.target == "cpu"


# What can't be compiled


def test_weights_on_the_meta_device_are_an_error(pipe):
    pipe.vae.to("meta")
    with pytest.raises(RBLNCompileError, match="on the meta device, which holds no values"):
        compile_pipeline(pipe)


def model_offload(pipe: DiffusionPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: DiffusionPipeline) -> None:
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"), offload_buffers=True)


def group_offload(pipe: DiffusionPipeline) -> None:
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def layerwise_casting(pipe: DiffusionPipeline) -> None:
    pipe.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize(
    "manage", [model_offload, sequential_offload, group_offload, layerwise_casting]
)
def test_weights_that_something_else_moves_are_an_error(manage):
    pipe = tiny.PIPELINES["sd"].build()
    manage(pipe)
    with pytest.raises(RBLNCompileError, match=r"has a hook .* Compile the model first"):
        compile_pipeline(pipe)


@pytest.mark.parametrize("manage", [model_offload, sequential_offload])
def test_removing_the_hooks_helps(manage):
    case = tiny.PIPELINES["sd"]
    pipe = case.build()
    expected = run(pipe, case)
    manage(pipe)
    pipe.remove_all_hooks()
    compile_pipeline(pipe, rbln_config=CPU)
    assert psnr(run(pipe, case), expected, 1.0) >= 80


def test_a_pipeline_without_a_vae_is_an_error_that_lists_its_components(pipe):
    pipe.vae = None
    with pytest.raises(RBLNCompileError, match=r"no autoencoder .* unet: UNet2DConditionModel"):
        compile_pipeline(pipe)


@pytest.mark.parametrize("what", [SimpleNamespace(components={}), tiny_vaes.make(), Path()])
def test_what_is_no_pipeline_is_an_error(what):
    with pytest.raises(TypeError, match="takes a diffusers pipeline, and got"):
        compile_pipeline(what)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float32"}, TypeError),
        ({"rbln_dtyp": "float32"}, ValueError),
        ({"rbln_dtype": "int8"}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_option_leaves_the_pipeline(pipe, options, error):
    vae = pipe.vae
    with pytest.raises(error, match="dtyp"):
        compile_pipeline(pipe, **options)
    assert pipe.vae is vae


def test_it_is_a_public_name():
    assert "compile_pipeline" in rbln_vae.__all__
