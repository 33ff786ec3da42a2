"""Models in float16: as near as it can be, and no black image, whatever their values are."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import tiny_vaes
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from vaes import capture_part, compile_vae, make_vae, noise, part_of

from rbln_vae import RBLNAutoencoderKLWan, _engine
from rbln_vae.graph.ir import Conv2d, Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.cpu.packing import pack
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import Choices

PARTS = ("encoder", "decoder")
SDXL = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4}
"""Four levels, with three residual blocks each in the decoder, as SDXL's autoencoder."""


def with_stream(vae: AutoencoderKL, size: float) -> AutoencoderKL:
    """A model whose residual streams are larger, and which gives the same images but for eps."""
    larger = copy.deepcopy(vae)
    with torch.no_grad():
        for name, layer in larger.named_modules():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            ends = name.rpartition("coder.")[2]
            if ends == "conv_in" or name.endswith((".conv2", ".to_out.0")):
                layer.weight.mul_(size)
                layer.bias.mul_(size)
            elif name.endswith((".conv_shortcut", "samplers.0.conv")):
                layer.bias.mul_(size)
    return larger


def error_of_bfloat16(vae: AutoencoderKL, part: str, image: Tensor, expected: Tensor) -> float:
    """That of diffusers."""
    half = copy.deepcopy(vae).to(torch.bfloat16)
    return relative_l2(part_of(half, part, image.bfloat16()).float(), expected)


def inputs(part: str, batch: int, vae: AutoencoderKL) -> Tensor:
    if part == "decoder":
        return noise(batch, vae.config.latent_channels, 8, 6)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return noise(batch, 3, 8 * factor, 6 * factor)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stream", [1.0, 3e5])
@pytest.mark.parametrize("options", [{}, SDXL], ids=["small", "as deep as SDXL"])
def test_a_large_residual_stream_costs_no_precision(
    part: str, stream: float, options: dict[str, object]
) -> None:
    vae = with_stream(make_vae(**options), stream)
    image = inputs(part, 4, vae)
    largest: list[float] = []
    watching = getattr(vae, part).conv_norm_out.register_forward_pre_hook(
        lambda _, values: largest.append(float(values[0].abs().max()))
    )
    expected = part_of(vae, part, image)
    watching.remove()
    assert largest[0] > (1e6 if stream > 1 else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = part_of(compile_vae(vae, dtype="float16"), part, image)
    assert relative_l2(found, expected) > 1e-5
    assert relative_l2(found, expected) <= error_of_bfloat16(vae, part, image, expected) / 4


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_images_beyond_the_range_are_run_again_in_bfloat16(part: str) -> None:
    vae = with_stream(make_vae(**SDXL), 1e12)
    image = inputs(part, 3, vae)
    model = compile_vae(vae, dtype="float16")
    with pytest.warns(RuntimeWarning, match=f"The {part} has values beyond .* 65504") as said:
        found = part_of(model, part, image)
        again = part_of(model, part, image)
    assert len(said) == 1 and torch.equal(found, again)
    expected = part_of(vae, part, image)
    own = error_of_bfloat16(vae, part, image, expected)
    assert own / 4 < relative_l2(found, expected) < own * 1.5


def test_only_images_beyond_the_range_are_run_again_and_batches_change_no_bits() -> None:
    vae = with_stream(make_vae(), 1e6)
    model = compile_vae(vae, dtype="float16")
    latents = noise(4, 4, 9, 7)
    latents[1] *= 1000
    latents[3] *= 300
    with pytest.warns(RuntimeWarning, match="beyond the range"):
        together = model.decode(latents).sample
    for n, latent in enumerate(latents):
        assert torch.equal(together[n], model.decode(latent[None]).sample[0])
    in_range = compile_vae(vae, dtype="float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(in_range.decode(latents[::2]).sample, together[::2])


def test_neither_memory_nor_threads_change_what_is_run_again() -> None:
    vae = with_stream(make_vae(block_out_channels=(16, 32)), 1e12)
    model = compile_vae(vae, dtype="float16")
    latents = noise(2, 4, 40, 24)
    with pytest.warns(RuntimeWarning, match="beyond the range"):
        expected = model.decode(latents).sample
        model.enable_tiling()
        least = model.memory_needed("decoder", (1, 4, 40, 24))
        assert torch.equal(model.decode(latents).sample, expected)
        for options in ({"memory_limit": least + 4 * 3 * 80 * 48}, {"num_threads": 3}):
            other = model.with_runtimes(**options)
            out = torch.full_like(expected, 7.0)
            assert torch.equal(other.decode(latents, out=out).sample, expected)


def test_no_row_and_no_picture_is_handed_out_before_its_values_are_known_to_fit() -> None:
    model = compile_vae(with_stream(make_vae(), 1e6), dtype="float16")
    latents = noise(3, 4, 40, 24)
    latents[1] *= 1000
    with pytest.warns(RuntimeWarning, match="beyond the range"):
        expected = model.decode(latents).sample
    assert expected.isfinite().all()
    shown = VaeImageProcessor().postprocess(expected, output_type="pil")
    levels = torch.stack([torch.from_numpy(np.array(picture)) for picture in shown])
    finite = torch.zeros(3, dtype=torch.bool)
    rows: list[Tensor] = []
    found = model.decode_images(
        latents, finite=finite, on_rows=lambda first, each: rows.append(each.clone())
    )
    assert torch.equal(found, levels)
    assert torch.equal(torch.cat(rows, dim=1), levels)
    assert finite.all()


def test_kernels_that_are_kept_are_not_read_where_images_are_stored_in_bfloat16() -> None:
    vae = make_vae(block_out_channels=(96, 96), norm_num_groups=8, layers_per_block=1)
    graph = optimise(capture_part(vae, "decoder"))
    inside = noise(1, 4, 24, 24)
    outside = inside * 1e6
    runtime, never = (
        CpuRuntime(graph, dtype="float16", num_threads=2, choices=Choices(kept_kernels=kept))
        for kept in (True, False)
    )
    with pytest.warns(RuntimeWarning, match="beyond the range"):
        expected = {image: never.run(image) for image in (inside, outside)}
        for image in (inside, inside, outside, inside, outside, outside):
            assert torch.equal(runtime.run(image), expected[image])
    needed = runtime.memory_needed((1, 4, 24, 24))
    if _engine.all_kernels()[-1].winograd:
        assert runtime.kept_kernels.bytes > 0
    limited = CpuRuntime(graph, dtype="float16", num_threads=2, memory_limit=needed)
    with pytest.warns(RuntimeWarning, match="beyond the range"):
        for image in (inside, inside, outside, outside):
            assert torch.equal(limited.run(image), expected[image])


def test_norms_of_pixels_undo_the_factor_of_a_stream_too() -> None:
    vae = tiny_vaes.make("AutoencoderKLWan", base_dim=8)
    with torch.no_grad():
        for name, layer in vae.decoder.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                if name == "conv_in" or name.endswith((".conv2", ".proj")):
                    layer.weight.mul_(1e5)
                    layer.bias.mul_(1e5)
                elif name.endswith(("conv_shortcut", "resample.1")):
                    layer.bias.mul_(1e5)
    z = noise(1, 16, 1, 6, 5)
    with torch.no_grad():
        expected = vae.decode(z).sample
        own = relative_l2(copy.deepcopy(vae).bfloat16().decode(z.bfloat16()).sample, expected)
    model = RBLNAutoencoderKLWan.from_model(vae, rbln_target="cpu", rbln_dtype="float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_l2(model.decode(z).sample, expected) < own / 4


def decoder_graph() -> Graph:
    return optimise(capture_part(make_vae(), "decoder"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "weights"])
@pytest.mark.filterwarnings("ignore:.*beyond the range of float16")
def test_what_is_no_number_is_run_again_at_most_once(
    value: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, image = decoder_graph(), noise(2, 4, 8, 6)
    if where == "input":
        image[0, 1, 2, 3] = value
    else:
        weights = {name: weight.clone() for name, weight in graph.weights.items()}
        first = next(o.weight for o in graph.operations if isinstance(o, Conv2d))
        weights[first].view(-1)[5] = value
        graph = dataclasses.replace(graph, weights=weights)
    runtime, runs = CpuRuntime(graph, dtype="float16"), []
    run_bound = CpuRuntime._run_bound
    monkeypatch.setattr(
        CpuRuntime, "_run_bound", lambda self, *args: runs.append(args) or run_bound(self, *args)
    )
    found, expected = runtime.run(image), CpuRuntime(graph, dtype="float32").run(image)
    assert torch.equal(found.isnan(), expected.isnan())
    assert len(runs) - 1 <= 1 + len(image)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e7, 1e30])
def test_weights_of_any_size_lose_no_more_than_others(size: float) -> None:
    weights = {"w": noise(40, 24, 3, 3) * size, "v": noise(5, 40, 1, 1)}
    operations = (
        Conv2d("a", "x", "w", None, padding=(1, 1, 1, 1)),
        Conv2d("y", "a", "v", None),
    )
    graph = Graph("case", ("x",), 24, ("y",), operations, weights).verify()
    packed = pack(graph, "float16")
    kernels = packed["w"].double() * packed["w.factor"].double()
    assert relative_l2(kernels, pack(graph, "float32")["w"].double()) < 3e-4
    if 1e-4 < size < 1e4:
        image = noise(1, 24, 9, 14)
        found = CpuRuntime(graph, dtype="float16").run(image)
        assert relative_l2(found, CpuRuntime(graph, dtype="float32").run(image)) < 1e-3


@pytest.mark.filterwarnings("ignore:.*beyond the range of float16")
def test_a_run_that_ends_early_has_the_profile_of_what_was_run() -> None:
    runtime = CpuRuntime(decoder_graph(), dtype="float16", activate_profiler=True)
    runtime.run(noise(1, 4, 8, 6) * 1e6)
    first, second = runtime.profiles
    assert 0 < len(first.steps) < len(second.steps)
