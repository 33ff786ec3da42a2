"""Models are found, compiled, kept and loaded again; what is wrong with one is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from hub import Hub, fill_cache, read_files, serve_hub
from safetensors.torch import save_file
from vaes import (
    assert_same_model,
    compile_vae,
    default_compiled,
    default_vae,
    make_vae,
    noise,
    pixels,
    save_vae,
)

from rbln_vae import (
    RBLNArtifactError,
    RBLNAutoencoderKL,
    RBLNAutoencoderKLConfig,
    RBLNCompileError,
    RBLNModelConfig,
)
from rbln_vae.config import DTYPES
from rbln_vae.targets.cpu.kernels import best_dtype
from rbln_vae.units import format_seconds

CPU = {"target": "cpu", "dtype": "float32"}
FILES = {"config.json", "rbln_config.json", "encoder.rbln", "decoder.rbln"}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A diffusers directory of `default_vae`; not to be written to."""
    return save_vae(default_vae(), tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A compiled directory of `default_vae`; not to be written to."""
    directory = tmp_path_factory.mktemp("models") / "compiled"
    default_compiled().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def other() -> RBLNAutoencoderKL:
    """Another model of the same shapes."""
    return compile_vae(make_vae(seed=1))


@pytest.fixture
def broken(compiled, tmp_path) -> Path:
    """A copy of the compiled directory, to be damaged."""
    return Path(shutil.copytree(compiled, tmp_path / "broken"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    with serve_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def load(model_id, export=False, **options) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_pretrained(model_id, export=export, **options)


class Here(os.PathLike):
    """A path that is neither a `str` nor a `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


# From a directory


@pytest.mark.parametrize("kind", [str, Path, Here])
def test_a_diffusers_directory_is_compiled(original, kind):
    assert_same_model(load(kind(original), export=True, rbln_config=CPU), default_vae())


@pytest.mark.parametrize("kind", [str, Path, Here])
def test_a_compiled_directory_is_loaded(compiled, kind):
    assert_same_model(load(kind(compiled)), default_vae())


def test_a_subfolder_of_either_kind(tmp_path, original, compiled):
    shutil.copytree(original, tmp_path / "pipeline" / "vae")
    shutil.copytree(compiled, tmp_path / "pipeline" / "compiled")
    pipeline = tmp_path / "pipeline"
    assert_same_model(load(pipeline, True, subfolder="vae", rbln_config=CPU), default_vae())
    assert_same_model(load(pipeline, subfolder="compiled"), default_vae())
    with pytest.raises(OSError, match=r"no directory .*unet"):
        load(pipeline, subfolder="unet")


def test_what_the_loader_of_diffusers_takes_reaches_it(original):
    model = load(original, True, torch_dtype=torch.bfloat16, rbln_config=CPU)
    assert_same_model(model, make_vae().to(torch.bfloat16).float())


def test_a_loaded_model_is_that_which_was_saved(compiled):
    loaded, saved = load(compiled), default_compiled()
    assert loaded.rbln_config == saved.rbln_config
    assert loaded.rbln_config.is_frozen()
    z = noise(1, 4, 8, 8)
    assert torch.equal(pixels(loaded, z), pixels(saved, z))
    for name in ("scaling_factor", "block_out_channels", "latent_channels", "force_upcast"):
        ours, theirs = loaded.config[name], default_vae().config[name]
        assert ours == (list(theirs) if isinstance(theirs, tuple) else theirs)


def test_a_name_of_nothing_is_an_error(tmp_path):
    for name in (tmp_path / "none", "/no/such/model", "./none"):
        for export in (True, False, None):
            with pytest.raises(OSError, match=rf"There is no directory {name}"):
                load(name, export)


@pytest.mark.parametrize("export", [True, None])
def test_a_directory_without_a_model_is_an_error(tmp_path, export):
    with pytest.raises(OSError, match=r"config\.json"):
        load(tmp_path, export)


# export


@pytest.mark.parametrize("export", [True, None])
def test_an_uncompiled_model_is_compiled_if_export_allows(original, export):
    assert load(original, export, rbln_config=CPU).rbln_config.target == "cpu"


def test_an_uncompiled_model_without_export_says_what_to_pass(original):
    for arguments in ((), (False,)):
        with pytest.raises(ValueError, match=r"not a compiled model.*export=True"):
            RBLNAutoencoderKL.from_pretrained(original, *arguments)


@pytest.mark.parametrize("export", [False, None])
def test_a_compiled_model_is_loaded_if_export_allows(compiled, export):
    assert load(compiled, export).rbln_config.target == "cpu"


def test_a_compiled_model_with_export_says_what_to_pass(compiled):
    with pytest.raises(ValueError, match=r"compiled already.*Leave export out"):
        load(compiled, export=True)


# Options


@pytest.mark.parametrize("kind", [dict, RBLNAutoencoderKLConfig])
def test_rbln_config_is_a_dict_or_an_instance(original, kind):
    config = kind(**CPU, batch_size=2, sample_size=32)
    model = load(original, True, rbln_config=config)
    assert (model.rbln_config.batch_size, model.rbln_config.image_size) == (2, (32, 32))
    model = RBLNAutoencoderKL.from_model(default_vae(), rbln_config=config)
    assert (model.rbln_config.batch_size, model.rbln_config.image_size) == (2, (32, 32))


@pytest.mark.parametrize("kind", [dict, RBLNAutoencoderKLConfig])
def test_rbln_arguments_win_over_rbln_config(original, kind):
    config = kind(**CPU, batch_size=2, timeout=5, uses_encoder=False)
    for model in (
        load(original, True, rbln_config=config, rbln_batch_size=3, rbln_timeout=7),
        RBLNAutoencoderKL.from_model(
            default_vae(), rbln_config=config, rbln_batch_size=3, rbln_timeout=7
        ),
    ):
        found = model.rbln_config
        assert (found.batch_size, found.timeout, found.uses_encoder) == (3, 7, False)


@pytest.mark.parametrize("kind", [dict, RBLNAutoencoderKLConfig])
def test_rbln_arguments_win_by_their_other_name_too(kind):
    with pytest.raises(ValueError, match="num_devices=4 is for target='rbln'"):
        RBLNAutoencoderKL.from_model(
            default_vae(), rbln_config=kind(**CPU, num_devices=2), rbln_tensor_parallel_size=4
        )


def test_the_rbln_config_that_is_given_is_not_changed():
    config = RBLNAutoencoderKLConfig(target="cpu")
    given = {"target": "cpu"}
    RBLNAutoencoderKL.from_model(default_vae(), rbln_config=config, rbln_batch_size=2)
    RBLNAutoencoderKL.from_model(default_vae(), rbln_config=given, rbln_batch_size=2)
    assert config == RBLNAutoencoderKLConfig(target="cpu")
    assert not config.is_frozen()
    assert given == {"target": "cpu"}


def test_the_configuration_of_a_compiled_model_compiles_another():
    vae = make_vae(seed=1)
    model = RBLNAutoencoderKL.from_model(vae, rbln_config=default_compiled().rbln_config)
    assert model.rbln_config == default_compiled().rbln_config
    assert_same_model(model, vae)


@pytest.mark.parametrize("config", [5, "cpu", [("target", "cpu")], RBLNModelConfig()], ids=repr)
def test_rbln_config_of_another_type_is_an_error(original, config):
    with pytest.raises(TypeError, match="must be a dict or a RBLNAutoencoderKLConfig"):
        load(original, True, rbln_config=config)


def test_an_unknown_option_suggests_the_nearest(original, compiled):
    for directory, export in ((original, True), (compiled, False)):
        with pytest.raises(ValueError, match=r"'batchsize' is no option.*'batch_size'"):
            load(directory, export, rbln_batchsize=2)
        with pytest.raises(ValueError, match=r"'batchsize' is no option.*'batch_size'"):
            load(directory, export, rbln_config={"batchsize": 2})


def test_an_unknown_argument_of_the_loader_suggests_the_nearest(original, compiled):
    for directory, export in ((original, True), (compiled, False)):
        with pytest.raises(TypeError, match=r"'sub_folder' is no argument.*'subfolder'"):
            load(directory, export, sub_folder="vae")
    with pytest.raises(TypeError, match=r"'batch_size' is no argument of .*from_model"):
        RBLNAutoencoderKL.from_model(default_vae(), batch_size=2)


def test_the_loader_may_change_the_configuration_as_that_of_diffusers(original):
    assert load(original, True, scaling_factor=0.5).config.scaling_factor == 0.5


def test_what_only_diffusers_needs_is_ignored_by_a_compiled_model(compiled):
    options = {
        "torch_dtype": torch.float16,
        "dtype": torch.float16,
        "use_safetensors": True,
        "token": None,
    }
    assert_same_model(load(compiled, **options), default_vae())


def test_options_of_the_run_are_given_while_loading(compiled):
    model = load(compiled, rbln_timeout=5, rbln_config={"num_threads": 1, "device": "cpu"})
    found = model.rbln_config
    assert (found.timeout, found.num_threads, found.device) == (5, 1, "cpu")
    assert load(compiled).rbln_config.timeout is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 2),
        ("sample_size", 32),
        ("uses_encoder", False),
        ("in_channels", 4),
        ("latent_channels", 16),
        ("vae_scale_factor", 8),
        ("dtype", "bfloat16"),
        ("target", "reference"),
        ("num_devices", 2),
        ("npu", "RBLN-CA22"),
    ],
)
def test_what_was_compiled_in_can_not_be_changed_while_loading(compiled, name, value):
    for options in (
        {f"rbln_{name}": value},
        {"rbln_config": {name: value}},
        {"rbln_config": RBLNAutoencoderKLConfig(**{name: value})},
    ):
        with pytest.raises(ValueError, match=f"{name}=.*was compiled with {name}=.*export=True"):
            load(compiled, **options)


def test_parts_are_compiled_in_dtypes_of_their_own_and_loaded_again(tmp_path):
    vae, x = default_vae(), noise(1, 3, 16, 16)
    wide, narrow = (compile_vae(vae, dtype=dtype) for dtype in ("float32", "float16"))
    dtype = {"encoder": "float32", "decoder": "float16"}
    mixed = compile_vae(vae, dtype=dtype)
    mixed.save_pretrained(tmp_path)
    for model in (
        mixed,
        load(tmp_path),
        load(tmp_path, rbln_dtype=dtype),
        load(tmp_path, rbln_dtype={"decoder": "float16"}),
    ):
        assert model.rbln_config.dtype == model.resolved_config.dtype == dtype
        assert {name: part.dtype for name, part in model.compiled_models.items()} == dtype
        z = model.encode(x).latent_dist.mode()
        assert torch.equal(z, wide.encode(x).latent_dist.mode())
        assert torch.equal(model.decode(z).sample, narrow.decode(z).sample)
    for other in ("float16", "float32", {"decoder": "float32"}, {"conditioned_decoder": "float16"}):
        with pytest.raises(ValueError, match=r"dtype=.*was compiled with dtype=.*export=True"):
            load(tmp_path, rbln_dtype=other)


def test_a_part_whose_dtype_is_left_open_has_what_is_best_on_the_target():
    best = best_dtype()
    for other in DTYPES:
        config = compile_vae(default_vae(), dtype={"encoder": other}).rbln_config
        parts = {"encoder": other, "decoder": best}
        assert config.dtype == (other if other == best else parts)


def test_a_dtype_of_a_part_that_is_not_compiled_is_an_error():
    with pytest.raises(ValueError, match=r"'encodr' is no compiled part in dtype.*'encoder'"):
        compile_vae(default_vae(), dtype={"encodr": "float32"})
    with pytest.raises(ValueError, match="'encoder' is no compiled part in dtype"):
        compile_vae(default_vae(), dtype={"encoder": "float32"}, uses_encoder=False)


def test_one_dtype_of_every_part_may_be_said_part_by_part(compiled):
    for dtype in ({"encoder": "float32", "decoder": "float32"}, {"decoder": "float32"}):
        assert load(compiled, rbln_dtype=dtype).rbln_config.dtype == "float32"


def test_what_was_compiled_in_may_be_said_again(compiled):
    options = {"sample_size": 16, "in_channels": 3, "dtype": torch.float32, "target": "cpu"}
    assert load(compiled, rbln_config=options).rbln_config.image_size == (16, 16)


# From a loaded model


@pytest.mark.parametrize("model", [AutoencoderTiny(), torch.nn.Conv2d(3, 3, 3), None, "vae"])
def test_a_model_of_another_class_is_an_error(model):
    with pytest.raises(TypeError, match=f"compiles AutoencoderKL.* {type(model).__name__}"):
        RBLNAutoencoderKL.from_model(model)


def test_options_of_from_model_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        RBLNAutoencoderKL.from_model(default_vae(), {"target": "cpu"})


# From a single file


def test_a_single_file_without_export_says_what_to_pass(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="export=True"):
        load(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("export", [True, None])
def test_a_missing_single_file_is_an_error(tmp_path, original, export):
    with pytest.raises(OSError, match=r"none\.safetensors"):
        load(tmp_path / "none.safetensors", export, config=str(original))


# No code is ever loaded


@pytest.mark.parametrize("name", ["vae.bin", "vae.ckpt", "vae.pt", "vae.pth", "vae.pkl"])
@pytest.mark.parametrize("export", [True, False, None])
def test_a_pickled_checkpoint_is_refused(tmp_path, name, export):
    torch.save(default_vae().state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"not a \.safetensors file.*can hold code"):
        load(tmp_path / name, export)


def test_pickled_weights_in_a_directory_are_refused(tmp_path):
    default_vae().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path, True)
    for value in (False, None):
        with pytest.raises(ValueError, match="use_safetensors must be True"):
            load(tmp_path, True, use_safetensors=value)


# Wrong models


def test_a_diffusers_directory_of_another_class_is_an_error(tmp_path):
    AutoencoderTiny(encoder_block_out_channels=(4, 4, 4, 4)).save_pretrained(tmp_path)
    with pytest.raises(RBLNCompileError, match=r"holds AutoencoderTiny.*compiles AutoencoderKL"):
        load(tmp_path, True)


def test_a_compiled_model_of_another_class_is_an_error(broken):
    config = broken / "rbln_config.json"
    config.write_text(config.read_text().replace("RBLNAutoencoderKLConfig", "RBLNFooConfig"))
    with pytest.raises(RBLNArtifactError, match="one of RBLNFooConfig, not of RBLNAutoencoderKL"):
        load(broken)


def test_the_file_of_one_part_names_the_directory_to_pass(compiled):
    with pytest.raises(ValueError, match=f"one part of a model.*{compiled}"):
        load(compiled / "decoder.rbln")


@pytest.mark.parametrize("part", ["encoder.rbln", "decoder.rbln"])
def test_a_missing_part_is_named(broken, part):
    (broken / part).unlink()
    with pytest.raises(RBLNArtifactError, match=f"{part}.*incomplete"):
        load(broken)


@pytest.mark.parametrize("export", [True, False, None])
def test_parts_without_their_configuration_are_incomplete(broken, export):
    (broken / "rbln_config.json").unlink()
    with pytest.raises(RBLNArtifactError, match=r"decoder\.rbln.*no rbln_config\.json"):
        load(broken, export)


def test_swapped_parts_are_found(broken):
    (broken / "encoder.rbln").rename(broken / "x")
    (broken / "decoder.rbln").rename(broken / "encoder.rbln")
    (broken / "x").rename(broken / "decoder.rbln")
    with pytest.raises(RBLNArtifactError, match=r"doesn't belong .* it holds the (en|de)coder"):
        load(broken)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_of_another_model_is_found(broken, other, part):
    other.compiled_models[part].save(broken / f"{part}.rbln")
    with pytest.raises(RBLNArtifactError, match="doesn't belong to the files beside it"):
        load(broken)


def test_a_part_for_another_target_is_found(broken):
    model = compile_vae(default_vae(), target="reference")
    model.compiled_models["decoder"].save(broken / "decoder.rbln")
    with pytest.raises(RBLNArtifactError, match=r"compiled for the target 'reference'.*'cpu'"):
        load(broken)


def test_a_part_in_another_dtype_is_found(broken):
    compile_vae(default_vae(), dtype="bfloat16").save_pretrained(broken / "bfloat16")
    for part in ("encoder.rbln", "decoder.rbln"):
        shutil.copy(broken / "bfloat16" / part, broken / part)
    with pytest.raises(RBLNArtifactError, match="bfloat16"):
        load(broken)


@pytest.mark.parametrize("part", ["encoder.rbln", "decoder.rbln"])
def test_a_damaged_part_is_found(broken, part):
    content = bytearray((broken / part).read_bytes())
    content[-1] ^= 1
    (broken / part).write_bytes(content)
    with pytest.raises(RBLNArtifactError, match=f"{part} is damaged"):
        load(broken)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, "There is no .*config.json"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "configuration of None"),
        (b"{}", "configuration of None"),
        ({"_class_name": "AutoencoderTiny"}, "configuration of 'AutoencoderTiny'"),
        ({"latent_channels": 8}, "latent_channels"),
        ({"latent_channels": None}, "latent_channels"),
        ({"in_channels": "three"}, "in_channels"),
        ({"block_out_channels": [4, 4, 4]}, "vae_scale_factor"),
        ({"block_out_channels": None}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
    ],
    ids=str,
)
def test_the_configuration_of_the_original_must_be_whole_and_fit(broken, change, expected):
    file = broken / "config.json"
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RBLNArtifactError, match=expected):
        load(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"target": None},
        {"target": "tpu"},
        {"dtype": "int8"},
        {"dtype": None},
        {"sample_size": [17, 16]},
        {"sample_size": None},
        {"latent_channels": 8},
        {"in_channels": None},
        {"batch_size": 0},
        {"from_the_future": 1},
    ],
    ids=str,
)
def test_the_configuration_must_be_whole_and_fit(broken, change):
    file = broken / "rbln_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if set(change) & {"sample_size", "in_channels"} and None in change.values():
        assert_same_model(load(broken), default_vae())  # config.json says it too
        return
    with pytest.raises(RBLNArtifactError):
        load(broken)


# Saving


@pytest.mark.parametrize("kind", [str, Path, Here])
def test_save_pretrained_makes_the_directory(tmp_path, kind):
    directory = tmp_path / "a" / "b"
    assert default_compiled().save_pretrained(kind(directory)) is None
    assert {file.name for file in directory.iterdir()} == FILES
    assert_same_model(load(directory), default_vae())


def test_a_decoder_alone_is_saved_and_loaded(tmp_path):
    compile_vae(default_vae(), uses_encoder=False).save_pretrained(tmp_path / "m")
    assert {f.name for f in (tmp_path / "m").iterdir()} == FILES - {"encoder.rbln"}
    assert_same_model(load(tmp_path / "m"), default_vae())


def test_the_saved_config_is_one_that_diffusers_reads(compiled):
    assert AutoencoderKL.load_config(compiled)["_class_name"] == "AutoencoderKL"
    rebuilt = AutoencoderKL.from_config(AutoencoderKL.load_config(compiled))
    assert rebuilt.config.block_out_channels == [8, 16]


def test_saving_is_reproducible(compiled, tmp_path):
    default_compiled().save_pretrained(tmp_path / "again")
    assert read_files(tmp_path / "again") == read_files(compiled)


def test_saving_onto_a_model_replaces_all_of_it(tmp_path, other):
    directory = tmp_path / "model"
    other.save_pretrained(directory)
    (directory / "README.md").write_text("mine")
    compile_vae(default_vae(), uses_encoder=False).save_pretrained(directory)
    assert {f.name for f in directory.iterdir()} == FILES - {"encoder.rbln"} | {"README.md"}
    assert (directory / "README.md").read_text() == "mine"
    assert_same_model(load(directory), default_vae())
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_loaded_model_is_saved_where_it_came_from(broken):
    model = load(broken)
    model.save_pretrained(broken)
    assert_same_model(model, default_vae())
    assert_same_model(load(broken), default_vae())


def test_saving_onto_a_file_is_an_error_and_leaves_it(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        default_compiled().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_without_runtimes_is_saved(tmp_path):
    compile_vae(default_vae(), create_runtimes=False).save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), default_vae())


# The hub


def test_a_diffusers_model_on_the_hub_is_compiled(hub, original):
    hub.add("me/vae", original)
    hub.add("me/pipeline", original, prefix="vae/")
    assert_same_model(load("me/vae", True, rbln_config=CPU), default_vae())
    assert_same_model(load("me/vae", None, rbln_config=CPU), default_vae())
    assert_same_model(load("me/pipeline", True, subfolder="vae", rbln_config=CPU), default_vae())
    assert "Bearer hf_of_the_tests" in hub.tokens


def test_a_compiled_model_on_the_hub_is_loaded(hub, compiled):
    hub.add("me/compiled", compiled)
    hub.add("me/pipeline", compiled, prefix="vae/")
    assert_same_model(load("me/compiled"), default_vae())
    assert_same_model(load("me/compiled", None), default_vae())
    assert_same_model(load("me/pipeline", subfolder="vae"), default_vae())
    with pytest.raises(ValueError, match="me/compiled is compiled already"):
        load("me/compiled", True)


def test_of_a_compiled_model_only_its_own_files_are_downloaded(hub, compiled, original):
    hub.add("me/compiled", compiled)
    hub.add("me/compiled", original)  # weights beside it, which are not needed
    hub.add("me/compiled", compiled)
    assert_same_model(load("me/compiled"), default_vae())
    assert {download.split("/")[-1] for download in hub.downloads} == FILES


def test_a_model_is_downloaded_once(hub, compiled):
    hub.add("me/compiled", compiled)
    load("me/compiled")
    before = len(hub.downloads)
    load("me/compiled")
    assert len(hub.downloads) == before
    load("me/compiled", force_download=True)
    assert len(hub.downloads) > before


def test_what_was_downloaded_loads_without_the_hub(hub, original, compiled):
    hub.add("me/vae", original)
    hub.add("me/compiled", compiled)
    load("me/vae", True, rbln_config=CPU)
    load("me/compiled")
    hub.repositories.clear()
    assert_same_model(load("me/compiled", local_files_only=True), default_vae())
    model = load("me/vae", True, local_files_only=True, rbln_config=CPU)
    assert_same_model(model, default_vae())


def test_the_revision_the_token_and_the_cache_reach_the_hub(hub, original, compiled, tmp_path):
    hub.add("me/vae", original)
    hub.add("me/vae", compiled, branch="compiled")
    cache = tmp_path / "elsewhere"
    model = load("me/vae", revision="compiled", cache_dir=cache, token="hf_mine")
    assert_same_model(model, default_vae())
    assert hub.tokens == {"Bearer hf_mine"}
    assert (cache / "models--me--vae").is_dir()
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="not a compiled model"):
        load("me/vae")
    with pytest.raises(OSError, match="none"):
        load("me/vae", revision="none")


@pytest.mark.parametrize("export", [True, False, None])
def test_a_name_that_the_hub_does_not_know_is_an_error(hub, export):
    with pytest.raises(OSError, match=r"'me/none' is neither .* nor a model on the hub"):
        load("me/none", export)


@pytest.mark.parametrize("export", [True, False, None])
def test_a_model_that_is_not_in_the_cache_says_so(hub, compiled, export):
    hub.add("me/compiled", compiled)
    with pytest.raises(OSError, match=r"me/compiled.*cache"):
        load("me/compiled", export, local_files_only=True)


def test_a_cache_laid_out_as_the_hub_does(tmp_path, original, compiled):
    fill_cache(tmp_path, "me/vae", read_files(original))
    fill_cache(tmp_path, "me/compiled", read_files(compiled))
    fill_cache(tmp_path, "me/pipeline", read_files(compiled, "vae/"))
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert_same_model(load("me/vae", True, rbln_config=CPU, **options), default_vae())
    assert_same_model(load("me/compiled", **options), default_vae())
    assert_same_model(load("me/compiled", None, **options), default_vae())
    assert_same_model(load("me/pipeline", subfolder="vae", **options), default_vae())
    with pytest.raises(ValueError, match=r"me/vae is not a compiled model.*export=True"):
        load("me/vae", **options)


def test_a_part_that_is_missing_on_the_hub_is_named(hub, broken):
    (broken / "encoder.rbln").unlink()
    hub.add("me/broken", broken)
    with pytest.raises(RBLNArtifactError, match=r"encoder\.rbln"):
        load("me/broken")


def test_push_to_hub_makes_the_repository_and_uploads_the_model(hub):
    url = default_compiled().push_to_hub("me/new", private=True, commit_message="The first")
    assert url.startswith(f"{hub.url}/me/new/commit/")
    assert hub.created[0]["name"] == "new"
    assert hub.created[0].get("visibility", "private") == "private"
    assert set(hub.repositories["me/new"]["main"]) == FILES
    name, branch, header = hub.commits[0]
    assert (name, branch, header["summary"]) == ("me/new", "main", "The first")
    assert_same_model(load("me/new"), default_vae())


def test_push_to_hub_replaces_the_parts_that_are_there(hub, compiled):
    hub.add("me/compiled", compiled)
    decoder = compile_vae(make_vae(seed=1), uses_encoder=False)
    decoder.push_to_hub("me/compiled", token="hf_mine")
    assert set(hub.repositories["me/compiled"]["main"]) == FILES - {"encoder.rbln"}
    assert "Bearer hf_mine" in hub.tokens
    assert_same_model(load("me/compiled"), make_vae(seed=1))


def test_push_to_hub_opens_a_pull_request_where_asked(hub, compiled):
    hub.add("me/compiled", compiled)
    before = dict(hub.repositories["me/compiled"]["main"])
    decoder = compile_vae(make_vae(seed=1), uses_encoder=False)
    assert decoder.push_to_hub("me/compiled", create_pr=True).endswith("/discussions/1")
    assert hub.repositories["me/compiled"]["main"] == before
    assert hub.commits[0][1] == "refs/pr/1"


def test_push_to_hub_uploads_to_a_branch(hub, compiled, other):
    hub.add("me/compiled", compiled)
    hub.add("me/compiled", compiled, branch="next")
    other.push_to_hub("me/compiled", revision="next")
    assert_same_model(load("me/compiled", revision="next"), make_vae(seed=1))
    assert_same_model(load("me/compiled"), default_vae())


# Fresh processes


def run_python(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints; a failure there is one here."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_is_light():
    code = """
import sys
import rbln_vae
rbln_vae.RBLNModelConfig(dtype="bfloat16")
heavy = {"torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy"}
print(*heavy & set(sys.modules))
"""
    assert run_python(code).split() == []


def test_every_public_name_is_found():
    code = """
import rbln_vae
for name in rbln_vae.__all__:
    assert getattr(rbln_vae, name) is not None
assert set(rbln_vae.__all__) == set(dir(rbln_vae))
try:
    rbln_vae.no_such_name
except AttributeError as error:
    print(error)
"""
    assert "no_such_name" in run_python(code)


@pytest.mark.slow
def test_a_compiled_model_runs_without_the_original_and_without_export(compiled, tmp_path):
    z = noise(1, 4, 6, 5)
    torch.save(z, tmp_path / "z.pt")
    code = """
import sys, torch
from rbln_vae import RBLNAutoencoderKL
directory, folder = sys.argv[1:]
z = torch.load(folder + "/z.pt", weights_only=True)
vae = RBLNAutoencoderKL.from_pretrained(directory)
vae.decode_images(z)
print(*{"diffusers"} & set(sys.modules))  # whose import takes seconds
torch.save(vae.decode(z).sample, folder + "/image.pt")
print(*{"torch.export._trace"} & set(sys.modules))
"""
    assert run_python(code, compiled, tmp_path).split() == []
    image = torch.load(tmp_path / "image.pt", weights_only=True)
    assert torch.equal(image, pixels(default_compiled(), z))


# Other runtimes


def test_a_model_gets_other_runtimes_and_stays_what_it_is():
    vae = default_compiled()
    latent = noise(1, 4, 6, 5)
    other = vae.with_runtimes(num_threads=1, memory_limit="1GiB")
    assert (other.rbln_config.num_threads, other.rbln_config.memory_limit) == (1, 2**30)
    assert vae.rbln_config.memory_limit is None
    assert other.rbln_config.compiled_options() == vae.rbln_config.compiled_options()
    assert other.compiled_models["decoder"] is vae.compiled_models["decoder"]
    assert torch.equal(other.decode(latent).sample, vae.decode(latent).sample)


def test_a_model_that_was_compiled_without_runtimes_gets_them():
    vae = compile_vae(default_vae(), create_runtimes=False)
    latent = noise(1, 4, 6, 5)
    found = vae.with_runtimes().decode(latent).sample
    assert torch.equal(found, default_compiled().decode(latent).sample)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"num_thread": 1}, {"device": "cuda"}])
def test_new_runtimes_do_not_change_what_was_compiled(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        default_compiled().with_runtimes(**options)


# What a run takes


def test_the_time_of_a_run_grows_with_its_work():
    vae = default_compiled()
    small, large, two = (
        vae.seconds_expected("decoder", shape)
        for shape in ((1, 4, 32, 32), (1, 4, 64, 64), (2, 4, 64, 64))
    )
    assert small is not None and 0 < 2 * small < large
    assert two == pytest.approx(2 * large, rel=0.2)
    text = vae.describe("decoder", (1, 4, 64, 64))
    assert f"about {format_seconds(large)}" in text


def test_the_time_of_a_run_by_kernels_of_pytorch_is_not_known():
    vae = compile_vae(default_vae(), target="reference")
    assert vae.seconds_expected("decoder", (1, 4, 4, 4)) is None


def test_the_time_of_a_run_that_needs_too_much_memory_is_an_error():
    small = default_compiled().with_runtimes(memory_limit="1MiB")
    with pytest.raises(MemoryError, match="Raise it to"):
        small.seconds_expected("decoder", (1, 4, 512, 512))
