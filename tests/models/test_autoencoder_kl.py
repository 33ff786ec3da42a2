"""A compiled `AutoencoderKL` gives what diffusers gives, and takes what it takes."""

from __future__ import annotations

import copy
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vaes import (
    TOLERANCE,
    assert_same_model,
    compile_vae,
    default_compiled,
    default_vae,
    make_vae,
    moments,
    noise,
    pixels,
)

from rbln_vae import (
    RBLNAutoencoderKL,
    RBLNAutoencoderKLConfig,
    RBLNCancelledError,
    RBLNCompileError,
    RBLNRuntimeError,
)
from rbln_vae.metrics import relative_l2
from rbln_vae.targets.reference import ReferenceTarget
from rbln_vae.units import byte_count

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-4}
"""How far a result may be from float32, because of the dtype that carries it."""


@pytest.fixture(scope="module")
def decoder_only() -> RBLNAutoencoderKL:
    return compile_vae(default_vae(), uses_encoder=False)


def image(batch: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return noise(batch, 3, height, width, seed=seed)


def latent(batch: int = 1, height: int = 8, width: int = 8, seed: int = 1) -> torch.Tensor:
    return noise(batch, 4, height, width, seed=seed)


# The comparison itself


def test_the_models_of_these_tests_are_lively_in_every_part():
    """An error anywhere in a model, its attention too, would be seen in its result."""
    vae = make_vae()
    z = latent()
    expected = pixels(vae, z)
    for part in (vae.decoder.mid_block, vae.encoder.mid_block):
        part.attentions = torch.nn.ModuleList([None])  # which the block then leaves out
    assert relative_l2(pixels(vae, z), expected) > 1000 * TOLERANCE
    assert relative_l2(moments(vae, image()), moments(default_vae(), image())) > 1000 * TOLERANCE
    assert 0.2 < expected.std() < 5


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_attention_prefers_some_pixels_to_others(part):
    """With uniform attention the results would differ: queries and keys matter."""
    vae = make_vae()
    getattr(vae, part).mid_block.attentions[0].to_q.weight.zero_()
    getattr(vae, part).mid_block.attentions[0].to_q.bias.zero_()
    run, x = (moments, image()) if part == "encoder" else (pixels, latent())
    assert relative_l2(run(vae, x), run(default_vae(), x)) > 100 * TOLERANCE


# Architectures


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 4]))
    blocks = draw(st.sampled_from([1, 2, 2, 3]))
    channels = [groups * draw(st.sampled_from([2, 3, 4])) for _ in range(blocks)]
    attention = draw(st.sampled_from([False, False, True]))
    down = [f"{'Attn' if attention and i == 0 else ''}DownEncoderBlock2D" for i in range(blocks)]
    up = [f"{'Attn' if attention and i == 0 else ''}UpDecoderBlock2D" for i in range(blocks)]
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "norm_num_groups": groups,
        "layers_per_block": draw(st.integers(1, 2)),
        "latent_channels": draw(st.sampled_from([1, 3, 4, 16])),
        "in_channels": draw(st.sampled_from([1, 3, 4])),
        "out_channels": draw(st.sampled_from([1, 3])),
        "act_fn": draw(st.sampled_from(["silu", "silu", "swish", "mish", "gelu", "relu"])),
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
        "mid_block_add_attention": draw(st.sampled_from([True, True, False])),
        "sample_size": 8 * 2 ** (blocks - 1),
    }


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same in every run: a failure is never of one machine alone
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    options=architectures(),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_any_architecture_is_compiled_saved_loaded_and_equal_to_diffusers(
    tmp_path_factory, options, seed, batch, height, width
):
    vae = make_vae(seed, **options)
    directory = tmp_path_factory.mktemp("model")
    compile_vae(vae, create_runtimes=False).save_pretrained(directory)
    loaded = RBLNAutoencoderKL.from_pretrained(directory)
    factor = 2 ** (len(options["block_out_channels"]) - 1)
    assert loaded.rbln_config.vae_scale_factor == factor
    x = noise(batch, options["in_channels"], height * factor, width * factor, seed=seed)
    z = noise(batch, options["latent_channels"], height, width, seed=seed + 1)
    assert relative_l2(moments(loaded, x), moments(vae, x)) <= TOLERANCE
    assert relative_l2(pixels(loaded, z), pixels(vae, z)) <= TOLERANCE


def test_eight_blocks_are_as_good_as_two():
    vae = make_vae(block_out_channels=(4,) * 8, sample_size=128, norm_num_groups=2)
    assert compile_vae(vae).rbln_config.vae_scale_factor == 128
    assert_same_model(compile_vae(vae), vae)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_is_stored_in_half_precision_is_compiled_exactly(dtype):
    vae = make_vae().to(dtype)
    compiled = compile_vae(vae)
    assert vae.dtype is dtype
    assert_same_model(compiled, vae.float())


@pytest.mark.usefixtures("captured_anew")
def test_compiling_leaves_the_model_as_it_was():
    vae = make_vae().train()
    vae.set_default_attn_processor()
    vae.enable_tiling()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    processors = dict(vae.attn_processors)
    compile_vae(vae)
    assert vae.training
    assert vae.use_tiling
    assert vae.attn_processors == processors
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())


def test_a_model_can_be_run_and_inspected_while_it_is_compiled():
    vae = make_vae().train()
    vae.set_default_attn_processor()
    z, compiling, seen = latent(), threading.current_thread(), []
    expected = pixels(vae, z)

    def look(*_):
        """Run the model and read its state in another thread, in the middle of compiling."""
        if threading.current_thread() is compiling:
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(lambda: (pixels(vae, z), state(vae))).result())

    for part in (vae.encoder, vae.decoder):
        part.mid_block.attentions[0].register_forward_hook(look)
    before = state(vae)
    compile_vae(vae)
    assert seen
    for image, found in seen:
        assert torch.equal(image, expected)
        assert found == before
    assert state(vae) == before


def state(vae) -> list[Any]:
    """What can be read on a model: its modules, their processors and hooks, and its weights."""
    modules = [
        (
            name,
            id(module),
            module.training,
            id(getattr(module, "processor", None)),
            tuple(module._forward_hooks.values()),
        )
        for name, module in vae.named_modules()
    ]
    weights = [(name, id(w), type(w), w.dtype) for name, w in vae.named_parameters()]
    return modules + weights


@pytest.mark.usefixtures("captured_anew")
def test_several_models_can_be_compiled_at_once():
    vaes = [make_vae(seed=seed, block_out_channels=(8,)) for seed in range(4)]
    call, get = torch.nn.Module.__call__, torch.nn.Module.__getattr__
    with ThreadPoolExecutor(len(vaes)) as pool:
        compiled = list(pool.map(compile_vae, vaes))
    for model, vae in zip(compiled, vaes, strict=True):
        assert_same_model(model, vae)
    # torch.export replaces these meanwhile; two exports at once would leave a replacement behind.
    assert torch.nn.Module.__call__ is call
    assert torch.nn.Module.__getattr__ is get


@pytest.mark.usefixtures("captured_anew")
def test_changing_the_model_afterwards_changes_nothing_that_was_compiled():
    vae = make_vae()
    compiled = compile_vae(vae)
    for weight in vae.parameters():
        weight.zero_()
    assert_same_model(compiled, default_vae())


def test_tiling_of_the_model_is_left_out():
    """The compiled model is that of the whole image, with no seams."""
    vae = make_vae()
    vae.enable_tiling()
    z = latent(1, 40, 40)
    assert relative_l2(pixels(compile_vae(vae), z), pixels(default_vae(), z)) <= TOLERANCE


def test_a_model_that_can_not_be_captured_names_the_operation_and_its_place():
    vae = make_vae()

    class Sine(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x)

    vae.decoder.conv_act = Sine()
    with pytest.raises(RBLNCompileError, match=r"(?s)sin.*decoder\.conv_act"):
        compile_vae(vae)


# What the model is compiled for


def test_the_configuration_takes_from_the_model_what_it_leaves_open():
    config = default_compiled().rbln_config
    assert (config.in_channels, config.latent_channels) == (3, 4)
    assert config.vae_scale_factor == 2
    assert config.image_size == (16, 16)
    assert config.latent_sample_size == (8, 8)
    assert config.uses_encoder is True
    assert config.batch_size == 1
    assert config.is_frozen()


def test_the_best_dtype_of_the_target_is_chosen_where_none_is_named():
    model = RBLNAutoencoderKL.from_model(default_vae(), rbln_target="reference")
    assert model.rbln_config.dtype == "float32"
    assert model.dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [("in_channels", 4, 3), ("latent_channels", 16, 4), ("vae_scale_factor", 8, 2)],
)
def test_an_option_in_conflict_with_the_model_is_an_error(name, value, own):
    with pytest.raises(ValueError, match=f"{name}={value} is in conflict .* has {own}"):
        compile_vae(default_vae(), **{name: value})


def test_a_sample_size_that_does_not_fit_the_model_is_found_before_compiling():
    with pytest.raises(ValueError, match="nearest are height 32 or 34 and width 16"):
        compile_vae(default_vae(), sample_size=(33, 16))


def test_the_compiled_parts_are_encoder_and_decoder(decoder_only):
    assert set(default_compiled().compiled_models) == {"encoder", "decoder"}
    assert set(decoder_only.compiled_models) == {"decoder"}


def test_the_configuration_of_the_model_is_read_as_that_of_diffusers():
    config = default_compiled().config
    assert config.scaling_factor == default_vae().config.scaling_factor
    assert config["latent_channels"] == 4
    assert len(config.block_out_channels) == 2
    with pytest.raises(AttributeError):
        _ = config.no_such_key


# Encode, decode and forward in all their forms


def test_encode_gives_the_distribution_of_diffusers():
    output = default_compiled().encode(image())
    assert type(output) is AutoencoderKLOutput
    assert type(output.latent_dist) is DiagonalGaussianDistribution
    assert output.latent_dist.mean.shape == (1, 4, 8, 8)
    assert relative_l2(moments(default_compiled(), image()), moments(default_vae(), image())) < 1e-4


def test_encode_gives_a_tuple_where_asked():
    for posteriors in (
        default_compiled().encode(image(), return_dict=False),
        default_compiled().encode(image(), False),
        default_compiled().encode(x=image(), return_dict=False),
    ):
        assert isinstance(posteriors, tuple)
        (posterior,) = posteriors
        assert type(posterior) is DiagonalGaussianDistribution


def test_decode_gives_the_output_of_diffusers():
    output = default_compiled().decode(latent())
    assert type(output) is DecoderOutput
    assert output.sample.shape == (1, 3, 16, 16)
    assert relative_l2(output.sample, pixels(default_vae(), latent())) <= TOLERANCE


def test_decode_gives_a_tuple_where_asked():
    for samples in (
        default_compiled().decode(latent(), return_dict=False),
        default_compiled().decode(latent(), False),
        default_compiled().decode(z=latent(), return_dict=False),
    ):
        assert isinstance(samples, tuple)
        assert torch.equal(samples[0], default_compiled().decode(latent()).sample)
        assert len(samples) == 1


def test_the_generator_that_diffusers_passes_is_accepted_and_not_drawn_from():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    default_compiled().decode(latent(), return_dict=False, generator=generator)
    default_compiled().encode(image(), generator=generator)
    default_compiled().decode(latent(), generator=None)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_an_unknown_argument_is_an_error_that_suggests_the_nearest(method):
    x = image() if method == "encode" else latent()
    with pytest.raises(TypeError, match=f"'genrator' is no argument of {method}.*'generator'"):
        getattr(default_compiled(), method)(x, genrator=None)


def test_forward_goes_by_the_mode_of_the_posterior_unless_told():
    expected = default_vae()(image()).sample
    for run in (default_compiled(), default_compiled().forward):
        output = run(image())
        assert type(output) is DecoderOutput
        assert relative_l2(output.sample, expected) <= TOLERANCE
    assert torch.equal(default_compiled()(image(), return_dict=False)[0], output.sample)
    assert torch.equal(default_compiled()(sample=image()).sample, output.sample)


def test_forward_draws_from_the_generator_the_noise_that_diffusers_draws():
    expected = default_vae()(
        image(), sample_posterior=True, generator=torch.Generator().manual_seed(5)
    ).sample
    for arguments in ((True,), (True, True, torch.Generator().manual_seed(5))):
        keywords = {} if len(arguments) > 1 else {"generator": torch.Generator().manual_seed(5)}
        sample = default_compiled()(image(), *arguments, **keywords).sample
        assert relative_l2(sample, expected) <= TOLERANCE
    other = default_compiled()(image(), True, generator=torch.Generator().manual_seed(6)).sample
    assert relative_l2(other, expected) > 0.01


def test_a_sample_of_the_posterior_is_that_of_diffusers():
    ours = default_compiled().encode(image(2)).latent_dist
    theirs = default_vae().encode(image(2)).latent_dist
    for seed in (1, 2):
        drawn = ours.sample(generator=torch.Generator().manual_seed(seed))
        expected = theirs.sample(generator=torch.Generator().manual_seed(seed))
        assert relative_l2(drawn, expected) <= TOLERANCE
    assert relative_l2(ours.kl(), theirs.kl()) <= TOLERANCE


def test_no_gradient_is_kept():
    x = image().requires_grad_()
    assert not default_compiled()(x).sample.requires_grad


# Tensors


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_dtype_that_comes_in_goes_out(dtype):
    x, z = image().to(dtype), latent().to(dtype)
    parameters = moments(default_compiled(), x)
    sample = pixels(default_compiled(), z)
    assert parameters.dtype is sample.dtype is default_compiled()(x).sample.dtype is dtype
    assert relative_l2(parameters, moments(default_vae(), x.float())) <= ROUNDING[dtype]
    assert relative_l2(sample, pixels(default_vae(), z.float())) <= ROUNDING[dtype]


STRIDES = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "at an offset": lambda x: torch.cat([x[:1], x])[1:],
    "of a batch axis": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_will_do(strides):
    x, z = image(2), latent(2)
    strided_x, strided_z = STRIDES[strides](x), STRIDES[strides](z)
    assert torch.equal(strided_x, x)
    assert relative_l2(moments(default_compiled(), strided_x), moments(default_vae(), x)) < 1e-4
    assert relative_l2(pixels(default_compiled(), strided_z), pixels(default_vae(), z)) < 1e-4


def test_an_expanded_tensor_will_do():
    z = latent().expand(3, -1, -1, -1)
    sample = pixels(default_compiled(), z)
    assert relative_l2(sample, pixels(default_vae(), z)) <= TOLERANCE


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inputs_are_not_written_to(dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image().to(dtype).contiguous(memory_format=layout)
        z = latent().to(dtype).contiguous(memory_format=layout)
        before = x.clone(), z.clone()
        default_compiled()(x)
        default_compiled().decode(z)
        assert torch.equal(x, before[0])
        assert torch.equal(z, before[1])


def test_an_output_is_never_used_again():
    kept = [default_compiled().decode(latent(seed=seed)).sample for seed in (1, 2, 3)]
    posteriors = [default_compiled().encode(image(seed=seed)).latent_dist for seed in (1, 2, 3)]
    copies = [tensor.clone() for tensor in kept]
    means = [posterior.mean.clone() for posterior in posteriors]
    for seed in (4, 5):
        default_compiled()(image(seed=seed))
    assert len({tensor.data_ptr() for tensor in kept}) == len(kept)
    for tensor, copied in zip(kept, copies, strict=True):
        assert torch.equal(tensor, copied)
    for posterior, mean in zip(posteriors, means, strict=True):
        assert torch.equal(posterior.mean, mean)


def test_an_output_may_be_written_to():
    z = latent()
    first = default_compiled().decode(z).sample
    expected = first.clone()
    first.mul_(0)
    assert torch.equal(default_compiled().decode(z).sample, expected)


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_an_image_is_written_to_where_the_caller_says(target, tmp_path):
    compiled = compile_vae(make_vae(), target=target, dtype="float32")
    z = latent(2, 6, 5)
    expected = pixels(compiled, z)
    file = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", "float32", (2, 3, 12, 10))
    sample = compiled.decode(z, out=file).sample
    file.flush()
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "large.npy")), expected)
    assert torch.equal(sample, expected)
    half = torch.zeros(2, 12, 10, 3, dtype=torch.float16).permute(0, 3, 1, 2)
    assert compiled.decode(z, out=half, return_dict=False)[0].data_ptr() == half.data_ptr()
    assert torch.equal(half, expected.half())


def test_what_can_not_be_written_to_is_refused():
    compiled, z = default_compiled(), latent(1, 4, 4)
    with pytest.raises(ValueError, match=r"must have the shape \(1, 3, 8, 8\)"):
        compiled.decode(z, out=torch.zeros(1, 3, 8, 9))
    with pytest.raises(TypeError, match="float64"):
        compiled.decode(z, out=np.zeros((1, 3, 8, 8)))
    with pytest.raises(TypeError, match="int32"):
        compiled.decode(z, out=torch.zeros(1, 3, 8, 8, dtype=torch.int32))
    with pytest.raises(TypeError, match="a list"):
        compiled.decode(z, out=[])
    fixed = np.zeros((1, 3, 8, 8), dtype=np.float32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="can't be written to"):
        compiled.decode(z, out=fixed)


def test_the_global_generator_is_not_drawn_from():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    default_compiled()(image())
    compile_vae(make_vae())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 1, 1), (1, 8, 8), (2, 3, 5), (3, 1, 9), (5, 7, 2), (1, 33, 17), (1, 8, 8)],
)
def test_one_compiled_model_takes_every_size_and_batch(batch, height, width):
    z, x = latent(batch, height, width), image(batch, 2 * height, 2 * width)
    sample, parameters = pixels(default_compiled(), z), moments(default_compiled(), x)
    assert sample.shape == (batch, 3, 2 * height, 2 * width)
    assert parameters.shape == (batch, 8, height, width)
    assert relative_l2(sample, pixels(default_vae(), z)) <= TOLERANCE
    assert relative_l2(parameters, moments(default_vae(), x)) <= TOLERANCE


def test_each_image_of_a_batch_is_on_its_own():
    z = latent(3)
    whole = pixels(default_compiled(), z)
    for index in range(3):
        assert relative_l2(whole[index], pixels(default_compiled(), z[index : index + 1])[0]) < 1e-5


def test_what_is_not_finite_stays_visible():
    z = latent()
    z[0, 0, 0, 0] = torch.nan
    assert not default_compiled().decode(z).sample.isfinite().all()


# Decoder only


def test_a_decoder_alone_decodes_as_the_whole_model(decoder_only):
    assert decoder_only.rbln_config.uses_encoder is False
    assert torch.equal(pixels(decoder_only, latent()), pixels(default_compiled(), latent()))


def test_a_decoder_alone_says_how_to_get_an_encoder(decoder_only):
    for run in (decoder_only.encode, decoder_only):
        with pytest.raises(RBLNRuntimeError, match="rbln_uses_encoder=True"):
            run(image())


# Bad input


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        ("encode", (3, 16, 16), r"\(N, 3, H, W\).*\(3, 16, 16\)"),
        ("encode", (1, 1, 3, 16, 16), r"\(N, 3, H, W\)"),
        ("encode", (1, 4, 16, 16), r"\(N, 3, H, W\).*\(1, 4, 16, 16\)"),
        ("encode", (0, 3, 16, 16), "no empty axis"),
        ("encode", (1, 3, 0, 16), "no empty axis"),
        ("encode", (1, 3, 16, 1), "16x1 is no image size .* height and width must be 2 or more"),
        ("decode", (4, 8, 8), r"\(N, 4, H, W\).*\(4, 8, 8\)"),
        ("decode", (1, 3, 8, 8), r"\(N, 4, H, W\).*\(1, 3, 8, 8\)"),
        ("decode", (0, 4, 8, 8), "no empty axis"),
        ("decode", (1, 4, 8, 0), "no empty axis"),
        ("decode", (), r"\(N, 4, H, W\)"),
    ],
)
def test_a_wrong_shape_is_an_error_that_says_which_is_right(method, shape, expected):
    with pytest.raises(ValueError, match=expected):
        getattr(default_compiled(), method)(torch.zeros(shape))


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.complex128], ids=str
)
def test_a_dtype_that_is_not_floating_is_an_error(method, dtype):
    x = (latent() if method == "decode" else image()).to(dtype)
    with pytest.raises(TypeError, match=f"floating tensor, and is {dtype}"):
        getattr(default_compiled(), method)(x)


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
@pytest.mark.parametrize("value", [None, 5, [[1.0]], "image.png", image().numpy()], ids=repr)
def test_what_is_no_tensor_is_an_error(method, value):
    with pytest.raises(TypeError, match=f"torch tensor, and is a {type(value).__name__}"):
        getattr(default_compiled(), method)(value)


def test_a_tensor_without_data_is_an_error():
    with pytest.raises(ValueError, match=r"dense tensor with data, and is .* on meta"):
        default_compiled().decode(latent().to("meta"))


def test_a_sparse_tensor_is_an_error():
    with pytest.raises(ValueError, match=r"dense tensor .* torch\.sparse_coo"):
        default_compiled().decode(latent().to_sparse())


def test_after_bad_input_the_model_is_as_before():
    for bad in (torch.zeros(1), torch.zeros(1, 9, 8, 8), None):
        with pytest.raises((ValueError, TypeError)):
            default_compiled().decode(bad)
    assert_same_model(default_compiled(), default_vae())


# Static shapes


class StaticTarget(ReferenceTarget):
    """Takes one shape, as an NPU does."""

    name = "rbln"
    static_shapes = True


@pytest.fixture
def static(monkeypatch) -> RBLNAutoencoderKL:
    monkeypatch.setattr("rbln_vae.targets.rbln.TARGET", StaticTarget())
    return compile_vae(default_vae(), target="rbln", batch_size=2, sample_size=(16, 24))


def test_a_static_target_takes_the_compiled_shape(static):
    assert relative_l2(
        pixels(static, latent(2, 8, 12)), pixels(default_vae(), latent(2, 8, 12))
    ) < (TOLERANCE)
    assert moments(static, image(2, 16, 24)).shape == (2, 8, 8, 12)


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 12, 8), (2, 8, 8), (4, 8, 12)])
def test_a_static_target_names_the_compiled_shape_where_another_comes(static, shape):
    batch, height, width = shape
    with pytest.raises(ValueError, match=r"decoder was compiled for .*\(2, 4, 8, 12\)") as raised:
        static.decode(latent(batch, height, width))
    assert str((batch, 4, height, width)) in str(raised.value)
    assert "rbln_sample_size" in str(raised.value)
    with pytest.raises(ValueError, match=r"encoder was compiled for .*\(2, 3, 16, 24\)"):
        static.encode(image(batch, 2 * height, 2 * width))


# Options of a run


def test_a_run_that_takes_too_long_is_given_up_and_the_model_stays_usable():
    vae = compile_vae(default_vae(), timeout=2)
    long = latent(1, 512, 512)  # its attention alone takes some TFLOP
    with pytest.raises(TimeoutError, match=r"timeout=2 .*longer timeout"):
        vae.decode(long)
    assert_same_model(vae, default_vae())


def test_no_limit_of_time_is_inf():
    assert_same_model(compile_vae(default_vae(), timeout=float("inf")), default_vae())


def test_a_run_over_the_memory_limit_names_what_it_needs():
    vae = compile_vae(default_vae(), memory_limit="1MiB")
    with pytest.raises(MemoryError, match=r"decoder .* is 1\.0 MiB\.") as raised:
        vae.decode(latent(1, 512, 512))
    advised = re.search(r"Raise it to '(.*)'", str(raised.value))
    assert advised is not None
    assert byte_count(advised[1]) > 512 * 512 * 8 * 4
    assert_same_model(vae, default_vae())  # small ones run


def test_the_smaller_limit_of_a_run_and_its_model_holds():
    vae = compile_vae(default_vae(), memory_limit="1MiB")
    z, x = latent(1, 512, 512), noise(1, 3, 1024, 1024)
    for run, sample in ((vae.decode, z), (vae.encode, x), (vae.decode_images, z)):
        with pytest.raises(MemoryError, match=r"memory_limit is 1\.0 MiB\."):
            run(sample, memory_limit="1GiB")
        with pytest.raises(MemoryError, match=r"memory_limit is 1000 bytes\."):
            run(sample, memory_limit=1000)
        with pytest.raises(ValueError, match="memory_limit='much': expected a number of bytes"):
            run(sample, memory_limit="much")


@pytest.mark.parametrize("number", [1, 2])
def test_the_number_of_threads_is_an_option_of_the_model_alone(number):
    before = torch.get_num_threads()
    assert_same_model(compile_vae(default_vae(), num_threads=number), default_vae())
    assert torch.get_num_threads() == before


def test_a_model_without_runtimes_says_how_to_load_it():
    vae = compile_vae(default_vae(), create_runtimes=False)
    for run, x in ((vae.encode, image()), (vae.decode, latent()), (vae, image())):
        with pytest.raises(
            RBLNRuntimeError, match=r"create_runtimes=False.*save_pretrained.*'cpu'"
        ):
            run(x)


def test_the_reference_is_as_good_as_any_target():
    assert_same_model(compile_vae(default_vae(), target="reference"), default_vae())


def test_bfloat16_is_no_worse_than_that_of_diffusers():
    vae = make_vae(block_out_channels=(16, 32), layers_per_block=2)
    ours = compile_vae(vae, dtype="bfloat16")
    theirs = copy.deepcopy(vae).to(torch.bfloat16)
    for run, x in ((moments, image(4, 64, 64)), (pixels, latent(4, 32, 32))):
        expected = run(vae, x)
        error = relative_l2(run(ours, x), expected)
        assert 1e-5 < error <= relative_l2(run(theirs, x.bfloat16()), expected)


# The profiler


def test_the_profiler_gives_each_operation_of_each_run(tmp_path):
    vae = compile_vae(default_vae(), activate_profiler=True)
    assert str(vae.profile()) == "No run yet."
    vae(image())
    vae.decode(latent(2))
    runs = vae.profile().runs
    assert [(run.part, run.input_shape) for run in runs] == [
        ("encoder", (1, 3, 16, 16)),
        ("decoder", (1, 4, 8, 8)),
        ("decoder", (2, 4, 8, 8)),
    ]
    assert all(run.steps for run in runs)
    assert all(step.seconds >= 0 and step.bytes > 0 for run in runs for step in run.steps)
    assert sum(step.flops for step in runs[2].steps) == 2 * sum(s.flops for s in runs[1].steps) > 0


def test_the_profile_is_a_readable_table():
    vae = compile_vae(default_vae(), activate_profiler=True)
    vae.decode(latent())
    (run,) = vae.profile().runs
    head, titles, *rows = str(vae.profile()).splitlines()
    assert head.startswith("decoder of 1x4x8x8: ")
    assert titles.split() == ["ms", "%", "GFLOP/s", "limit", "GB/s", "operation"]
    assert len(rows) == len(run.steps)
    shares = [float(row.split()[1]) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(rows))
    assert all(step.name in row for step, row in zip(run.steps, rows, strict=True))


def test_the_profile_is_a_trace_that_perfetto_opens(tmp_path):
    vae = compile_vae(default_vae(), activate_profiler=True)
    vae(image())
    vae.profile().save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for event in events:
        assert event["ph"] == "X"  # a complete event, of these fields, in microseconds
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert {"name", "pid", "tid"} <= event.keys()
    names = [event["name"] for event in events]
    assert "encoder 1x3x16x16" in names
    assert "decoder 1x4x8x8" in names
    assert len(events) == 2 + sum(len(run.steps) for run in vae.profile().runs)


def test_a_model_without_the_profiler_says_how_to_have_it():
    with pytest.raises(RBLNRuntimeError, match="rbln_activate_profiler=True"):
        default_compiled().profile()


def test_the_profiler_keeps_a_bounded_number_of_runs():
    vae = compile_vae(default_vae(), activate_profiler=True, uses_encoder=False)
    for _ in range(130):
        vae.decode(latent(1, 1, 1))
    assert 10 <= len(vae.profile().runs) <= 128


# Stopping


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_a_caller_stops_one_image(target):
    vae = compile_vae(default_vae(), target=target)
    for run, sample in ((vae.encode, noise(1, 3, 16, 16)), (vae.decode, latent(1, 8, 8))):
        with pytest.raises(RBLNCancelledError, match="should_stop"):
            run(sample, should_stop=lambda: True)
        with pytest.raises(KeyError):
            run(sample, should_stop=lambda: {}["the caller's own"])
        run(sample, should_stop=lambda: False)
        run(sample, should_stop=None)
        with pytest.raises(TypeError, match="should_stop must be a function, and is a bool"):
            run(sample, should_stop=True)
    assert_same_model(vae, default_vae())


# Threads


def test_two_threads_may_run_one_model_at_once():
    vae = compile_vae(default_vae(), num_threads=1)
    inputs = [latent(1, 8 + index, 9, seed=index) for index in range(12)]
    expected = [pixels(default_vae(), z) for z in inputs]
    together = threading.Barrier(2)

    def work(index: int) -> torch.Tensor:
        if index < 2:
            together.wait(timeout=30)
        return pixels(vae, inputs[index])

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(len(inputs))))
    for result, right in zip(results, expected, strict=True):
        assert relative_l2(result, right) <= TOLERANCE


# The class


def test_repr_names_the_class_and_what_it_was_compiled_for():
    assert repr(default_compiled()).startswith("RBLNAutoencoderKL(RBLNAutoencoderKLConfig(")


def test_the_class_names_its_configuration():
    assert RBLNAutoencoderKL.config_class is RBLNAutoencoderKLConfig


def test_a_model_is_true_and_answers_only_what_it_has():
    """Clients probe with `if vae`, and with `hasattr` for what a compiled model isn't."""
    assert bool(default_compiled())
    assert not hasattr(default_compiled(), "__len__")
    for name in ("_hf_hook", "_diffusers_hook", "_reset_stateful_cache", "is_loaded_in_4bit"):
        assert not hasattr(default_compiled(), name)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_model_says_what_it_takes_without_loss_and_where_tensors_go(stored: str):
    """Pipelines convert their latents to the dtype: float16 would cost those of SDXL."""
    model = compile_vae(default_vae(), dtype=stored)
    assert model.dtype is torch.float32
    assert next(iter(model.post_quant_conv.parameters())).dtype is torch.float32
    assert model.device == torch.device("cpu")
    z = latent(1, 3, 4)
    assert model.decode(z).sample.dtype is torch.float32
    assert relative_l2(pixels(model, z), pixels(default_vae(), z)) < 0.03


def test_saving_and_loading_a_profile_needs_no_directory_of_its_own(tmp_path: Path):
    vae = compile_vae(default_vae(), activate_profiler=True)
    vae.profile().save(str(tmp_path / "empty.json"))
    assert json.loads((tmp_path / "empty.json").read_text())["traceEvents"] == []
