"""`RBLNAutoencoderKLTemporalDecoder`: clips against diffusers, and what is special to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_vaes
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from vaes import TOLERANCE, noise

from rbln_vae import (
    RBLNAutoencoder,
    RBLNAutoencoderKLTemporalDecoder,
    RBLNAutoencoderKLTemporalDecoderConfig,
    RBLNCompileError,
)
from rbln_vae.metrics import relative_l2
from rbln_vae.schedule import search
from rbln_vae.schedule.scheduler import Sketch

OPTIONS = {"target": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def vae() -> Any:
    found = tiny_vaes.make("AutoencoderKLTemporalDecoder")
    # Shares that differ from block to block, as trained ones do.
    for i, each in enumerate(m for m in found.modules() if hasattr(m, "mix_factor")):
        each.mix_factor.fill_(0.4 * i - 1.0)
    return found


@pytest.fixture(scope="module")
def compiled(vae: Any) -> RBLNAutoencoderKLTemporalDecoder:
    return RBLNAutoencoderKLTemporalDecoder.from_model(vae, rbln_config=OPTIONS)


@torch.no_grad()
def expected_frames(vae: Any, z: Tensor, num_frames: int) -> Tensor:
    found: Tensor = vae.decode(z, num_frames=num_frames).sample
    return found


@pytest.mark.parametrize(("clips", "frames"), [(1, 1), (1, 2), (2, 3), (3, 1), (1, 14)])
def test_clips_are_those_of_diffusers(vae: Any, compiled: Any, clips: int, frames: int) -> None:
    z = noise(clips * frames, 4, 5, 4)
    found = compiled.decode(z, num_frames=frames).sample
    assert found.dtype == z.dtype
    assert relative_l2(found, expected_frames(vae, z, frames)) < TOLERANCE / 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_reference_runs_clips(vae: Any, dtype: str) -> None:
    options = {**OPTIONS, "target": "reference", "dtype": dtype}
    found = RBLNAutoencoderKLTemporalDecoder.from_model(vae, rbln_config=options)
    limit, z = {"float32": TOLERANCE, "float16": 0.01, "bfloat16": 0.05}[dtype], noise(4, 4, 3, 2)
    assert relative_l2(found.decode(z, 2).sample, expected_frames(vae, z, 2)) < limit


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_diffusers_own(vae: Any) -> None:
    z = noise(3, 4, 12, 12).bfloat16()
    expected = expected_frames(vae, z.float(), 3)
    narrow = tiny_vaes.make("AutoencoderKLTemporalDecoder")
    narrow.load_state_dict(vae.state_dict())
    own = relative_l2(expected_frames(narrow.bfloat16(), z, 3).float(), expected)
    found = RBLNAutoencoder.from_model(vae, rbln_config={**OPTIONS, "dtype": "bfloat16"})
    assert relative_l2(found.decode(z, 3).sample.float(), expected) <= own  # type: ignore[attr-defined]


def test_clips_do_not_touch_each_other(compiled: Any) -> None:
    z = noise(6, 4, 4, 3)
    together = compiled.decode(z, 3).sample
    assert torch.equal(together[3:], compiled.decode(z[3:], 3).sample)
    assert not torch.equal(together, compiled.decode(z, 2).sample)


def test_results_go_to_the_memory_of_the_caller(compiled: Any) -> None:
    z = noise(4, 4, 4, 3).double()
    expected = compiled.decode(z, 2).sample
    assert expected.dtype == torch.float64
    out = np.zeros((4, 3, 32, 24), np.float32)
    for frames in (2, 4):
        found = compiled.decode(z, frames, False, out=out)[0]
        assert torch.equal(torch.from_numpy(out), found)
        assert torch.equal(found, compiled.decode(z, frames).sample.float())


def test_pictures_of_clips_are_those_of_diffusers_image_processor(compiled: Any) -> None:
    z = noise(4, 4, 4, 3)
    pixels = compiled.decode(z, 2).sample
    shown = VaeImageProcessor().postprocess(pixels, output_type="np")
    expected = torch.from_numpy((shown * 255).round().astype("uint8"))
    finite, came = torch.zeros(4, dtype=torch.bool), list[Tensor]()
    found = compiled.decode_images(
        z, num_frames=2, finite=finite, on_rows=lambda first, rows: came.append(rows.clone())
    )
    assert torch.equal(found, expected) and finite.all()
    assert torch.equal(torch.cat(came, 1), expected)


def test_progress_counts_the_frames_of_all_clips(compiled: Any) -> None:
    told: list[tuple[int, int]] = []
    compiled.decode(noise(4, 4, 4, 3), 2, progress=lambda *done: told.append(done))
    assert told == sorted(told) and told[-1] == (4000, 4000)
    assert {total for _, total in told} == {4000}


def test_a_limit_holds_the_result_of_all_clips(compiled: Any) -> None:
    z = noise(8, 4, 4, 4)
    one = compiled.memory_needed("decoder", (2, 4, 4, 4))
    others = 6 * 3 * 32 * 32 * 4
    expected = compiled.decode(z, 2).sample
    assert torch.equal(compiled.decode(z, 2, memory_limit=one + others).sample, expected)
    with pytest.raises(MemoryError):
        compiled.decode(z, 2, memory_limit=others + 2**16)


@pytest.mark.slow
def test_planning_in_little_memory_tries_few_schedules(
    compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def counted(*args: Any) -> Sketch:
        nonlocal tried
        tried += 1
        return Sketch(*args)

    monkeypatch.setattr(search, "Sketch", counted)
    compiled.enable_tiling()
    try:
        compiled.memory_needed("decoder", (1, 4, 24, 16))
    finally:
        compiled.disable_tiling()
    assert 0 < tried < 1000


@pytest.mark.parametrize("frames", [0, 3, 2.0, True, None])
def test_frames_that_make_no_whole_clips_are_refused(compiled: Any, frames: Any) -> None:
    with pytest.raises(ValueError, match="num_frames"):
        compiled.decode(noise(4, 4, 2, 2), frames)


def test_it_is_saved_loaded_and_found_by_its_class(vae: Any, compiled: Any, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "original")
    made = RBLNAutoencoder.from_pretrained(tmp_path / "original", export=True, rbln_config=OPTIONS)
    assert isinstance(made, RBLNAutoencoderKLTemporalDecoder)
    made.save_pretrained(tmp_path / "saved")
    again = RBLNAutoencoder.from_pretrained(tmp_path / "saved")
    assert isinstance(again, RBLNAutoencoderKLTemporalDecoder)
    z, x = noise(3, 4, 4, 4), noise(2, 3, 32, 32)
    assert torch.equal(again.decode(z, 3).sample, compiled.decode(z, 3).sample)
    with torch.no_grad():
        assert relative_l2(again(x, num_frames=2).sample, vae(x, num_frames=2).sample) < TOLERANCE


@pytest.mark.slow
def test_the_frames_of_a_clip_are_compiled_in_by_the_names_of_optimum_rbln(vae: Any) -> None:
    for options, frames in (({}, 14), ({"num_frames": 6}, 6), ({"decode_chunk_size": 2}, 2)):
        config = RBLNAutoencoderKLTemporalDecoderConfig(**OPTIONS, num_frames=None)
        found = RBLNAutoencoderKLTemporalDecoder.from_model(
            vae, rbln_config=config.copy(sample_size=32, create_runtimes=False, **options)
        )
        assert found.resolved_config.input_shapes()["decoder"] == (frames, 4, 4, 4)
        assert found.resolved_config.input_shapes()["encoder"] == (1, 3, 32, 32)
        assert found.rbln_config.decode_chunk_size == frames


def test_a_temporal_block_of_another_kind_is_refused() -> None:
    model = tiny_vaes.make("AutoencoderKLTemporalDecoder")
    block = model.decoder.mid_block.resnets[0].temporal_res_block
    block.conv_shortcut = torch.nn.Conv3d(64, 64, 1)
    with pytest.raises(RBLNCompileError, match="shortcut"):
        RBLNAutoencoderKLTemporalDecoder.from_model(model, rbln_config=OPTIONS)


def test_pipelines_find_that_decode_takes_the_number_of_frames(compiled: Any) -> None:
    pipe = diffusers.StableVideoDiffusionPipeline
    z = noise(1, 3, 4, 4, 4)
    frames = pipe.decode_latents(type("Pipe", (), {"vae": compiled})(), z, 3, 2)
    flat = 1 / compiled.config.scaling_factor * z.flatten(0, 1)
    expected = torch.cat([compiled.decode(flat[:2], 2).sample, compiled.decode(flat[2:], 1).sample])
    assert torch.equal(frames[0], expected.transpose(0, 1))
