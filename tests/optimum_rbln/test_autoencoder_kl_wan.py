"""optimum-rbln's own `RBLNAutoencoderKLWan`, as it comes from PyPI, runs on `rbln_vae.rebel`."""

from __future__ import annotations

import pytest
import tiny_vaes
import torch
from diffusers import AutoencoderKLWan
from optimum.rbln import RBLNAutoencoderKLWan
from torch import Tensor

TOLERANCE = 1e-4
SIZE = {"height": 32, "width": 48, "num_frames": 9}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """As wide as Wan 2.1's own: optimum-rbln has the shapes of its caches as constants."""
    torch.manual_seed(0)
    return AutoencoderKLWan().eval()


@pytest.fixture(scope="module")
def saved(vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model = RBLNAutoencoderKLWan.from_model(vae, rbln_config={"uses_encoder": True, **SIZE})
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compiled(saved) -> RBLNAutoencoderKLWan:
    return RBLNAutoencoderKLWan.from_pretrained(saved)


def video(seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 9, 32, 48, generator=generator) * 2 - 1


def latents(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def test_it_is_the_one_from_pypi():
    assert RBLNAutoencoderKLWan.__module__.startswith("optimum.rbln.")


def test_a_video_is_encoded_as_by_diffusers_and_so_is_the_next(vae, compiled):
    for seed in range(2):
        with torch.no_grad():
            expected = vae.encode(video(seed)).latent_dist.parameters
        assert_close(compiled.encode(video(seed)).latent_dist.parameters, expected)


def test_a_batch_of_videos_is_decoded_as_by_diffusers(vae, compiled):
    with torch.no_grad():
        expected = vae.decode(latents(0, batch=2)).sample
    assert_close(compiled.decode(latents(0, batch=2)).sample, expected)


def test_models_that_are_loaded_twice_have_caches_of_their_own(saved, compiled):
    expected = compiled.decode(latents(0)).sample
    other = RBLNAutoencoderKLWan.from_pretrained(saved)
    with torch.no_grad():
        z = compiled.post_quant_conv(latents(0))
    first = compiled.decoder.forward(z[:, :, :1])
    other.decode(latents(1))
    second = compiled.decoder.decoder_n(z[:, :, 1:2], first[1])
    assert torch.equal(torch.cat([first[0], second[0]], dim=2).clamp(-1, 1), expected[:, :, :5])


def test_another_size_is_refused(compiled):
    with pytest.raises(RuntimeError, match="compiled for the shape"):
        compiled.decode(latents(0)[..., :4])


def test_a_timeout_is_refused(saved):
    with pytest.raises(RuntimeError, match="no timeout and no profiler"):
        RBLNAutoencoderKLWan.from_pretrained(saved, rbln_timeout=30)


def test_a_network_of_other_widths_is_refused():
    vae = tiny_vaes.make("AutoencoderKLWan")
    with pytest.raises(RuntimeError, match="can't write a state of shape"):
        RBLNAutoencoderKLWan.from_model(vae, rbln_config=SIZE)
