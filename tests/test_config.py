"""What a model is compiled for: every option, its default, its checks, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbln_vae import (
    RBLNArtifactError,
    RBLNAutoConfig,
    RBLNAutoencoderKLConfig,
    RBLNModelConfig,
    __version__,
)
from rbln_vae.config import CONFIG_NAME, format_dtypes

MODEL_OPTIONS: dict[str, tuple[Any, Any, Any]] = {
    # option: its default, a value that may be given, what is then read
    "create_runtimes": (True, False, False),
    "device": (None, "cpu", "cpu"),
    "device_map": (None, {"encoder": "cpu", "decoder": 1}, {"encoder": "cpu", "decoder": 1}),
    "activate_profiler": (False, True, True),
    "npu": (None, "RBLN-CA22", "RBLN-CA22"),
    "num_devices": (1, 4, 4),
    "timeout": (None, 1.5, 1.5),
    "dtype": (None, "bfloat16", "bfloat16"),
    "target": (None, "reference", "reference"),
    "num_threads": (None, 3, 3),
    "memory_limit": (None, "2GiB", 2 * 1024**3),
}
VAE_OPTIONS: dict[str, tuple[Any, Any, Any]] = {
    "batch_size": (1, 2, 2),
    "sample_size": (None, 64, (64, 64)),
    "uses_encoder": (None, False, False),
    "vae_scale_factor": (None, 8, 8),
    "in_channels": (None, 3, 3),
    "latent_channels": (None, 16, 16),
}
RUN_OPTIONS = (
    "create_runtimes",
    "device",
    "device_map",
    "activate_profiler",
    "timeout",
    "num_threads",
    "memory_limit",
)


# The options and their defaults


@pytest.mark.parametrize("config_class", [RBLNModelConfig, RBLNAutoencoderKLConfig])
@pytest.mark.parametrize("name", MODEL_OPTIONS)
def test_every_model_has_the_option(name, config_class):
    default, value, read = MODEL_OPTIONS[name]
    assert getattr(config_class(), name) == default
    assert getattr(config_class(**{name: value}), name) == read


@pytest.mark.parametrize("name", VAE_OPTIONS)
def test_a_vae_has_the_option(name):
    default, value, read = VAE_OPTIONS[name]
    assert getattr(RBLNAutoencoderKLConfig(), name) == default
    assert getattr(RBLNAutoencoderKLConfig(**{name: value}), name) == read


@pytest.mark.parametrize("name", VAE_OPTIONS)
def test_a_model_in_general_has_no_option_of_a_vae(name):
    with pytest.raises(ValueError, match=f"'{name}' is no option of RBLNModelConfig"):
        RBLNModelConfig(**{name: VAE_OPTIONS[name][1]})


@pytest.mark.parametrize("name", [*MODEL_OPTIONS, *VAE_OPTIONS])
def test_none_stands_for_the_default(name):
    default = {**MODEL_OPTIONS, **VAE_OPTIONS}[name][0]
    assert getattr(RBLNAutoencoderKLConfig(**{name: None}), name) == default


def test_the_options_of_a_vae_come_first_and_in_the_documented_order():
    config = RBLNAutoencoderKLConfig(2, (64, 32), False, 8, 3, 16)
    assert (config.batch_size, config.sample_size, config.uses_encoder) == (2, (64, 32), False)
    assert (config.vae_scale_factor, config.in_channels, config.latent_channels) == (8, 3, 16)


def test_tensor_parallel_size_is_another_name_of_num_devices():
    assert RBLNAutoencoderKLConfig(tensor_parallel_size=4).num_devices == 4
    assert RBLNModelConfig(tensor_parallel_size=4, num_devices=4).num_devices == 4
    with pytest.raises(ValueError, match="two names of one option"):
        RBLNModelConfig(tensor_parallel_size=4, num_devices=2)


def test_a_torch_dtype_is_as_good_as_its_name():
    assert RBLNModelConfig(dtype=torch.bfloat16).dtype == "bfloat16"
    assert RBLNModelConfig(dtype=torch.float16).dtype == "float16"


BY_PART = {"encoder": "float32", "decoder": "bfloat16"}


@pytest.mark.parametrize(
    "value",
    [
        BY_PART,
        {"encoder": torch.float32, "decoder": torch.bfloat16},
        "encoder=float32,decoder=bfloat16",
        "encoder = float32, decoder = bfloat16",
    ],
)
def test_parts_may_have_dtypes_of_their_own(value, tmp_path):
    config = RBLNModelConfig(dtype=value)
    assert config.dtype == BY_PART
    assert format_dtypes(config.dtype) == "encoder=float32,decoder=bfloat16"
    config.save(tmp_path)
    assert RBLNModelConfig.load(tmp_path).dtype == BY_PART
    assert json.loads((tmp_path / "rbln_config.json").read_text())["dtype"] == BY_PART


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512B", 512),
        ("1KiB", 1024),
        ("1.5 MiB", 1572864),
        ("2GiB", 2147483648),
        ("2GB", 2000000000),
        ("1TiB", 1 << 40),
    ],
)
def test_a_memory_limit_is_in_bytes_or_in_units(text, number):
    assert RBLNModelConfig(memory_limit=text).memory_limit == number


@pytest.mark.parametrize("nothing", ["", " "])
def test_an_empty_memory_limit_is_none(nothing):
    assert RBLNModelConfig(memory_limit=nothing).memory_limit is None
    assert RBLNModelConfig(memory_limit="2GiB").copy(memory_limit=nothing).memory_limit is None


# Sizes


def test_image_size_and_latent_size_follow_from_the_sample_size():
    config = RBLNAutoencoderKLConfig(sample_size=(512, 768), vae_scale_factor=8)
    assert config.image_size == (512, 768)
    assert config.latent_sample_size == (64, 96)


def test_an_int_stands_for_both_sides():
    assert RBLNAutoencoderKLConfig(sample_size=512).image_size == (512, 512)


@pytest.mark.parametrize("options", [{}, {"sample_size": 64}, {"vae_scale_factor": 8}])
def test_the_latent_size_needs_both_numbers(options):
    with pytest.raises(ValueError, match="needs sample_size and vae_scale_factor"):
        _ = RBLNAutoencoderKLConfig(**options).latent_sample_size


@pytest.mark.parametrize(
    ("size", "height", "width"),
    [
        (513, "512 or 520", "512 or 520"),
        ((512, 770), "512", "768 or 776"),
        ((3, 8), "8", "8"),
    ],
)
def test_a_size_that_leaves_a_remainder_names_the_nearest_that_do_not(size, height, width):
    with pytest.raises(ValueError, match=f"height {height} and width {width}") as raised:
        RBLNAutoencoderKLConfig(sample_size=size, vae_scale_factor=8)
    assert "multiples of 8" in str(raised.value)


def test_a_remainder_is_found_whichever_of_the_two_is_set_last():
    config = RBLNAutoencoderKLConfig(sample_size=36)
    with pytest.raises(ValueError, match="32 or 40"):
        config.vae_scale_factor = 8
    assert config.vae_scale_factor is None  # what was refused leaves no trace
    config.vae_scale_factor = 4
    assert config.latent_sample_size == (9, 9)


# Wrong values


@pytest.mark.parametrize(
    ("name", "value", "error", "expected"),
    [
        ("batch_size", 0, ValueError, "a positive integer"),
        ("batch_size", -1, ValueError, "a positive integer"),
        ("batch_size", 1.5, ValueError, "a positive integer"),
        ("batch_size", "2", ValueError, "a positive integer"),
        ("batch_size", True, ValueError, "a positive integer"),
        ("sample_size", 0, ValueError, "a positive integer"),
        ("sample_size", (8, -8), ValueError, "a positive integer"),
        ("sample_size", (8, 8, 8), ValueError, r"\(height, width\)"),
        ("sample_size", "8", ValueError, "a positive integer"),
        ("uses_encoder", 1, TypeError, "True or False"),
        ("uses_encoder", "no", TypeError, "True or False"),
        ("vae_scale_factor", 0, ValueError, "a positive number"),
        ("vae_scale_factor", "8", TypeError, "a number"),
        ("vae_scale_factor", 0.3, ValueError, "a positive whole number"),
        ("vae_scale_factor", float("inf"), ValueError, "a positive whole number"),
        ("vae_scale_factor", float("nan"), ValueError, "a positive number"),
        ("in_channels", 0, ValueError, "a positive integer"),
        ("latent_channels", 4.0, ValueError, "a positive integer"),
        ("create_runtimes", 0, TypeError, "True or False"),
        ("activate_profiler", "yes", TypeError, "True or False"),
        ("device", -1, ValueError, "0 or more"),
        ("device", True, TypeError, "the number of an NPU"),
        ("device", 1.0, TypeError, "the number of an NPU"),
        ("device", "cuda:", ValueError, "'cpu', 'cuda' or 'cuda:0'"),
        ("device", "tpu", ValueError, "'cpu', 'cuda' or 'cuda:0'"),
        ("device_map", "cpu", TypeError, "a dict"),
        ("device_map", {0: "cpu"}, TypeError, "a dict"),
        ("device_map", {"decoder": "tpu"}, ValueError, "'cpu', 'cuda' or 'cuda:0'"),
        ("npu", 5, TypeError, "a name"),
        ("npu", "", TypeError, "a name"),
        ("num_devices", 0, ValueError, "a positive integer"),
        ("tensor_parallel_size", 0, ValueError, "a positive integer"),
        ("timeout", 0, ValueError, "a positive number"),
        ("timeout", -1, ValueError, "a positive number"),
        ("timeout", float("nan"), ValueError, "a positive number"),
        ("timeout", "60", TypeError, "a number"),
        ("dtype", "float64", ValueError, "float32, float16, bfloat16"),
        ("dtype", torch.int8, ValueError, "float32, float16, bfloat16"),
        ("dtype", {"encoder": "int8"}, ValueError, "float32, float16, bfloat16"),
        ("dtype", {}, ValueError, "name of a part and its dtype"),
        ("dtype", {1: "float32"}, ValueError, "name of a part and its dtype"),
        ("dtype", "=float32", ValueError, "name of a part and its dtype"),
        ("dtype", "encoder=", ValueError, "float32, float16, bfloat16"),
        ("dtype", "encoder=float32,float16", ValueError, "float32, float16, bfloat16"),
        ("dtype", "encoder=float32,encoder=float16", ValueError, "each part once"),
        ("target", "gpu", ValueError, "cpu, cuda, rbln, reference"),
        ("target", ["cpu"], ValueError, "cpu, cuda, rbln, reference"),
        ("num_threads", 0, ValueError, "a positive integer"),
        ("num_threads", 2000, ValueError, "at most 1024"),
        ("memory_limit", 0, ValueError, "a positive integer"),
        ("memory_limit", "2 buckets", ValueError, "'2GiB'"),
        ("memory_limit", "9" * 400, ValueError, "'2GiB'"),
        ("memory_limit", -5, ValueError, "a positive integer"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(name, value, error, expected):
    with pytest.raises(error, match=f"expected .*{expected}") as raised:
        RBLNAutoencoderKLConfig(**{name: value})
    shown = "num_devices" if name == "tensor_parallel_size" else name
    assert str(raised.value).startswith(f"{shown}={value!r}")


def test_a_value_is_checked_when_it_is_set_later_too():
    config = RBLNAutoencoderKLConfig()
    with pytest.raises(ValueError, match="batch_size=0"):
        config.batch_size = 0
    assert config.batch_size == 1


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("batchsize", "batch_size"),
        ("image_size", "sample_size"),
        ("use_encoder", "uses_encoder"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("nthreads", "num_threads"),
        ("profiler", "activate_profiler"),
    ],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(wrong, meant):
    with pytest.raises(ValueError, match=f"'{wrong}' is no option .*did you mean '{meant}'"):
        RBLNAutoencoderKLConfig(**{wrong: 1})
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        RBLNAutoencoderKLConfig().copy(**{wrong: 1})


def test_an_unknown_name_near_to_none_lists_them():
    with pytest.raises(ValueError, match=r"known are batch_size, sample_size, .*memory_limit"):
        RBLNAutoencoderKLConfig(qqqqqq=1)


def test_an_attribute_that_is_no_option_can_not_be_set():
    with pytest.raises(AttributeError, match="did you mean 'batch_size'"):
        RBLNAutoencoderKLConfig().batch_sizes = 2


def test_an_option_can_not_be_deleted():
    with pytest.raises(AttributeError, match="set it to None"):
        del RBLNModelConfig().timeout


# Copies, equality and freezing


def test_a_copy_has_the_same_options_but_for_the_changes():
    config = RBLNAutoencoderKLConfig(sample_size=64, timeout=5)
    copied = config.copy(batch_size=2)
    assert (copied.sample_size, copied.timeout, copied.batch_size) == ((64, 64), 5, 2)
    assert config.batch_size == 1


def test_a_change_of_the_alias_takes_the_place_of_the_option():
    assert RBLNModelConfig(num_devices=2).copy(tensor_parallel_size=4).num_devices == 4


def test_configurations_are_equal_if_class_and_options_are():
    assert RBLNAutoencoderKLConfig(sample_size=8) == RBLNAutoencoderKLConfig(sample_size=(8, 8))
    assert RBLNAutoencoderKLConfig(sample_size=8) != RBLNAutoencoderKLConfig(sample_size=16)
    assert RBLNModelConfig() != RBLNAutoencoderKLConfig()


def test_repr_shows_what_is_set():
    assert repr(RBLNAutoencoderKLConfig(sample_size=8)).startswith("RBLNAutoencoderKLConfig(")
    assert "sample_size=(8, 8)" in repr(RBLNAutoencoderKLConfig(sample_size=8))
    assert "in_channels" not in repr(RBLNAutoencoderKLConfig())


@pytest.mark.parametrize("name", [*MODEL_OPTIONS, *VAE_OPTIONS])
def test_a_frozen_configuration_refuses_every_change(name):
    default, value, _ = {**MODEL_OPTIONS, **VAE_OPTIONS}[name]
    config = RBLNAutoencoderKLConfig()
    assert not config.is_frozen()
    config.freeze()
    assert config.is_frozen()
    with pytest.raises(RuntimeError, match=f"{name} can't be set: .*frozen"):
        setattr(config, name, value)
    assert getattr(config, name) == default


def test_a_copy_of_a_frozen_configuration_is_not_frozen():
    config = RBLNAutoencoderKLConfig(batch_size=2)
    config.freeze()
    copied = config.copy()
    copied.batch_size = 3
    assert (config.batch_size, copied.batch_size) == (2, 3)


# The file


def test_what_was_saved_is_loaded_but_for_the_options_of_a_run(tmp_path):
    options = {name: value for name, (_, value, _) in {**MODEL_OPTIONS, **VAE_OPTIONS}.items()}
    config = RBLNAutoencoderKLConfig(**options)
    config.save(tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert stored.keys() == {"cls_name", "rbln_vae_version", *options} - set(RUN_OPTIONS)
    assert stored["cls_name"] == "RBLNAutoencoderKLConfig"
    assert stored["rbln_vae_version"] == __version__
    loaded = RBLNAutoencoderKLConfig.load(tmp_path)
    for name, (default, _, read) in {**MODEL_OPTIONS, **VAE_OPTIONS}.items():
        assert getattr(loaded, name) == (default if name in RUN_OPTIONS else read), name


@settings(deadline=None)  # it waits for the disk
@given(
    batch_size=st.integers(1, 64),
    sample_size=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    factor=st.sampled_from([1, 2, 4, 8, 16]),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    uses_encoder=st.sampled_from([None, True, False]),
)
def test_save_and_load_keep_every_combination(
    tmp_path_factory, batch_size, sample_size, factor, dtype, uses_encoder
):
    config = RBLNAutoencoderKLConfig(
        batch_size=batch_size,
        sample_size=tuple(side * factor for side in sample_size),
        vae_scale_factor=factor,
        dtype=dtype,
        uses_encoder=uses_encoder,
    )
    file = tmp_path_factory.mktemp("config") / "some_name.json"
    config.save(file)
    assert RBLNAutoencoderKLConfig.load(str(file)) == config
    assert RBLNAutoConfig.load(file) == config


def test_options_of_the_run_are_added_while_loading(tmp_path):
    RBLNAutoencoderKLConfig().save(tmp_path)
    assert RBLNAutoencoderKLConfig.load(tmp_path, timeout=5).timeout == 5
    assert RBLNAutoConfig.load(tmp_path, device="cpu").device == "cpu"


@pytest.mark.parametrize("config_class", [RBLNModelConfig, RBLNAutoencoderKLConfig])
def test_auto_config_finds_the_class_by_itself(tmp_path, config_class):
    config_class(dtype="float32").save(tmp_path)
    found = RBLNAutoConfig.load(tmp_path)
    assert type(found) is config_class
    assert found.dtype == "float32"


def test_a_configuration_of_another_class_is_refused(tmp_path):
    RBLNAutoencoderKLConfig().save(tmp_path)
    with pytest.raises(RBLNArtifactError, match=r"one of RBLNAutoencoderKLConfig.*RBLNAutoConfig"):
        RBLNModelConfig.load(tmp_path)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RBLNArtifactError, match=r"There is no .*save_pretrained"):
            RBLNAutoencoderKLConfig.load(path)
        with pytest.raises(RBLNArtifactError, match="There is no"):
            RBLNAutoConfig.load(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe\x00junk",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'"RBLNAutoencoderKLConfig"',
    ],
    ids=["empty", "cut", "binary", "deep", "list", "null", "text"],
)
def test_a_damaged_file_is_an_error(tmp_path, text):
    (tmp_path / CONFIG_NAME).write_bytes(text)
    for loader in (RBLNAutoencoderKLConfig, RBLNAutoConfig):
        with pytest.raises(RBLNArtifactError, match=f"{CONFIG_NAME} is not"):
            loader.load(tmp_path)


@pytest.mark.parametrize(
    "name", [None, "", "RBLNFooConfig", "RBLNModel", "demo_model", "__version__", 5, ["x"], {}]
)
def test_a_file_of_an_unknown_class_is_an_error(tmp_path, name):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"cls_name": name}))
    with pytest.raises(RBLNArtifactError, match="names the configuration class"):
        RBLNAutoConfig.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"sample_size": "big"}, {"new_option": 1}, {"self": 1}, {"dtype": "int4"}],
)
def test_options_that_this_version_refuses_name_the_version_that_wrote_them(tmp_path, change):
    stored = {"cls_name": "RBLNAutoencoderKLConfig", "rbln_vae_version": "99.0", **change}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(stored))
    with pytest.raises(RBLNArtifactError, match="written by version 99"):
        RBLNAutoencoderKLConfig.load(tmp_path)


def test_a_configuration_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    RBLNAutoencoderKLConfig(batch_size=2).save(tmp_path)

    def full(self: Path, *args: Any, **options: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            RBLNAutoencoderKLConfig(batch_size=3).save(tmp_path)
    assert RBLNAutoencoderKLConfig.load(tmp_path).batch_size == 2
    assert [file.name for file in tmp_path.iterdir()] == [CONFIG_NAME]
