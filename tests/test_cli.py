"""What the command line does, says and returns."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_vaes
import torch
from diffusers import AutoencoderKL
from pictures import make_folder
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data
from typer.testing import CliRunner, Result
from vaes import make_vae, make_vq

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKL, _engine
from rbln_vae.cli import app
from rbln_vae.cli.datasets import lines, shown
from rbln_vae.datasets import LatentDataset, Progress
from rbln_vae.images import load_image, to_image, to_tensor
from rbln_vae.models.autoencoder_kl import AutoencoderKLFamily
from rbln_vae.models.family import CLASSES
from rbln_vae.videos import read_video, write_video

FACTOR = 2
"""Pixels per latent cell, in a direction, of the models made here."""


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make_vae(sample_size=32)


@pytest.fixture(scope="module")
def source(vae, tmp_path_factory) -> Path:
    """A model of diffusers."""
    path = tmp_path_factory.mktemp("source") / "tiny-vae"
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compiled(source, tmp_path_factory) -> Path:
    """The same model, compiled by the command."""
    path = tmp_path_factory.mktemp("compiled") / "tiny"
    done(run("compile", source, path, "--dtype", "float32"))
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    """A photograph whose sides are no multiples of anything."""
    path = tmp_path / "photo.png"
    Image.fromarray(data.astronaut()[60:137, 160:291]).save(path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def done(result: Result) -> str:
    """What a command that must go well wrote to stdout."""
    assert result.exit_code == 0, result.stderr
    return result.stdout


def failed(result: Result, code: int) -> str:
    """The one line that a command which must fail wrote to stderr."""
    assert result.exit_code == code, (result.exit_code, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


def row(text: str, name: str) -> list[str]:
    """The cells of the row of a table that begins with a name."""
    (found,) = [line.split() for line in text.splitlines() if line.split()[:1] == [name]]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSES, "Wan 2.2"])
def test_every_class_goes_through_every_command(name, photo, tmp_path) -> None:
    options = tiny_vaes.WAN_2_2 if name == "Wan 2.2" else {}
    vae = tiny_vaes.make("AutoencoderKLWan" if options else name, **options)
    source, compiled = tmp_path / "source", tmp_path / "compiled"
    vae.save_pretrained(source)
    done(run("compile", source, compiled, "--dtype", "float32", "--sample-size", 64))
    assert type(vae).__name__ in done(run("inspect", compiled))
    assert "pixels" in done(run("verify", compiled, source, "--size", 64))
    frames = 14 if name == "AutoencoderKLTemporalDecoder" else 1  # of its clips
    assert f"decoder on {frames}x" in done(run("plan", compiled, "--size", 128))
    assert "Conv2d" in done(run("profile", compiled, "--size", 64))
    done(run("reconstruct", photo, "--model", compiled, "--output", tmp_path))
    done(run("encode", photo, "--model", compiled, "--output", tmp_path))
    latents = load_file(tmp_path / "photo.safetensors")["latents"]
    assert latents.ndim == 4
    done(run("decode", tmp_path / "photo.safetensors", "--model", compiled, "--output", tmp_path))
    shown = Image.open(tmp_path / "photo.decoded.png")
    assert shown.size == Image.open(photo).size
    folder = make_folder(tmp_path / "photographs", 2)
    done(run("encode-dataset", folder, tmp_path / "latents", "--model", compiled, "--size", 64))
    assert len(LatentDataset(tmp_path / "latents")) == 2


# The program


def test_the_module_and_the_program_are_the_same() -> None:
    program = Path(sys.executable).with_name("rbln-vae")
    calls = [[sys.executable, "-m", "rbln_vae"]]
    if program.exists():
        calls.append([str(program)])
    for call in calls:
        shown = subprocess.run([*call, "--version"], capture_output=True, text=True, check=True)
        assert shown.stdout.startswith("rbln-vae 0.")


def test_help_names_every_command_and_loads_no_torch() -> None:
    code = (
        "import sys; from rbln_vae.cli import app\n"
        "try: app(['--help'])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for command in ("compile", "reconstruct", "encode", "decode", "inspect", "verify", "targets"):
        assert command in shown.stdout


def test_help_shows_a_default_of_zero() -> None:
    shown = " ".join(run("encode-dataset", "--help").output.split())
    assert re.search(r"--seed .*?\[default: 0\].*?--latent-dtype", shown)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Missing command"),
        (["rebuild"], "No such command 'rebuild'"),
        (["compile"], "Missing argument"),
        (["reconstruct", "none.png"], "does not exist"),
        (["inspect", "none"], "does not exist"),
        (["compile", "a", "b", "--batch-size", "0"], "--batch-size"),
        (["compile", "a", "b", "--colour"], "--colour"),
        (["compile", "a", "b", "--sample-size", "big"], "such as 512 or 512x768"),
        (["targets", "all"], "unexpected extra argument"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(args, says) -> None:
    assert says in failed(run(*args), 2)


def test_a_wrong_value_of_an_option_is_a_wrong_call(source, tmp_path) -> None:
    said = failed(run("compile", source, tmp_path / "out", "--target", "abacus"), 2)
    assert "abacus" in said
    assert not (tmp_path / "out").exists()


def test_a_failure_is_one_line_and_exit_code_1(tmp_path) -> None:
    said = failed(run("compile", tmp_path / "nothing", tmp_path / "out"), 1)
    assert "nothing" in said


@pytest.mark.parametrize("off", ["", "0"])
def test_debugging_that_is_off_is_a_line(tmp_path, monkeypatch, off) -> None:
    monkeypatch.setenv("RBLN_VAE_DEBUG", off)
    failed(run("compile", tmp_path / "nothing", tmp_path / "out"), 1)


def test_debugging_shows_where_an_error_comes_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RBLN_VAE_DEBUG", "1")
    result = run("compile", tmp_path / "nothing", tmp_path / "out")
    assert result.exit_code != 0
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


# compile


def test_compile_writes_a_model_that_loads(compiled, vae) -> None:
    assert {p.name for p in compiled.iterdir()} == {
        "config.json",
        "rbln_config.json",
        "encoder.rbln",
        "decoder.rbln",
    }
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(z).sample
    found = RBLNAutoencoderKL.from_pretrained(compiled).decode(z).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compile_takes_its_options(source, tmp_path) -> None:
    done(
        run("compile", source, tmp_path / "out", "--decoder-only", "--sample-size", "16x24",
            "--batch-size", 2, "--dtype", "float32", "--target", "reference")
    )  # fmt: skip
    stored = json.loads((tmp_path / "out" / "rbln_config.json").read_text())
    assert stored["sample_size"] == [16, 24]
    assert (stored["batch_size"], stored["target"]) == (2, "reference")
    assert stored["uses_encoder"] is False
    assert not (tmp_path / "out" / "encoder.rbln").exists()


def test_compile_finds_a_model_in_a_subfolder(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    done(run("compile", tmp_path / "pipeline", tmp_path / "out", "--subfolder", "vae"))
    assert (tmp_path / "out" / "decoder.rbln").exists()


def test_compile_finds_the_vae_and_the_size_of_a_pipeline(vae, tmp_path) -> None:
    pipeline = tmp_path / "pipeline"
    vae.save_pretrained(pipeline / "vae")
    index = {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    (pipeline / "unet").mkdir()
    (pipeline / "unet" / "config.json").write_text(json.dumps({"sample_size": 12}))
    done(run("compile", pipeline, tmp_path / "one"))
    assert RBLNAutoencoderKL.from_pretrained(tmp_path / "one").rbln_config.image_size == (24, 24)
    done(run("compile", pipeline, tmp_path / "two", "--sample-size", "16"))
    assert RBLNAutoencoderKL.from_pretrained(tmp_path / "two").rbln_config.image_size == (16, 16)


def test_every_command_finds_the_vae_of_a_pipeline(vae, compiled, photo, tmp_path) -> None:
    pipeline = tmp_path / "pipeline"
    vae.save_pretrained(pipeline / "vae")
    index = {"vae": ["diffusers", "AutoencoderKL"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    model = ["--model", pipeline, "--dtype", "float32", "--target", "cpu"]
    done(run("encode", photo, *model, "-o", tmp_path, "--size", 32))
    latents = next(tmp_path.glob("*.safetensors"))
    done(run("decode", latents, *model, "-o", tmp_path))
    done(run("verify", compiled, pipeline))


def test_compile_names_the_sizes_next_to_a_wrong_one(source, tmp_path) -> None:
    said = failed(run("compile", source, tmp_path / "out", "--sample-size", "33"), 2)
    assert "32" in said
    assert "34" in said


# reconstruct


def test_reconstruct_shows_both_and_measures(compiled, vae, photo, tmp_path) -> None:
    text = done(run("reconstruct", photo, "--model", compiled, "--output", tmp_path / "new"))
    picture = load_image(tmp_path / "new" / "photo.reconstruction.png")
    original = np.asarray(load_image(photo))
    height, width = original.shape[:2]
    shown = np.asarray(picture)
    assert np.array_equal(shown[-height:, :width], original)

    padded = np.pad(original, ((0, 1), (0, 1), (0, 0)), mode="edge")
    with torch.no_grad():
        expected = vae(to_tensor(Image.fromarray(padded))).sample[..., :height, :width]
    difference = shown[-height:, -width:].astype(int) - np.asarray(to_image(expected)).astype(int)
    assert abs(difference).max() <= 1

    error = (expected.clamp(-1, 1) - to_tensor(load_image(photo))).square().mean().item()
    cells = row(text, photo.name)
    assert cells[1] == f"{height}x{width}"
    assert float(cells[2]) == pytest.approx(10 * np.log10(4 / error), abs=0.01)


def test_reconstruct_compiles_a_diffusers_model_in_memory(source, photo, tmp_path) -> None:
    done(run("reconstruct", photo, "--model", source, "--output", tmp_path))
    assert (tmp_path / "photo.reconstruction.png").exists()


@pytest.mark.parametrize(
    ("fit", "size", "shown"),
    [
        ("crop", None, "76x130"),
        ("resize", None, "76x132"),
        ("resize", "16x24", "16x24"),
        ("crop", "16", "16x16"),
        ("pad", "16", "9x16"),
    ],
)
def test_reconstruct_fits_a_picture_as_asked(compiled, photo, tmp_path, fit, size, shown) -> None:
    options = [] if size is None else ["--size", size]
    text = done(run("reconstruct", photo, "-m", compiled, "-o", tmp_path, "--fit", fit, *options))
    assert row(text, photo.name)[1] == shown


def test_reconstruct_takes_the_shipped_model_by_default(photo, tmp_path) -> None:
    text = done(run("reconstruct", photo, "--output", tmp_path, "--dtype", "float32"))
    assert float(row(text, photo.name)[2]) > 15


def test_a_broken_picture_does_not_stop_the_others(compiled, photo, tmp_path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no more")
    result = run("reconstruct", broken, photo, "--model", compiled, "--output", tmp_path)
    assert "broken.jpg" in failed(result, 1)
    assert row(result.stdout, photo.name)
    assert (tmp_path / "photo.reconstruction.png").exists()
    assert not (tmp_path / "broken.reconstruction.png").exists()


def test_two_pictures_never_share_an_output(compiled, photo, tmp_path) -> None:
    other = tmp_path / "photo.jpg"
    load_image(photo).save(other)
    said = failed(run("reconstruct", photo, other, "--model", compiled, "-o", tmp_path), 2)
    assert "would both be written" in said


def test_a_size_that_does_not_fit_the_model_is_a_wrong_call(compiled, photo, tmp_path) -> None:
    said = failed(run("encode", photo, "-m", compiled, "-o", tmp_path, "--size", "33"), 2)
    assert "multiples of 2" in said


def test_a_model_that_is_not_for_pictures_says_so(photo, tmp_path) -> None:
    make_vae(in_channels=2, out_channels=2).save_pretrained(tmp_path / "two")
    said = failed(run("reconstruct", photo, "-m", tmp_path / "two", "-o", tmp_path), 2)
    assert "this model takes 2" in said


def test_reconstruct_needs_an_encoder(source, photo, tmp_path) -> None:
    done(run("compile", source, tmp_path / "half", "--decoder-only"))
    result = run("reconstruct", photo, "-m", tmp_path / "half", "-o", tmp_path)
    assert "encoder" in failed(result, 1)


# A single file


@pytest.fixture(scope="module")
def single_file(tmp_path_factory) -> Path:
    """The weights of a model without its configuration."""
    path = tmp_path_factory.mktemp("file")
    make_vae(block_out_channels=(32, 64), norm_num_groups=32).save_pretrained(path)
    (path / "config.json").unlink()
    return path / "diffusion_pytorch_model.safetensors"


def test_a_single_file_is_compiled_as_the_kind_that_is_named(single_file, tmp_path) -> None:
    done(run("compile", single_file, tmp_path / "out", "--kind", "sdxl", "--dtype", "float32"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scaling_factor"] == 0.13025
    done(run("verify", tmp_path / "out", single_file, "--kind", "sdxl", "--size", 32))
    done(run("verify", tmp_path / "out", single_file, "--size", 32))


def test_a_kind_that_doesnt_fit_is_a_wrong_call(single_file, source, tmp_path) -> None:
    said = failed(run("compile", single_file, tmp_path / "out", "--kind", "flux"), 2)
    assert "Kinds that fit: sd, sdxl" in said
    said = failed(run("compile", source, tmp_path / "out", "--kind", "flux"), 2)
    assert "kind='flux' is for .safetensors files" in said
    assert "qwen-image" in run("compile", "--help").stdout


def test_pictures_go_through_a_single_file_whatever_its_kind(single_file, photo, tmp_path) -> None:
    done(run("encode", photo, "-m", single_file, "-o", tmp_path))
    with safe_open(tmp_path / "photo.safetensors", framework="pt") as stored:
        assert stored.metadata()["scaling_factor"] == "null"
    done(run("encode", photo, "-m", single_file, "-o", tmp_path, "--kind", "sd"))
    with safe_open(tmp_path / "photo.safetensors", framework="pt") as stored:
        assert stored.metadata()["scaling_factor"] == "0.18215"
    latents = tmp_path / "photo.safetensors"
    done(run("decode", latents, "-m", single_file, "-o", tmp_path, "--kind", "sd"))


# encode and decode


def test_encode_writes_the_mean_and_where_it_comes_from(compiled, vae, photo, tmp_path) -> None:
    done(run("encode", photo, "--model", compiled, "--output", tmp_path, "--fit", "resize"))
    path = tmp_path / "photo.safetensors"
    latents = load_file(path)["latents"]
    image = load_image(photo).resize((132, 76), Image.Resampling.LANCZOS)
    with torch.no_grad():
        expected = vae.encode(to_tensor(image)).latent_dist.mode()
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)

    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    assert metadata["model"] == str(compiled)
    assert metadata["drawn"] == "mean"
    assert float(metadata["scaling_factor"]) == vae.config.scaling_factor
    assert json.loads(metadata["fitting"])["original"] == [77, 131]


def test_encode_draws_by_a_seed(compiled, photo, tmp_path) -> None:
    drawn = {}
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        there = tmp_path / name
        done(run("encode", photo, "-m", compiled, "-o", there, "--sample", "--seed", seed))
        drawn[name] = load_file(there / "photo.safetensors")["latents"]
    assert torch.equal(drawn["a"], drawn["b"])
    assert not torch.equal(drawn["a"], drawn["c"])
    assert "--seed" in failed(run("encode", photo, "--sample", "--seed", 2**64), 2)


def test_decode_gives_a_picture_of_the_original_size(compiled, vae, photo, tmp_path) -> None:
    done(run("encode", photo, "-m", compiled, "-o", tmp_path))
    done(run("decode", tmp_path / "photo.safetensors", "-m", compiled, "-o", tmp_path))
    picture = np.asarray(load_image(tmp_path / "photo.decoded.png")).astype(int)
    assert picture.shape == (77, 131, 3)
    with torch.no_grad():
        expected = vae.decode(load_file(tmp_path / "photo.safetensors")["latents"]).sample
    assert abs(picture - np.asarray(to_image(expected))[:77, :131]).max() <= 1


@pytest.mark.parametrize("shape", [(4, 6, 8), (1, 4, 6, 8)])
def test_decode_takes_the_latents_of_others(compiled, tmp_path, shape) -> None:
    save_file({"anything": torch.zeros(shape)}, tmp_path / "z.safetensors")
    done(run("decode", tmp_path / "z.safetensors", "-m", compiled, "-o", tmp_path))
    assert load_image(tmp_path / "z.decoded.png").size == (8 * FACTOR, 6 * FACTOR)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.zeros(4, 4, 4), "b": torch.zeros(1)}, "expected a tensor named 'latents'"),
        ({"latents": torch.zeros(4, 4)}, "expected the latents of one picture"),
        ({"latents": torch.zeros(2, 4, 4, 4)}, "expected the latents of one picture"),
        ({"latents": torch.zeros(1, 5, 4, 4)}, "5"),
    ],
)
def test_decode_says_what_is_wrong_with_latents(compiled, tmp_path, tensors, says) -> None:
    save_file(tensors, tmp_path / "z.safetensors")
    result = run("decode", tmp_path / "z.safetensors", "-m", compiled, "-o", tmp_path)
    said = failed(result, 1)
    assert says in said
    assert "z.safetensors" in said


def test_decode_refuses_what_is_no_safetensors_file(compiled, photo, tmp_path) -> None:
    said = failed(run("decode", photo, "-m", compiled, "-o", tmp_path), 1)
    assert "photo.png is not a safetensors file" in said


# inspect


def test_inspect_tells_what_a_model_is_and_comes_from(compiled, source) -> None:
    text = done(run("inspect", compiled))
    stored = json.loads((compiled / "rbln_config.json").read_text())
    for part in ("encoder", "decoder"):
        cells = row(text, part)
        assert cells[1:3] == [stored["target"], "float32"]
        assert float(cells[3]) == pytest.approx(
            (compiled / f"{part}.rbln").stat().st_size / 1e6, abs=0.006
        )
    assert source.name in text
    assert "sha256" in text


def test_inspect_counts_operations_for_a_size(compiled) -> None:
    def gflop(size: int) -> float:
        return float(row(done(run("inspect", compiled, "--size", size)), "decoder")[-1])

    # Attention grows with the square of the pixels, all else with the pixels.
    assert gflop(512) > 4 * gflop(256) > 0


def test_inspect_prints_the_graph_when_asked(compiled) -> None:
    assert "Conv2d" not in done(run("inspect", compiled))
    text = done(run("inspect", compiled, "--graph"))
    assert "graph encoder" in text
    assert "graph decoder" in text
    assert "Conv2d" in text


def test_inspect_refuses_what_is_not_compiled(source) -> None:
    assert "rbln_config.json" in failed(run("inspect", source), 2)


def test_inspect_names_a_damaged_part(compiled, tmp_path) -> None:
    for path in compiled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "decoder.rbln").read_bytes())
    content[-1] ^= 1
    (tmp_path / "decoder.rbln").write_bytes(content)
    assert "decoder.rbln" in failed(run("inspect", tmp_path), 1)


# verify


def test_verify_accepts_the_model_that_was_compiled(compiled, source) -> None:
    text = done(run("verify", compiled, source))
    for name in ("moments", "pixels"):
        decibels, largest, relative = map(float, row(text, name)[1:])
        assert decibels > 80
        assert largest < 1e-3
        assert 0 <= relative < 1e-4


def test_verify_fails_on_other_weights(compiled, tmp_path) -> None:
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    result = run("verify", compiled, tmp_path / "other")
    assert "differs from" in failed(result, 1)
    assert float(row(result.stdout, "pixels")[3]) > 1e-2


def test_parts_are_compiled_and_verified_in_dtypes_of_their_own(source, photo, tmp_path) -> None:
    text = "encoder=float16,decoder=bfloat16"
    done(run("compile", source, tmp_path / "mixed", "--dtype", text))
    shown = done(run("inspect", tmp_path / "mixed"))
    assert row(shown, "dtype")[1] == text
    assert row(shown, "encoder")[2] == "float16" and row(shown, "decoder")[2] == "bfloat16"
    found = done(run("verify", tmp_path / "mixed", source))
    assert 1e-5 < float(row(found, "moments")[3]) < 0.005 < float(row(found, "pixels")[3]) < 0.03
    done(run("encode", photo, "--model", tmp_path / "mixed", "-o", tmp_path))
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["dtype"] == "float16"


def test_a_model_is_compiled_in_float16(source, photo, tmp_path) -> None:
    done(run("compile", source, tmp_path / "half", "--dtype", "float16"))
    found = done(run("verify", tmp_path / "half", source))
    for name in ("moments", "pixels"):
        assert 1e-5 < float(row(found, name)[3]) < 0.005
    said = failed(run("compile", source, tmp_path / "out", "--dtype", "encoder=half"), 2)
    assert "bfloat16" in said


def test_verify_is_as_strict_as_asked(compiled, source) -> None:
    assert "more than 1e-12 allows" in failed(
        run("verify", compiled, source, "--tolerance", "1e-12"), 1
    )


def test_verify_compares_on_a_picture_and_a_size(compiled, source, photo) -> None:
    done(run("verify", compiled, source, "--image", photo, "--size", "16x24"))


def test_verify_compares_latents_of_a_model_without_a_distribution(tmp_path) -> None:
    """A VQModel quantises latents unless told otherwise, and here neither of the two does."""
    for options in ({}, {"norm_type": "group", "lookup_from_codebook": True}):
        make_vq(**options).save_pretrained(tmp_path / "movq")
        done(run("compile", tmp_path / "movq", tmp_path / "compiled", "--dtype", "float32"))
        compared = run("verify", tmp_path / "compiled", tmp_path / "movq", "--size", "32")
        for name in ("latents", "pixels"):
            assert float(row(done(compared), name)[3]) < 1e-4


def test_verify_of_a_decoder_compares_pixels_alone(source, tmp_path) -> None:
    done(run("compile", source, tmp_path / "half", "--decoder-only", "--dtype", "float32"))
    text = done(run("verify", tmp_path / "half", source))
    assert "pixels" in text
    assert "moments" not in text


# targets


def test_targets_lists_each_and_says_why_not() -> None:
    text = done(run("targets"))
    assert row(text, "reference")[1] == "yes"
    assert row(text, "cpu")[1] == "yes"
    assert row(text, "rbln")
    assert row(text, "cuda")
    assert "processor:" in text
    assert "kernels: generic" in text
    assert "This build" not in text


def test_targets_says_which_kernels_the_build_lacks(monkeypatch) -> None:
    monkeypatch.setattr(_engine, "left_out", lambda: ["abacus"])
    assert "has no kernels for abacus" in " ".join(done(run("targets")).split())


def test_cache_lists_what_is_kept_and_removes_it(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RBLN_VAE_CACHE", str(tmp_path / "cache"))
    assert "0 compiled models in" in done(run("cache"))
    by_part = "encoder=float32,decoder=bfloat16"
    for dtype in ("float32", "bfloat16", by_part):
        done(run("compile", source, tmp_path / dtype, "--dtype", dtype))
    text = done(run("cache"))
    assert "3 compiled models in" in text and "of 10.0 GiB" in text
    found = [line.split() for line in text.splitlines() if line.strip().startswith("tiny-vae")]
    assert [line[1:4] for line in found] == [  # the latest first
        ["AutoencoderKL", "cpu", by_part],
        ["AutoencoderKL", "cpu", "bfloat16"],
        ["AutoencoderKL", "cpu", "float32"],
    ]
    next((tmp_path / "cache").glob("*/key.json")).unlink()
    assert "damaged: " in done(run("cache"))
    assert "3 compiled models removed" in done(run("cache", "--clear"))
    assert "0 compiled models in" in done(run("cache"))
    monkeypatch.setenv("RBLN_VAE_CACHE", "off")
    assert "RBLN_VAE_CACHE is off" in done(run("cache"))
    assert "RBLN_VAE_CACHE is off" in done(run("cache", "--clear"))


def test_profile_shows_every_operation_and_its_share_of_the_limit(compiled, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    text = done(run("profile", compiled, "--size", "64x32", "--trace", trace))
    assert "encoder of 1x3x64x32" in text and "decoder of 1x4x32x16" in text
    rows = [line.split() for line in text.splitlines() if "decoder.conv_in" in line]
    assert rows and rows[0][-2:] == ["Conv2d", "decoder.conv_in"]
    assert "the machine's limit is" in text and " % " in text
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert "Conv2d decoder.conv_in" in names
    trace = tmp_path / "missing" / "trace.json"
    text = failed(run("profile", compiled, "--trace", trace), 1)
    assert "is no directory" in text and "decoder.conv_in" not in text


def test_plan_shows_what_a_size_takes_and_what_less_memory_would_cost(compiled) -> None:
    text = done(run("plan", compiled, "--size", "512x256"))
    assert "encoder on 1x3x512x256" in text and "decoder on 1x4x256x128" in text
    assert text.count("computed again, in strips") == 2
    assert "Conv2d" not in text
    steps = done(run("plan", compiled, "--size", "512x256", "--batch-size", 2, "--steps"))
    assert "decoder on 2x4x256x128" in steps and "Conv2d decoder.conv_in" in steps
    assert "at least" in failed(run("plan", compiled, "--size", 512, "--memory-limit", "1KiB"), 1)


def test_profile_takes_a_compiled_model(source) -> None:
    assert "not a compiled model" in failed(run("profile", source), 2)


# Data sets


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photographs", 7)


def test_a_data_set_is_encoded_and_summed_up(compiled, photographs, tmp_path) -> None:
    out = tmp_path / "out"
    call = ["encode-dataset", photographs, out, "-m", compiled, "--buckets", "32,64", "--aspect"]
    call += ["--bucket-step", 16, "--shard-size", 3, "--flip", "--latent-dtype", "float32"]
    shown = done(run(*call))
    assert row(shown, "samples") == ["samples", "7", "in", "3", "shards"]
    assert row(shown, "rejected") == ["rejected", "0"]
    latents = LatentDataset(out)
    assert len(latents) == 7 and latents[0]["mean_flipped"].dtype == torch.float32
    assert latents.manifest["options"]["sizes"] == [[32, 32], [64, 64]]
    assert row(done(run(*call)), "encoded") == ["encoded", "in", "this", "run", "0"]
    call.remove("--flip")
    assert "options.flip True, not False" in failed(run(*call), 1)


@pytest.mark.slow
def test_the_cache_of_a_trainer_is_written_with_the_lines_of_its_configuration(
    photographs, tmp_path
) -> None:
    tiny_vaes.make("AutoencoderKL", 0).save_pretrained(tmp_path / "vae")
    (photographs / "left.gif").write_bytes(b"not of the trainer")
    call = ["encode-dataset", photographs, photographs, "-m", tmp_path / "vae", "--size", 64]
    call += ["--format", "sd-scripts", "--architecture", "sd", "--flip"]
    planned = run(*call, "--dry-run")
    assert row(done(planned), "samples")[-1] == "7"
    assert "warning: left out: 1 images" in planned.stderr
    assert not (photographs / ".rbln-vae").exists()
    shown = done(run(*call))
    assert row(shown, "samples") == ["samples", "7"]
    for line in ("resolution = 64", "enable_bucket = false", "flip_aug = true"):
        assert line in shown.splitlines() or f"  {line}" in shown.splitlines()
    assert len(list(photographs.rglob("*_sd.npz"))) == 7
    assert row(done(run(*call)), "encoded") == ["encoded", "in", "this", "run", "0"]
    assert "architecture is None" in failed(run(*call[:-3]), 2)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    compiled, photographs, tmp_path
) -> None:
    out = tmp_path / "out"
    for name in ("broken.png", "damaged.png"):
        (photographs / name).write_bytes(b"no")
    shown = done(run("encode-dataset", photographs, out, "-m", compiled, "--size", 32, "--dry-run"))
    # Reasons may be long, and stand below the table.
    numbers, _, reasons = shown.partition("rejected: ")
    assert "samples in the source" in numbers and "of the first images, rejected" in numbers
    assert reasons.startswith("the image is not a picture") and reasons.endswith("(2 times)\n")
    assert row(shown, "time")[1] == "about"
    assert not out.exists()


def test_too_many_rejected_are_exit_code_1_after_the_summary(
    compiled, photographs, tmp_path
) -> None:
    (photographs / "broken.png").write_bytes(b"no")
    call = ["encode-dataset", photographs, tmp_path / "out", "-m", compiled, "--size", 32]
    result = run(*call)
    assert "rejected: 1, more than max_rejected, 0" in failed(result, 1)
    assert row(result.stdout, "samples")[1] == "7"
    done(run(*call, "--max-rejected", 1))


def test_a_data_set_is_encoded_by_the_model_of_a_pipeline(vae, photographs, tmp_path) -> None:
    vae.save_pretrained(tmp_path / "pipeline" / "part")
    call = ["encode-dataset", photographs, tmp_path / "out", "-m", tmp_path / "pipeline"]
    done(run(*call, "--subfolder", "part", "--size", 32))
    assert len(LatentDataset(tmp_path / "out")) == 7
    done(run(*call, "--subfolder", "part", "--size", 32, "--dry-run"))


def test_a_data_set_is_scaled_by_the_kind_of_a_single_file(
    single_file, photographs, tmp_path
) -> None:
    call = ["encode-dataset", photographs, tmp_path / "out", "-m", single_file, "--size", 32]
    said = failed(run(*call, "--scale"), 2)
    assert "scaling of the model's latents isn't known" in said
    done(run(*call, "--scale", "--model-kind", "sd", "--kind", "folder"))
    assert LatentDataset(tmp_path / "out").manifest["model"]["scaling_factor"] == 0.18215
    done(run(*call, "--scale", "--model-kind", "sd", "--dry-run"))


def test_an_output_elsewhere_is_refused(compiled, photographs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["encode-dataset", photographs, "s3://bucket/latents", "-m", compiled, "--size", 32]
    assert "is an address" in failed(run(*call), 2)
    assert not (tmp_path / "s3:").exists()


def test_size_and_buckets_are_not_given_together(compiled, photographs, tmp_path) -> None:
    call = ["encode-dataset", photographs, tmp_path / "out", "-m", compiled]
    assert "found both" in failed(run(*call, "--size", 32, "--buckets", "32,64"), 2)
    assert "multiples of 2" in failed(run(*call, "--size", 33), 2)
    assert "there is no" in failed(run("encode-dataset", "none", tmp_path / "out"), 1)


class AfterTenSeconds(Progress):
    """How far a run is at one moment, whatever the clock says."""

    seconds = 10.0


@pytest.fixture
def halfway() -> Progress:
    return AfterTenSeconds(encoded=30, resumed=10, waiting=1.0, total=100)


def test_how_far_a_job_is_stands_in_a_line_now_and_then(halfway) -> None:
    shown: list[str] = []
    report = lines(shown.append, seconds=0)
    report(halfway)
    assert shown == ["40 of 100, 3.00 images/s, 20.0 s left, waiting 10%"]
    report(AfterTenSeconds(encoded=30))
    assert shown[1] == "30, 3.00 images/s, waiting 0%"
    lines(shown.append, seconds=math.inf)(Progress())
    assert len(shown) == 2


@pytest.mark.parametrize(("width", "bar"), [(120, 20), (80, 5), (60, 3), (45, 0)])
def test_a_terminal_of_any_width_shows_a_bar_and_what_is_left(halfway, width, bar) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, color_system=None)
    with shown(console) as report:
        assert "loading" in last_line(written)
        report(halfway)
    line = last_line(written)  # a bar draws once more when it ends
    assert "40 of 100, 3.00 images/s, 20.0 s left" in line
    assert "waiting" in line or width < 60
    assert line.count("━") >= bar and len(line) <= width


def last_line(written: io.StringIO) -> str:
    """The line that a bar has drawn last, as a terminal shows it."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    return text.replace("\n", "\r").strip("\r ").rpartition("\r")[2].rstrip()


# Ctrl-C


@pytest.mark.parametrize(
    "command",
    [
        ("compile", "SOURCE", "OUT"),
        ("encode", "PHOTO", "--model", "COMPILED"),
        ("reconstruct", "PHOTO", "--model", "COMPILED"),
        ("verify", "COMPILED", "SOURCE"),
        ("profile", "COMPILED"),
        ("plan", "COMPILED"),
        ("encode-dataset", "FOLDER", "OUT", "--model", "COMPILED"),
        ("serve", "COMPILED"),
    ],
    ids=lambda command: command[0],
)
def test_an_interrupted_command_says_so_in_one_line(
    command, source, compiled, photo, tmp_path, monkeypatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # Where each of them is when it is interrupted.
    for cls, name in (
        (RBLNAutoencoderKL, "_run"),
        (RBLNAutoencoderKL, "describe"),
        (AutoencoderKLFamily, "module"),
    ):
        monkeypatch.setattr(cls, name, interrupt)
    monkeypatch.setattr("uvicorn.Server.run", interrupt)
    folder = tmp_path / "folder"
    make_folder(folder, 3)
    places = {
        "SOURCE": source,
        "COMPILED": compiled,
        "PHOTO": photo,
        "FOLDER": folder,
        "OUT": tmp_path / "out",
    }
    result = run(*(places.get(word, word) for word in command))
    assert result.exit_code == 130
    assert [line for line in result.stderr.splitlines() if not line.startswith("serving")] == [
        "interrupted"
    ]
    assert not (tmp_path / "out" / "rbln_config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads times of Linux")
def test_ctrl_c_ends_a_real_command(compiled, tmp_path):
    save_file({"latents": torch.randn(1, 4, 1024, 1024)}, tmp_path / "large.safetensors")
    command = ["decode", str(tmp_path / "large.safetensors"), "--model", str(compiled)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rbln_vae", *command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Whoever runs the tests in the background may have had Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Attention over a million pixels takes many minutes; so much time shows that it has begun.
    while process.poll() is None and _seconds_of_processor(process.pid) < 15:
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.safetensors"]


def _seconds_of_processor(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Videos


@pytest.fixture(scope="module")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("video") / "wan"
    vae = RBLNAutoencoder.from_model(
        tiny_vaes.make("AutoencoderKLWan"), rbln_target="cpu", rbln_dtype="float32"
    )
    vae.save_pretrained(directory)
    return directory


def test_a_clip_is_encoded_and_decoded_again(video_model: Path, tmp_path: Path) -> None:
    pictures = [torch.full((32, 48, 3), 25 * n, dtype=torch.uint8) for n in range(9)]
    write_video(tmp_path / "clip.mp4", pictures, fps=8)
    done(run("encode", tmp_path / "clip.mp4", "-m", video_model, "-o", tmp_path))
    latents = load_file(tmp_path / "clip.safetensors")["latents"]
    vae = RBLNAutoencoder.from_pretrained(video_model)
    frames = torch.stack(list(read_video(tmp_path / "clip.mp4")))[None]
    assert torch.equal(latents, vae.encode(frames).latent_dist.mode())

    said = done(
        run(
            "decode",
            tmp_path / "clip.safetensors",
            tmp_path / "a" / "out.mp4",
            "-m",
            video_model,
            "--fps",
            "8",
        )
    )
    assert "9 frames at 8 per second" in said
    assert len(list(read_video(tmp_path / "a" / "out.mp4"))) == 9
    done(
        run("decode", tmp_path / "clip.safetensors", tmp_path / "b" / "%02d.png", "-m", video_model)
    )
    expected = vae.decode_images(latents)[0]
    for number, picture in enumerate(expected):
        shown = Image.open(tmp_path / "b" / f"{number:02d}.png")
        assert shown.tobytes() == picture.numpy().tobytes()


def test_a_model_with_opacity_takes_a_clip_as_opaque_and_gives_pictures_with_it(
    tmp_path: Path,
) -> None:
    layered = tiny_vaes.make("AutoencoderKLQwenImage", input_channels=4)
    vae = RBLNAutoencoder.from_model(layered, rbln_target="cpu", rbln_dtype="float32")
    model, clip = tmp_path / "model", tmp_path / "clip.mp4"
    vae.save_pretrained(model)
    write_video(clip, [torch.full((16, 16, 3), 25 * n).byte() for n in range(5)])
    done(run("encode", clip, "-m", model, "-o", tmp_path))
    frames = torch.stack(list(read_video(clip)))[None]
    opaque = torch.cat([frames, torch.full_like(frames[..., :1], 255)], -1)
    latents = load_file(tmp_path / "clip.safetensors")["latents"]
    assert torch.equal(latents, vae.encode(opaque).latent_dist.mode())
    done(run("decode", tmp_path / "clip.safetensors", tmp_path / "%d.png", "-m", model))
    for number, picture in enumerate(vae.decode_images(latents)[0]):
        shown = Image.open(tmp_path / f"{number}.png")
        assert (shown.mode, shown.tobytes()) == ("RGBA", picture.numpy().tobytes())


def test_wrong_calls_about_videos_say_what_is_wrong(
    video_model: Path, compiled: Path, photo: Path, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"no video")
    assert "can't be read as a video" in failed(run("encode", clip, "-m", video_model), 1)
    assert "without pictures" in failed(run("encode", clip, photo, "-m", video_model), 2)
    web = tmp_path / "clip.webm"
    web.write_bytes(b"no video")
    assert "can't be read as a video" in failed(run("encode", web, "-m", video_model), 1)
    assert "does not exist" in failed(run("decode", tmp_path / "none", clip, "-m", video_model), 2)
    save_file({"latents": torch.zeros(1, 16, 2, 2, 2)}, tmp_path / "z.safetensors")
    said = failed(run("decode", tmp_path / "z.safetensors", "-m", video_model), 1)
    assert "name what to write" in said
    said = failed(run("decode", tmp_path / "z.safetensors", clip, "-m", compiled), 2)
    assert "runs images" in said
    said = failed(run("decode", tmp_path / "z.safetensors", clip, "-m", video_model, "-o", "a"), 2)
    assert "Leave --output out" in said
    save_file({"latents": torch.full((1, 16, 2, 2, 2), torch.nan)}, tmp_path / "nan.safetensors")
    said = failed(run("decode", tmp_path / "nan.safetensors", clip, "-m", video_model), 2)
    assert "frame 0 holds values that aren't finite" in said
    assert clip.read_bytes() == b"no video"


def test_plan_shows_what_a_video_takes(video_model: Path, compiled: Path) -> None:
    said = done(run("plan", video_model, "--size", "64", "--frames", "81"))
    assert "decoder on 21 frames of 1x16x8x8" in said and "4 of 81 frames" in said
    assert "for any number of frames" in said and "for state" in said
    assert "leave --frames out" in failed(run("plan", compiled, "--frames", "5"), 2)
