"""The nodes for ComfyUI give what diffusers gives, in ComfyUI's conventions for latents."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_vaes
import torch
from comfyui_stand_in import PACKAGE, ComfyUI, Interrupted, LoadedVAE, loaded_package, stand_in
from layouts import State, flux2s, ldm, taesd, wans
from safetensors.torch import save_file
from torch import Tensor
from vaes import TOLERANCE, make_vq, noise

from rbln_vae import RBLNAutoencoder, RBLNAutoencoderKL, __version__
from rbln_vae.config import DTYPES
from rbln_vae.metrics import relative_l2
from rbln_vae.models.cache import Cache

WIDE = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 32}
"""Norms of single files have 32 groups, so the channels must be multiples of that."""
SCALE, SHIFT = 0.25, 0.5


@pytest.fixture(autouse=True)
def _as_comfyui_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without a network, and in inference mode."""

    def refuse(*_: Any) -> None:
        raise AssertionError("no node needs the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.inference_mode():
        yield


@pytest.fixture
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    folder = tmp_path / "vae"
    folder.mkdir()
    return stand_in(folder, monkeypatch)


@pytest.fixture
def nodes(comfyui: ComfyUI) -> Iterator[ModuleType]:
    """The module of the nodes, of a package that was executed as ComfyUI does it."""
    with loaded_package() as package:
        yield sys.modules[f"{package.__name__}.nodes"]


def kl(**options: Any) -> Any:
    return tiny_vaes.make("AutoencoderKL", **{**WIDE, **options})


def flux2() -> Any:
    return tiny_vaes.make("AutoencoderKLFlux2", **WIDE)


def wan() -> Any:
    return tiny_vaes.make("AutoencoderKLWan")


def wan_2_2() -> Any:
    return tiny_vaes.make("AutoencoderKLWan", z_dim=8, **tiny_vaes.WAN_2_2)


def tiny() -> Any:
    return tiny_vaes.make("AutoencoderTiny")


def taesd_of_comfyui(state: State) -> State:
    """As ComfyUI keeps it, with the scale that it knows by the name of the file."""
    scaling = {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
    return {**taesd(state), **scaling}


KINDS: dict[str, tuple[Callable[[], Any], Callable[[State], State], tuple[int, ...]]] = {
    "Stable Diffusion": (kl, ldm, (2, 4, 6, 5)),
    "FLUX.1": (lambda: kl(latent_channels=16, use_quant_conv=False), ldm, (2, 16, 6, 5)),
    "FLUX.2": (flux2, flux2s, (2, 16, 6, 5)),
    "Wan 2.1, Qwen-Image": (wan, wans, (1, 16, 1, 6, 5)),
    "Wan 2.2": (wan_2_2, wans, (1, 8, 1, 6, 5)),
    "TAESD": (tiny, taesd_of_comfyui, (2, 4, 6, 5)),
}
"""For each kind a small model, the layout in which ComfyUI keeps it, and a latent's shape."""


def in_model(model: Any, latent: Tensor) -> Tensor:
    """ComfyUI's latent as diffusers' model takes it."""
    name = type(model).__name__
    if name == "AutoencoderTiny":
        return (latent - SHIFT) * SCALE
    if name == "AutoencoderKLFlux2":
        bn = model.bn
        spread = (bn.running_var + model.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        return torch.nn.functional.pixel_shuffle(
            latent * spread + bn.running_mean.view(1, -1, 1, 1), 2
        )
    return latent


def decoded(model: Any, latent: Tensor) -> Tensor:
    """The image that diffusers decodes, as ComfyUI shows it."""
    image = model.decode(in_model(model, latent)).sample
    return ((image + 1) / 2).clamp(0, 1).movedim(1, -1)


def encoded(model: Any, image: Tensor) -> Tensor:
    """The latent that diffusers encodes."""
    x = image.movedim(-1, 1) * 2 - 1
    found = model.encode(x.unsqueeze(2) if "base_dim" in model.config else x)
    return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents


def compiled(nodes: ModuleType, model: Any, layout: Callable[[State], State] = ldm) -> Any:
    """The VAE that the node for loaded ones makes, in float32."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (vae,) = nodes.RBLNVAECompile().compile(LoadedVAE(layout(weights)), dtype="float32")
    return vae


# Images and latents


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_vae_decodes_and_encodes_as_diffusers(nodes: ModuleType, kind: str) -> None:
    make, layout, shape = KINDS[kind]
    model = make()
    vae = compiled(nodes, model, layout)
    latent = noise(*shape)
    assert vae.latent_channels == shape[1]

    image = vae.decode(latent)
    assert relative_l2(image, decoded(model, latent)) <= TOLERANCE
    factor = vae.spacial_compression_decode()
    assert image.shape[-3:] == (6 * factor, 5 * factor, 3)
    assert 0 <= image.min() < image.max() <= 1

    picture = torch.rand(1, 2 * factor, 3 * factor, 3)
    found = vae.encode(picture)
    assert found.dtype == torch.float32
    assert found.shape[-2:] == (2, 3)
    assert relative_l2(in_model(model, found), encoded(model, picture)) <= TOLERANCE


def test_the_nodes_for_tiles_give_the_bits_of_the_whole_image(nodes: ModuleType) -> None:
    vae = compiled(nodes, kl())
    latent, picture = noise(2, 4, 9, 7), torch.rand(2, 72, 40, 3)
    tiles = {"tile_x": 4, "tile_y": 4, "overlap": 1}
    tiled = vae.decode_tiled(latent, **tiles, tile_t=None, overlap_t=None)
    assert torch.equal(tiled, vae.decode(latent))
    assert torch.equal(vae.encode_tiled(picture, **tiles), vae.encode(picture))


def test_an_image_is_cut_around_its_centre_and_loses_its_alpha(nodes: ModuleType) -> None:
    vae = compiled(nodes, kl())
    picture = torch.rand(1, 8 * 3 + 5, 8 * 2 + 2, 4)
    before = picture.clone()
    assert torch.equal(vae.encode(picture), vae.encode(picture[:, 2:26, 1:17, :3]))
    assert torch.equal(picture, before)


def test_results_stay_as_they_are_when_the_next_run_comes(nodes: ModuleType) -> None:
    vae = compiled(nodes, kl())
    latents = noise(1, 4, 4, 4), noise(1, 4, 4, 4, seed=1)
    first = vae.decode(latents[0])
    kept = first.clone()
    assert not torch.equal(vae.decode(latents[1]), first)
    assert torch.equal(first, kept)
    assert torch.equal(latents[0], noise(1, 4, 4, 4))


def test_images_have_the_dtype_that_comfyui_wants(nodes: ModuleType, comfyui: ComfyUI) -> None:
    vae = compiled(nodes, kl())
    comfyui.dtype = torch.float16
    assert vae.decode(noise(1, 4, 2, 2)).dtype == torch.float16


def test_a_latent_with_an_axis_of_frames_is_taken(nodes: ModuleType) -> None:
    vae = compiled(nodes, kl())
    latent = noise(1, 4, 3, 4, 5)
    assert torch.equal(vae.decode(latent), vae.decode(latent[:, :, 0]))


def test_videos_are_refused(nodes: ModuleType) -> None:
    vae = compiled(nodes, wan(), wans)
    with pytest.raises(ValueError, match="3 frames"):
        vae.decode(noise(1, 16, 3, 4, 4))
    with pytest.raises(ValueError, match="takes 2 images as frames"):
        vae.encode(torch.rand(2, 16, 16, 3))


def test_the_latent_of_another_model_is_refused(nodes: ModuleType) -> None:
    vae = compiled(nodes, flux2(), flux2s)
    with pytest.raises(ValueError, match=r"takes \(N, 16, h, w\)"):
        vae.decode(noise(1, 4, 4, 4))


def test_an_image_of_less_than_a_cell_is_refused(nodes: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"7x64 pixels.*8x8 or more"):
        compiled(nodes, kl()).encode(torch.rand(1, 64, 7, 3))


def test_the_node_decodes_within_its_own_limit_to_the_same_bits(nodes: ModuleType) -> None:
    vae = compiled(nodes, kl())
    latent = noise(1, 4, 64, 64)
    (whole,) = nodes.RBLNVAEDecode().decode({"samples": latent}, vae)
    needed = vae.model.memory_needed("decoder", tuple(latent.shape))
    limit = f"{int(needed * 0.7)}"
    (limited,) = nodes.RBLNVAEDecode().decode({"samples": latent}, vae, limit)
    assert torch.equal(limited, whole)
    (again,) = nodes.RBLNVAEDecode().decode({"samples": latent}, vae, " ")
    assert torch.equal(again, whole)


@pytest.mark.slow
def test_too_little_memory_is_an_error_in_gib_that_names_a_limit_that_suffices(
    nodes: ModuleType,
) -> None:
    vae = compiled(nodes, kl())
    latent = noise(1, 4, 128, 96)
    with pytest.raises(MemoryError, match=r"Decoding an image of 768x1024 with .* GiB") as caught:
        vae.decode(latent, memory_limit="2MiB")
    assert "MiB" not in str(caught.value)
    limit = str(caught.value).split("Raise it to '")[1].split("'")[0]
    assert torch.equal(vae.decode(latent, memory_limit=limit), vae.decode(latent))


def test_images_of_a_video_model_leave_the_node_as_images(nodes: ModuleType) -> None:
    vae = compiled(nodes, wan(), wans)
    (image,) = nodes.RBLNVAEDecode().decode({"samples": noise(1, 16, 1, 2, 3)}, vae)
    assert image.shape == (1, 16, 24, 3)


# Long runs


def slow(vae: Any) -> Any:
    """The same VAE on one thread, so that a run takes a while on every machine."""
    vae.model = vae.model.with_runtimes(num_threads=1)
    return vae


def test_cancelling_ends_a_run_within_a_second(nodes: ModuleType, comfyui: ComfyUI) -> None:
    vae = slow(compiled(nodes, kl()))
    latent = noise(4, 4, 256, 256)
    cancelled_at = []

    def cancel() -> None:
        while comfyui.asked < 3:
            time.sleep(0.01)
        comfyui.cancelled = True
        cancelled_at.append(time.monotonic())

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    with pytest.raises(Interrupted):
        vae.decode(latent)
    assert time.monotonic() - cancelled_at[0] < 1
    thread.join()
    small = noise(1, 4, 2, 2)
    assert vae.decode(small).shape == (1, 16, 16, 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_the_bar_moves_within_one_image(nodes: ModuleType, comfyui: ComfyUI, way: str) -> None:
    vae = slow(compiled(nodes, kl()))
    if way == "decode":
        vae.decode(noise(1, 4, 128, 128))
    else:
        vae.encode(torch.rand(1, 1024, 1024, 3))
    (positions,) = comfyui.bars
    assert positions == sorted(positions)
    assert len({position for position in positions if 0 < position < 1}) >= 2
    assert positions[0] == 0 and positions[-1] == 1


# What can be compiled and loaded


def test_compiling_is_done_once(
    nodes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBLN_VAE_CACHE", str(tmp_path / "cache"))
    first = compiled(nodes, kl())
    (entry,) = Cache(tmp_path / "cache").entries()
    written = {file: file.stat().st_mtime_ns for file in entry.directory.iterdir()}
    second = compiled(nodes, kl())
    (entry,) = Cache(tmp_path / "cache").entries()
    assert {file: file.stat().st_mtime_ns for file in entry.directory.iterdir()} == written
    latent = noise(1, 4, 3, 3)
    assert torch.equal(first.decode(latent), second.decode(latent))


def test_the_weights_of_comfyui_stay_as_they_are(nodes: ModuleType) -> None:
    weights = ldm(kl().half().state_dict())
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    nodes.RBLNVAECompile().compile(LoadedVAE(weights))
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())


def test_a_vae_of_another_kind_is_refused_by_name(nodes: ModuleType) -> None:
    class AudioOobleckVAE(torch.nn.Module): ...

    vae = LoadedVAE({"encoder.layers.0.weight_g": torch.zeros(1)})
    vae.first_stage_model = AudioOobleckVAE()
    with pytest.raises(RuntimeError, match="The AudioOobleckVAE that ComfyUI has loaded holds no"):
        nodes.RBLNVAECompile().compile(vae)


def test_quantised_weights_are_refused(nodes: ModuleType) -> None:
    weights = {k: v.to(torch.float8_e4m3fn) for k, v in ldm(kl().state_dict()).items()}
    with pytest.raises(RuntimeError, match=r"float8_e4m3fn.*convert them first"):
        nodes.RBLNVAECompile().compile(LoadedVAE(weights))


def test_compiling_twice_is_refused(nodes: ModuleType) -> None:
    with pytest.raises(ValueError, match="compiled already"):
        nodes.RBLNVAECompile().compile(compiled(nodes, kl()))


def test_nodes_for_compiled_vaes_refuse_others(nodes: ModuleType) -> None:
    other = LoadedVAE({})
    with pytest.raises(ValueError, match="not a compiled one"):
        nodes.RBLNVAEDecode().decode({"samples": noise(1, 4, 2, 2)}, other)
    with pytest.raises(ValueError, match="not a compiled one"):
        nodes.RBLNVAEPlan().plan(other, 64, 64, 1)


def save(state: State, path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)


@pytest.mark.slow
def test_the_loader_lists_models_and_not_their_files(nodes: ModuleType, comfyui: ComfyUI) -> None:
    folder, other = comfyui.vae_folders[0], comfyui.vae_folders[0].with_name("more")
    comfyui.vae_folders.append(other)
    model = kl()
    save(model.state_dict(), folder / "plain.safetensors")
    (folder / "sub").mkdir()
    save(ldm(model.state_dict()), folder / "sub" / "ldm.safetensors")
    (folder / "notes.txt").touch()
    model.save_pretrained(other / "diffusers")
    with torch.inference_mode(False):
        RBLNAutoencoderKL.from_model(model).save_pretrained(other / "made" / "compiled")
    (folder / "linked").symlink_to(other / "made", target_is_directory=True)
    (folder / "sub" / "circle").symlink_to(folder, target_is_directory=True)

    inputs = nodes.RBLNVAELoader.INPUT_TYPES()
    names, _ = inputs["required"]["model"]
    expected = ["diffusers", "linked/compiled", "made/compiled", "plain.safetensors"]
    assert names == [*expected, "sub/ldm.safetensors"]

    latent = noise(1, 4, 3, 2)
    for name in names:
        options = {} if "compiled" in name else {"dtype": "float32"}
        (vae,) = nodes.RBLNVAELoader().load(name, **options)
        tolerance = 0.05 if "compiled" in name else TOLERANCE  # the dtype that suits the machine
        assert relative_l2(vae.decode(latent), decoded(model, latent)) <= tolerance, name


@pytest.mark.parametrize("name", ["../secret.safetensors", "gone.safetensors", "/etc"])
def test_the_loader_stays_in_its_folders(nodes: ModuleType, comfyui: ComfyUI, name: str) -> None:
    save(kl().state_dict(), comfyui.vae_folders[0].parent / "secret.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no model"):
        nodes.RBLNVAELoader().load(name)


def test_a_directory_that_was_saved_again_is_loaded_again(
    nodes: ModuleType, comfyui: ComfyUI
) -> None:
    directory = comfyui.vae_folders[0] / "model"
    kl().save_pretrained(directory)
    before = nodes.RBLNVAELoader.IS_CHANGED("model", dtype="auto")
    assert nodes.RBLNVAELoader.IS_CHANGED("model") == before
    time.sleep(0.02)
    kl(seed=1).save_pretrained(directory)
    assert nodes.RBLNVAELoader.IS_CHANGED("model") != before


def test_a_taesd_alone_is_refused_since_its_scale_is_unknown(
    nodes: ModuleType, comfyui: ComfyUI
) -> None:
    save(taesd(tiny().state_dict()), comfyui.vae_folders[0] / "taesd.safetensors")
    with pytest.raises(ValueError, match=r"taesd\.safetensors is a small autoencoder"):
        nodes.RBLNVAELoader().load("taesd.safetensors")


def test_a_vq_model_is_refused(nodes: ModuleType, comfyui: ComfyUI) -> None:
    make_vq().save_pretrained(comfyui.vae_folders[0] / "movq")
    with pytest.raises(ValueError, match="movq is a VQModel"):
        nodes.RBLNVAELoader().load("movq")


def test_a_file_of_something_else_is_refused_by_its_name(
    nodes: ModuleType, comfyui: ComfyUI
) -> None:
    save({"voice.weight": torch.zeros(1)}, comfyui.vae_folders[0] / "audio.safetensors")
    with pytest.raises(RuntimeError, match=r"audio\.safetensors holds no autoencoder"):
        nodes.RBLNVAELoader().load("audio.safetensors")


# What else ComfyUI asks


def test_the_plan_says_what_encoding_and_decoding_take(nodes: ModuleType) -> None:
    (text,) = nodes.RBLNVAEPlan().plan(compiled(nodes, kl()), width=512, height=256, batch_size=2)
    assert "encoder on 2x3x256x512" in text
    assert "decoder on 2x4x32x64" in text


def test_nodes_of_others_find_the_members_that_they_read(nodes: ModuleType) -> None:
    vae = compiled(nodes, wan(), wans)
    assert (vae.latent_channels, vae.latent_dim, vae.output_channels) == (16, 3, 3)
    assert (vae.downscale_ratio, vae.upscale_ratio) == (8, 8)
    assert vae.spacial_compression_encode() == 8
    assert vae.temporal_compression_decode() is None
    assert vae.patcher.clone().model is vae.first_stage_model
    assert vae.vae_encode_crop_pixels(torch.rand(1, 17, 9, 3)).shape == (1, 16, 8, 3)
    vae.throw_exception_if_invalid()
    with pytest.raises(RuntimeError, match="node that saves"):
        vae.get_sd()


@pytest.mark.parametrize("text", ["", " ", "2GiB", "500MB", None])
def test_a_limit_that_can_be_read_is_accepted(nodes: ModuleType, text: str | None) -> None:
    assert nodes.RBLNVAEDecode.VALIDATE_INPUTS(memory_limit=text) is True


@pytest.mark.parametrize("text", ["2 gigs", "-1", "0"])
def test_another_limit_is_refused_before_anything_runs(nodes: ModuleType, text: str) -> None:
    for node in (nodes.RBLNVAELoader, nodes.RBLNVAECompile, nodes.RBLNVAEDecode):
        assert f"memory_limit={text!r}" in node.VALIDATE_INPUTS(memory_limit=text)


def test_a_dtype_that_a_compiled_model_does_not_have_is_refused(
    nodes: ModuleType, comfyui: ComfyUI
) -> None:
    with torch.inference_mode(False):
        model = RBLNAutoencoder.from_model(kl(), rbln_dtype="float32")
        model.save_pretrained(comfyui.vae_folders[0] / "model")
    with pytest.raises(ValueError, match="dtype"):
        nodes.RBLNVAELoader().load("model", dtype="bfloat16")
    nodes.RBLNVAELoader().load("model", dtype="auto", memory_limit=" ")


def test_without_rbln_vae_each_node_says_how_to_install_it(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rbln_vae", None)
    with pytest.raises(RuntimeError, match="pip install rbln-vae"):
        nodes.RBLNVAECompile().compile(LoadedVAE({}))
    with pytest.raises(RuntimeError, match="pip install rbln-vae"):
        nodes.RBLNVAELoader().load("any")


# The package


def test_importing_the_package_needs_nothing_of_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("comfy", "folder_paths", "rbln_vae"):
        monkeypatch.setitem(sys.modules, name, None)
    with loaded_package() as package:
        assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()


def test_every_node_declares_what_its_function_takes(nodes: ModuleType) -> None:
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        names = [name for group in inputs.values() for name in group]
        function = getattr(node, node.FUNCTION)
        assert names == list(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        assert len(function.__defaults__ or ()) == len(inputs.get("optional", {}))
        declared = [each for group in inputs.values() for each in group.values()]
        assert all("tooltip" in options for _, options in declared)


def test_the_dtypes_to_choose_from_are_those_of_the_package(nodes: ModuleType) -> None:
    for node in (nodes.RBLNVAELoader, nodes.RBLNVAECompile):
        choices, _ = node.INPUT_TYPES()["optional"]["dtype"]
        assert choices == ["auto", *DTYPES]


def test_the_example_workflow_has_the_inputs_of_the_nodes(nodes: ModuleType) -> None:
    (file,) = (PACKAGE / "example_workflows").glob("*.json")
    workflow = json.loads(file.read_text(encoding="utf-8"))
    ours = [node for node in workflow["nodes"] if node["type"] in nodes.NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in ours} == {"RBLNVAECompile", "RBLNVAEDecode", "RBLNVAEPlan"}
    ends = {}
    for node in workflow["nodes"]:
        for slot, output in enumerate(node["outputs"]):
            ends.update({link: [node["id"], slot] for link in output["links"] or ()})
    for link, origin, slot, *_ in workflow["links"]:
        assert ends.pop(link) == [origin, slot]
    assert not ends
    for node in ours:
        inputs = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        declared = {name: kind for group in inputs.values() for name, (kind, _) in group.items()}
        sockets = {each["name"]: each["type"] for each in node["inputs"]}
        links = {name: kind for name, kind in declared.items() if kind in ("VAE", "LATENT")}
        assert sockets == links
        assert len(node["widgets_values"]) == len(declared) - len(links)


def test_installing_the_package_replaces_no_torch() -> None:
    lines = (PACKAGE / "requirements.txt").read_text(encoding="utf-8").split()
    assert [line for line in lines if line.startswith("rbln-vae")]
    assert not [line for line in lines if line.startswith(("torch", "comfy"))]


def test_the_package_has_the_version_of_rbln_vae() -> None:
    assert f'version = "{__version__}"' in (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")
