"""Single files: every layout gives the model that was written, exactly, without the network."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    AutoencoderTiny,
    VQModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import State, flux2s, ldm, old, plain, taesd, taesds, wans
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKL, RBLNAutoencoderKLQwenImage
from rbln_vae.errors import RBLNCompileError
from rbln_vae.metrics import relative_l2
from rbln_vae.models.auto import class_for
from rbln_vae.models.family import CLASSES
from rbln_vae.models.kinds import KINDS
from rbln_vae.models.single_file import open_single_file, open_weights


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a single file needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def randomised(model: Any) -> Any:
    """Weights and statistics that no other model has."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(-0.1, 0.1)
    if isinstance(model, AutoencoderKLFlux2):
        model.bn.running_var.abs_()
    return model.eval().requires_grad_(False)


def kl(channels: tuple[int, ...] = (32, 64), **options: Any) -> Any:
    options = {"latent_channels": 4, "layers_per_block": 1, **options}
    flux2 = options.pop("flux2", False)
    return randomised(
        (AutoencoderKLFlux2 if flux2 else AutoencoderKL)(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            **options,
        )
    )


_SCALED = (AutoencoderKLWan, AutoencoderKLQwenImage21)


def wan(original: Any = AutoencoderKLWan, **options: Any) -> Any:
    options = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": None,
        "latents_std": None,
        **({"scale_factor_temporal": 2, "scale_factor_spatial": 4} if original in _SCALED else {}),
        **options,
    }
    return randomised(original(**options))


def wan_2_2(**options: Any) -> Any:
    return wan(
        **{
            "decoder_base_dim": 8,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 8,
            **options,
        }
    )


def tiny(**options: Any) -> Any:
    return randomised(
        AutoencoderTiny(
            **{
                "encoder_block_out_channels": (8, 8, 8),
                "decoder_block_out_channels": (8, 8, 8),
                "num_encoder_blocks": (1, 2, 0),
                "num_decoder_blocks": (2, 3, 1),
                **options,
            }
        )
    )


# What is compared


def write(path: Path, state: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def assert_same(found: Any, model: Any, *, unknown: tuple[str, ...] = ()) -> None:
    """The same class, configuration, weights and results; `unknown` settings are `None`."""
    assert type(found) is type(model)
    for name, value in model.config.items():
        if name in unknown:
            assert found.config[name] is None, name
        elif name != "sample_size" and not name.startswith("_"):
            expected = list(value) if isinstance(value, tuple) else value
            given = found.config[name]
            assert (list(given) if isinstance(given, tuple) else given) == expected, name
    assert not found.training
    expected_state, state = model.state_dict(), found.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected_state[name]), name
    with torch.no_grad():
        for each in (results(found), results(model)):
            assert all(result.isfinite().all() for result in each)
        for result, expected in zip(results(found), results(model), strict=True):
            assert torch.equal(result, expected)


def results(model: Any) -> list[Tensor]:
    """What the model gives for one image."""
    config = model.config
    patch = config.get("patch_size") if "base_dim" in config else None
    channels = config.get("in_channels", config.get("input_channels")) // (patch or 1) ** 2
    image = torch.linspace(-1, 1, channels * 16 * 16).reshape(1, channels, 16, 16)
    image = image.to(model.dtype)
    if "base_dim" in config:
        image = image.unsqueeze(2)
    encoded = model.encode(image)
    if "latent_dist" in encoded:
        latent, all_of_it = encoded.latent_dist.mode(), encoded.latent_dist.parameters
    else:
        latent = all_of_it = encoded[0]
    kwargs = {"force_not_quantize": True} if "num_vq_embeddings" in config else {}
    return [all_of_it, model.decode(latent, **kwargs).sample]


SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")

LAYOUTS: dict[str, tuple[Callable[[], Any], Callable[[State], State]]] = {
    "diffusers": (kl, plain),
    "diffusers, old names": (kl, old),
    "diffusers, FLUX.2": (lambda: kl(flux2=True), plain),
    "diffusers, Wan 2.1": (wan, plain),
    "diffusers, Wan 2.2": (wan_2_2, plain),
    "diffusers, Tiny": (tiny, plain),
    "LDM": (kl, ldm),
    "LDM, three levels of two layers": (lambda: kl((32, 32, 64), layers_per_block=2), ldm),
    "LDM, one level": (lambda: kl((32,)), ldm),
    "LDM, without quant convs": (
        lambda: kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        ldm,
    ),
    "LDM, without attention": (lambda: kl(mid_block_add_attention=False), ldm),
    "LDM, with matrices": (kl, lambda state: ldm(state, matrices=True)),
    "LDM, other channels": (lambda: kl(in_channels=4, out_channels=1), ldm),
    "FLUX.2": (lambda: kl(flux2=True), flux2s),
    "FLUX.2, small decoder": (
        lambda: kl(flux2=True, decoder_block_out_channels=(32, 96)),
        flux2s,
    ),
    "Wan 2.1": (wan, wans),
    "Wan 2.1, two blocks": (lambda: wan(num_res_blocks=2, dim_mult=[1, 2, 4]), wans),
    "Wan 2.1, RGBA": (lambda: wan(in_channels=4, out_channels=4), wans),
    "Wan 2.2": (wan_2_2, wans),
    "Wan 2.2, two blocks": (lambda: wan_2_2(num_res_blocks=2, decoder_base_dim=None), wans),
    "Qwen-Image-2.1": (
        lambda: wan(AutoencoderKLQwenImage21, decoder_base_dim=8),
        wans,
    ),
    "TAESD": (tiny, taesd),
    "TAESD, its own names": (tiny, taesds),
    "TAESD, as large as published": (
        lambda: randomised(AutoencoderTiny(latent_channels=16)),
        taesd,
    ),
    "asymmetric": (
        lambda: randomised(
            AsymmetricAutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                down_block_out_channels=(32, 64),
                up_block_types=("UpDecoderBlock2D",) * 3,
                up_block_out_channels=(32, 64, 64),
                layers_per_up_block=2,
            )
        ),
        plain,
    ),
    "MoVQ": (
        lambda: randomised(
            VQModel(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
                latent_channels=4,
                vq_embed_dim=4,
                norm_type="spatial",
            )
        ),
        plain,
    ),
    "LDM, VQ": (
        lambda: randomised(
            VQModel(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
                vq_embed_dim=5,
            )
        ),
        ldm,
    ),
    "HunyuanImage": (
        lambda: randomised(
            AutoencoderKLHunyuanImage(3, 3, 8, (32, 64, 64), 1, 4, 384),
        ),
        plain,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_gives_the_model_that_was_written(layout: str, tmp_path: Path) -> None:
    make, names = LAYOUTS[layout]
    model = make()
    path = write(tmp_path / "vae.safetensors", names(model.state_dict()))
    found = open_single_file(path)
    unknown = () if found.class_name == "AutoencoderTiny" else SCALING
    assert_same(found.load(), model, unknown=unknown)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_memory_give_the_same_model_as_a_file(layout: str) -> None:
    make, names = LAYOUTS[layout]
    model = make()
    found = open_weights(names(model.state_dict()), "the VAE")
    unknown = () if found.class_name == "AutoencoderTiny" else SCALING
    assert_same(found.load(), model, unknown=unknown)


def test_weights_in_memory_that_are_not_those_of_a_vae_are_refused_by_their_name() -> None:
    state = ldm(kl().state_dict())
    with pytest.raises(RBLNCompileError, match="the VAE holds no autoencoder"):
        open_weights({"voice.weight": torch.zeros(1)}, "the VAE")
    quantised = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    with pytest.raises(RBLNCompileError, match=r"in the VAE has the dtype torch\.float8_e4m3fn"):
        open_weights(quantised, "the VAE")
    del state["decoder.conv_out.bias"]
    with pytest.raises(RBLNCompileError, match=r"the VAE looks like .* 1 weights are missing"):
        open_weights(state, "the VAE").load()


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "model."])
@pytest.mark.parametrize("layout", ["LDM", "FLUX.2", "Wan 2.1", "TAESD", "diffusers"])
def test_a_whole_checkpoint_gives_its_vae(prefix: str, layout: str, tmp_path: Path) -> None:
    make, names = LAYOUTS[layout]
    model = make()
    state = {f"{prefix}{name}": tensor for name, tensor in names(model.state_dict()).items()}
    state["model_ema.decay"] = torch.tensor(0.9)
    state["cond_stage_model.transformer.weight"] = torch.zeros(3, 3)
    found = open_single_file(write(tmp_path / "checkpoint.safetensors", state))
    assert_same(found.load(), model, unknown=() if layout == "TAESD" else SCALING)


def test_only_the_weights_of_the_vae_are_read(tmp_path: Path, monkeypatch) -> None:
    from rbln_vae.models import single_file

    model = tiny()
    names = taesd(model.state_dict(), "vae.taesd_encoder.", "vae.taesd_decoder.")
    path = write(tmp_path / "x.safetensors", {**names, "model.huge": torch.zeros(1000)})
    read: list[str] = []

    class Watched:
        def __init__(self, *args: Any) -> None:
            self.file = safe_open(*args)

        def __enter__(self) -> Any:
            opened = self.file.__enter__()
            self.get_slice, self.keys = opened.get_slice, opened.keys
            self.get_tensor = lambda key: read.append(key) or opened.get_tensor(key)
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

    monkeypatch.setattr(single_file, "safe_open", Watched)
    found = open_single_file(path)
    assert read == []
    found.load()
    assert sorted(read) == sorted(names)


def test_what_training_and_comfyui_leave_in_a_file_is_ignored(tmp_path: Path) -> None:
    model = kl()
    left = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    path = write(tmp_path / "ldm.safetensors", {**ldm(model.state_dict()), **left})
    assert_same(open_single_file(path).load(), model, unknown=SCALING)
    model = tiny()
    left = {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    path = write(tmp_path / "taesd.safetensors", {**taesd(model.state_dict()), **left})
    assert_same(open_single_file(path).load(), model)


def test_the_counter_of_batches_may_be_missing(tmp_path: Path) -> None:
    model = kl(flux2=True)
    state = flux2s(model.state_dict())
    del state["bn.num_batches_tracked"]
    assert_same(open_single_file(write(tmp_path / "ae.safetensors", state)).load(), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = kl().to(dtype)
    path = write(tmp_path / "vae.safetensors", ldm(model.state_dict()))
    found = open_single_file(path).load()
    assert found.dtype == dtype
    assert all(
        torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    if dtype == torch.bfloat16:
        assert_same(found, model, unknown=SCALING)


def test_weights_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = kl(flux2=True)
    path = write(tmp_path / "vae.safetensors", flux2s(model.to(torch.bfloat16).state_dict()))
    found = open_single_file(path).load(torch.float32)
    assert {t.dtype for t in found.state_dict().values()} == {torch.float32, torch.int64}


# Two files


@pytest.mark.parametrize("given", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["taesd_{}.safetensors", "{}.safetensors"])
def test_either_file_of_taesd_stands_for_both(given: str, name: str, tmp_path: Path) -> None:
    model = tiny()
    for part in ("encoder", "decoder"):
        state = taesd(model.state_dict(), "encoder:", "decoder:")
        found = {k.partition(":")[2]: v for k, v in state.items() if k.startswith(part)}
        write(tmp_path / name.format(part), found)
    assert_same(open_single_file(tmp_path / name.format(given)).load(), model)


@pytest.mark.parametrize("name", ["taesd_decoder.safetensors", "taesd.safetensors"])
def test_a_part_of_taesd_alone_is_refused(name: str, tmp_path: Path) -> None:
    state = taesd(tiny().state_dict(), "encoder:", "")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder:")}
    path = write(tmp_path / name, state)
    with pytest.raises(
        RBLNCompileError,
        match=r"holds the decoder alone.*decoder\.safetensors and taesd_encoder\.safetensors",
    ):
        open_single_file(path)


# Kinds and configurations


def published(kind: str) -> Any:
    """A narrow model with the latents of a kind."""
    latents = KINDS[kind].latent_channels
    match KINDS[kind].class_names[0]:
        case "AutoencoderKL":
            quant = latents == 4
            return kl(latent_channels=latents, use_quant_conv=quant, use_post_quant_conv=quant)
        case "AutoencoderKLFlux2":
            return kl(flux2=True, latent_channels=latents)
        case "AutoencoderKLQwenImage":
            return wan(AutoencoderKLQwenImage, z_dim=latents)
        case "AutoencoderKLQwenImage21":
            return wan(AutoencoderKLQwenImage21, z_dim=latents, decoder_base_dim=8)
        case "AutoencoderKLWan":
            return (wan if kind == "wan" else wan_2_2)(z_dim=latents)
        case "AutoencoderTiny":
            return tiny()
        case "AutoencoderKLHunyuanImage":
            return randomised(AutoencoderKLHunyuanImage(3, 3, latents, (32, 64, 128), 1, 4, 384))
        case other:
            raise NotImplementedError(other)


CONSTANTS = {
    "sd": {"scaling_factor": 0.18215, "shift_factor": None, "force_upcast": True},
    "sdxl": {"scaling_factor": 0.13025, "shift_factor": None, "force_upcast": True},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True},
    "z-image": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True},
    "flux2": {"batch_norm_eps": 1e-4, "patch_size": (2, 2), "sample_size": 1024},
    "taesd": {"scaling_factor": 1.0, "shift_factor": 0.0},
    "hunyuan-image": {"scaling_factor": 0.75289},
    "qwen-image": {"latents_mean": (-0.7571, -0.2921, 16), "latents_std": (2.8184, 1.916, 16)},
    "wan": {"latents_mean": (-0.7571, -0.2921, 16), "latents_std": (2.8184, 1.916, 16)},
    "wan2.2": {"latents_mean": (-0.2289, -0.0667, 48), "latents_std": (0.4765, 0.7744, 48)},
    "qwen-image-2.1": {
        "latents_mean": (0.5126, 0.0304, 64),
        "latents_std": (3.2001, 3.8161, 64),
    },
}
"""For lists: the first, the last, and how many."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_tells_the_constants(kind: str, tmp_path: Path) -> None:
    model = published(kind)
    path = write(tmp_path / "vae.safetensors", model.state_dict())
    found = open_single_file(path, kind=kind).load()
    assert type(found) is type(model)
    assert all(map(torch.equal, results(found), results(model)))
    for name, expected in CONSTANTS[kind].items():
        given = found.config[name]
        if name.startswith("latents"):
            given = (given[0], given[-1], len(given))
        assert given == expected, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    other = kl(latent_channels=3) if kind == "taesd" else tiny()
    path = write(tmp_path / "vae.safetensors", other.state_dict())
    with pytest.raises(ValueError, match=f"kind='{kind}' .* holds an {type(other).__name__} "):
        open_single_file(path, kind=kind)


def test_a_kind_with_other_latents_is_refused_by_name_of_those_that_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    with pytest.raises(ValueError, match=r"with 4 latent channels\. Kinds that fit: sd, sdxl\."):
        open_single_file(path, kind="flux")
    with pytest.raises(ValueError, match=r"kind='sd9' is not known\. Known are sd, sdxl, "):
        open_single_file(path, kind="sd9")


def test_a_file_that_suits_wan_and_qwen_is_what_it_is_asked_for_as(tmp_path: Path) -> None:
    model = wan(z_dim=16)
    path = write(tmp_path / "vae.safetensors", wans(model.state_dict()))
    assert open_single_file(path).class_name == "AutoencoderKLWan"
    qwen = open_single_file(path, class_name="AutoencoderKLQwenImage").load()
    assert type(qwen) is AutoencoderKLQwenImage
    assert type(open_single_file(path, kind="qwen-image").load()) is AutoencoderKLQwenImage
    for result, expected in zip(results(qwen), results(model), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("form", ["dict", "directory", "file", "subfolder"])
def test_a_configuration_tells_everything(form: str, tmp_path: Path) -> None:
    model = kl((8, 16), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1)
    path = write(tmp_path / "vae.safetensors", ldm(model.state_dict()))
    model.save_config(tmp_path / "vae")
    config: Any = {
        "dict": json.loads((tmp_path / "vae" / "config.json").read_text()),
        "directory": tmp_path / "vae",
        "file": str(tmp_path / "vae" / "config.json"),
        "subfolder": tmp_path,
    }[form]
    found = open_single_file(path, config=config, subfolder="vae" if form == "subfolder" else None)
    assert_same(found.load(), model)
    assert found.config["scaling_factor"] == 0.5


def test_a_part_of_a_configuration_wins_over_what_is_worked_out(tmp_path: Path) -> None:
    model = kl((8, 16), norm_num_groups=4)
    path = write(tmp_path / "vae.safetensors", ldm(model.state_dict()))
    found = open_single_file(path, kind="sdxl", config={"norm_num_groups": 4, "sample_size": 64})
    loaded = found.load()
    assert all(map(torch.equal, results(loaded), results(model)))
    assert (loaded.config.scaling_factor, loaded.config.sample_size) == (0.13025, 64)

    whole = open_single_file(path, config=dict(model.config))  # as a loaded model has it
    assert_same(whole.load(), model)
    with pytest.raises(ValueError, match="norm_groups"):
        open_single_file(path, config={"norm_groups": 4})
    with pytest.raises(RBLNCompileError, match=r"as config .* norm_num_groups"):
        open_single_file(path).load()


@pytest.mark.parametrize("config", ["nowhere/at-all", "runwayml/stable-diffusion-v1-5"])
def test_a_configuration_that_isnt_here_is_refused(config: str, tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    with pytest.raises(ValueError, match=rf"config='{config}' .* The hub is not asked"):
        open_single_file(path, config=config)


def test_a_configuration_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    with pytest.raises(RBLNCompileError, match="AutoencoderKLNone, which diffusers doesn't have"):
        open_single_file(path, config={"_class_name": "AutoencoderKLNone"})


# Bad files


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", {"lora.down": torch.zeros(2)})
    with pytest.raises(RBLNCompileError, match=r"known layout; it begins with lora.down.*LDM"):
        open_single_file(path)
    with pytest.raises(RBLNCompileError, match="it begins with nothing"):
        open_single_file(write(path, {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_and_unknown_weights_are_refused_by_name(layout: str, tmp_path: Path) -> None:
    make, names = LAYOUTS[layout]
    state = names(make().state_dict())
    last = [name for name in state if name.endswith(".bias") and "decoder" in name][-1]
    missing = {name: tensor for name, tensor in state.items() if name != last}
    path = write(tmp_path / "vae.safetensors", missing)
    with pytest.raises(RBLNCompileError, match="1 weights are missing"):
        open_single_file(path).load()
    prefix = last.split(".")[0]
    path = write(path, {**state, f"{prefix}.extra.weight": torch.zeros(1)})
    with pytest.raises(RBLNCompileError, match=rf"1 weights are unknown \({prefix}.extra.weight\)"):
        open_single_file(path).load()


@pytest.mark.parametrize("weights", [6, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_without_any_one_weight_is_refused(
    layout: str, weights: int, tmp_path: Path
) -> None:
    make, names = LAYOUTS[layout]
    state = names(make().state_dict())
    for lost in list(state)[:: max(1, len(state) // weights)]:
        if lost == "bn.num_batches_tracked":
            continue
        path = write(tmp_path / "vae.safetensors", {k: v for k, v in state.items() if k != lost})
        with pytest.raises(RBLNCompileError):
            open_single_file(path).load()


@pytest.mark.parametrize("shape", [(), (1,), (0, 3, 3, 3), (32, 3, 5, 5), (64, 3, 3, 3)])
@pytest.mark.parametrize("weights", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["LDM", "FLUX.2", "Wan 2.1", "Wan 2.2", "TAESD", "HunyuanImage"])
def test_weights_of_another_shape_are_refused(
    layout: str, weights: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    make, names = LAYOUTS[layout]
    state = names(make().state_dict())
    for name in list(state)[:: max(1, len(state) // weights)]:
        if name != "bn.num_batches_tracked" and state[name].shape != shape:
            path = write(tmp_path / "vae.safetensors", {**state, name: torch.zeros(shape)})
            with pytest.raises(RBLNCompileError, match=r"vae\.safetensors"):
                open_single_file(path).load()


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    state = ldm(kl().state_dict())
    state["encoder.quant_conv.weight"] = state["quant_conv.weight"]
    path = write(tmp_path / "vae.safetensors", state)
    with pytest.raises(RBLNCompileError, match=r"both stand for quant_conv\.weight"):
        open_single_file(path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in ldm(kl().state_dict()).items()}
    path = write(tmp_path / "vae.safetensors", state)
    with pytest.raises(RBLNCompileError, match="has the dtype F8_E4M3, expected one of"):
        open_single_file(path)


class _Code:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the file ran code",))


@pytest.mark.parametrize("content", [pickle.dumps(_Code()), b"", b"x" * 100, None])
def test_what_is_no_safetensors_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(OSError, match=r"vae\.safetensors can't be read as a safetensors file"):
        open_single_file(path)


def test_a_file_that_isnt_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vae\.safetensors"):
        open_single_file(tmp_path / "vae.safetensors")


# Any architecture


@pytest.mark.slow
@settings(max_examples=25)
@given(
    widths=st.lists(st.sampled_from([32, 64]), min_size=1, max_size=4),
    layers=st.integers(1, 3),
    latents=st.integers(1, 8),
    quant=st.booleans(),
    post=st.booleans(),
    attention=st.booleans(),
    flux2=st.booleans(),
    layout=st.sampled_from([plain, old, ldm]),
)
def test_any_kl_is_recognised(
    tmp_path_factory: Any, widths, layers, latents, quant, post, attention, flux2, layout
) -> None:
    model = kl(
        tuple(widths),
        layers_per_block=layers,
        latent_channels=latents,
        use_quant_conv=quant,
        use_post_quant_conv=post,
        mid_block_add_attention=attention,
        flux2=flux2,
    )
    path = write(tmp_path_factory.getbasetemp() / "any_kl.safetensors", layout(model.state_dict()))
    assert_same(open_single_file(path).load(), model, unknown=SCALING)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    multipliers=st.lists(st.sampled_from([1, 2]), max_size=3),
    blocks=st.integers(1, 3),
    temporal=st.lists(st.booleans(), min_size=3, max_size=3),
    layout=st.sampled_from([plain, wans]),
)
def test_any_wan_2_1_is_recognised(
    tmp_path_factory: Any, multipliers, blocks, temporal, layout
) -> None:
    temporal = temporal[: len(multipliers)]
    widths = [1]
    for multiplier in multipliers:  # Wan's decoder halves the width at each level
        widths.append(widths[-1] * multiplier)
    model = wan(
        dim_mult=widths,
        num_res_blocks=blocks,
        temperal_downsample=temporal,
        scale_factor_temporal=2 ** sum(temporal),
        scale_factor_spatial=2 ** len(multipliers),
    )
    path = write(tmp_path_factory.getbasetemp() / "any_wan.safetensors", layout(model.state_dict()))
    assert_same(open_single_file(path).load(), model, unknown=SCALING)


@settings(max_examples=25)
@given(
    encoder=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    decoder=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    latents=st.integers(1, 6),
    layout=st.sampled_from([plain, taesd, taesds]),
)
def test_any_tiny_is_recognised(tmp_path_factory: Any, encoder, decoder, latents, layout) -> None:
    model = tiny(
        num_encoder_blocks=encoder,
        num_decoder_blocks=decoder,
        encoder_block_out_channels=[8] * len(encoder),
        decoder_block_out_channels=[8] * len(decoder),
        latent_channels=latents,
    )
    path = write(
        tmp_path_factory.getbasetemp() / "any_tiny.safetensors", layout(model.state_dict())
    )
    assert_same(open_single_file(path).load(), model)


# Compiled models

OPTIONS = {"target": "cpu", "dtype": "float32"}
ONE_OF_EACH = {
    "AutoencoderKL": "LDM",
    "AutoencoderKLFlux2": "FLUX.2",
    "AutoencoderKLWan": "Wan 2.1",
    "AutoencoderKLQwenImage21": "Qwen-Image-2.1",
    "AutoencoderTiny": "TAESD",
    "AsymmetricAutoencoderKL": "asymmetric",
    "AutoencoderKLHunyuanImage": "HunyuanImage",
    "VQModel": "MoVQ",
}
compiled_classes = pytest.mark.parametrize("name", [n for n in ONE_OF_EACH if n in CLASSES])


@pytest.mark.slow
@compiled_classes
def test_a_file_is_compiled_by_the_class_that_its_weights_suit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBLN_VAE_CACHE", str(tmp_path / "cache"))  # compiled once
    make, names = LAYOUTS[ONE_OF_EACH[name]]
    model = make()
    path = write(tmp_path / "vae.safetensors", names(model.state_dict()))
    for found in (
        RBLNAutoencoder.from_pretrained(path, export=True, rbln_config=OPTIONS),
        class_for(name, name).from_pretrained(str(path), export=None, rbln_config=OPTIONS),
    ):
        assert type(found) is class_for(name, name)
        for result, expected in zip(results(found), results(model), strict=True):
            assert relative_l2(result, expected) < 1e-4


def test_a_class_that_the_weights_dont_suit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", wans(wan().state_dict()))
    with pytest.raises(RBLNCompileError, match="holds AutoencoderKLWan, but RBLNAutoencoderKL "):
        RBLNAutoencoderKL.from_pretrained(path, export=True)


def test_qwens_class_takes_wans_layout(tmp_path: Path) -> None:
    model = wan(AutoencoderKLQwenImage, z_dim=16)
    path = write(tmp_path / "vae.safetensors", wans(model.state_dict()))
    loading: list[tuple[Any, dict[str, str]]] = [
        (RBLNAutoencoderKLQwenImage, {}),
        (RBLNAutoencoder, {"kind": "qwen-image"}),
    ]
    for cls, kind in loading:
        found = cls.from_pretrained(path, export=True, rbln_config=OPTIONS, **kind)
        assert type(found) is RBLNAutoencoderKLQwenImage
        assert found.latent_scaling.known == bool(kind)
        for result, expected in zip(results(found), results(model), strict=True):
            assert relative_l2(result, expected) < 1e-4


def test_a_kind_is_kept_by_the_compiled_model(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    vae = RBLNAutoencoder.from_pretrained(path, export=True, rbln_config=OPTIONS, kind="sdxl")
    vae.save_pretrained(tmp_path / "compiled")
    vae = RBLNAutoencoder.from_pretrained(tmp_path / "compiled")
    assert vae.config.scaling_factor == 0.13025
    assert vae.config.force_upcast
    assert vae.resolved_config.sample_size == (1024, 1024)
    with pytest.raises(ValueError, match=r"kind='sdxl' is for \.safetensors files"):
        RBLNAutoencoder.from_pretrained(tmp_path / "compiled", kind="sdxl")


def test_without_a_kind_what_needs_the_scaling_says_that_it_isnt_known(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    vae = RBLNAutoencoder.from_pretrained(path, export=True, rbln_config=OPTIONS)
    vae.save_pretrained(tmp_path / "compiled")
    vae = RBLNAutoencoder.from_pretrained(tmp_path / "compiled")
    assert vae.config.scaling_factor is None
    for work in (
        vae.latent_scaling.scale,
        vae.latent_scaling.unscale,
        vae.latent_scaling.scale_log_variance,
    ):
        with pytest.raises(ValueError, match=r"scaling .* isn't known.* kind='sdxl'"):
            work(torch.zeros(1, 4, 2, 2))
    vae.register_to_config(scaling_factor=0.5)
    assert vae.latent_scaling.scale(torch.ones(1, 4, 2, 2)).unique() == 0.5


def test_bfloat16_weights_are_compiled_in_float32(tmp_path: Path) -> None:
    model = kl().to(torch.bfloat16)
    path = write(tmp_path / "vae.safetensors", ldm(model.state_dict()))
    for options in ({}, {"torch_dtype": torch.float32}):
        found = RBLNAutoencoder.from_pretrained(path, export=True, rbln_config=OPTIONS, **options)
        for result, expected in zip(results(found), results(model.float()), strict=True):
            assert relative_l2(result, expected) < 1e-4


def test_a_kind_of_a_directory_is_refused(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match=r"kind='sd' is for \.safetensors files"):
        RBLNAutoencoder.from_pretrained(tmp_path / "original", export=True, kind="sd")


def test_an_argument_that_does_nothing_for_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", ldm(kl().state_dict()))
    with pytest.raises(TypeError, match="kidn"):
        RBLNAutoencoder.from_pretrained(path, export=True, kidn="sd")
    with pytest.raises(ValueError, match="original_config isn't needed"):
        RBLNAutoencoder.from_pretrained(path, export=True, original_config="v1.yaml")
