"""Videos: sent as they are decoded, one after the other, and ended when nobody watches."""

from __future__ import annotations

import importlib
import io
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import pytest
import requests
import tiny_vaes
import torch
from clips import wan
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode
from diffusers.video_processor import VideoProcessor
from services import PATIENCE, GatedModel, ask, make_app, query_of, raw, running, wait_until
from test_server import metric
from torch import Tensor
from vaes import default_compiled, noise

from rbln_vae import RBLNAutoencoder
from rbln_vae.levels import levels_of
from rbln_vae.serving.models import ServedModel
from rbln_vae.serving.settings import Limits
from rbln_vae.targets.watch import ShouldStop
from rbln_vae.videos import write_video

pytestmark = pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated")

MP4: dict[str, Any] = {"output_type": "mp4", "return_type": "mp4", "do_scaling": False}


def latent(frames: int = 3, seed: int = 0, batch: int = 1) -> Tensor:
    return noise(batch, wan().resolved_config.latent_channels, frames, 4, 6, seed=seed)


class Written:
    """What is written to a pipe, which can't be sought in."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes, /) -> None:
        self.data += data


def assert_shows(video: bytes, z: Tensor, fps: float = 16) -> None:
    """The video is the one that Python writes of the latent, with all of its frames."""
    written = Written()
    count = write_video(written, wan().decode_frames(z.float()), fps)
    assert video == written.data
    with av.open(io.BytesIO(video)) as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(fps)
        assert len(list(container.decode(video=0))) == count


class Paced(ServedModel):
    """A model of videos that decodes a frame only when the test lets it, and notes its streams."""

    def __init__(self, name: str = "wan", vae: Any = None) -> None:
        super().__init__(name, vae or wan())
        self.frames = threading.Semaphore(0)
        self.decoded = self.begun = self.ended = 0

    def decode_frames(
        self, latent: Tensor, should_stop: ShouldStop
    ) -> Generator[Tensor, None, None]:
        self.begun += 1
        try:
            for frame in super().decode_frames(latent, should_stop):
                assert self.frames.acquire(timeout=PATIENCE)
                self.decoded += 1
                yield frame
        finally:
            self.ended += 1


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    models = (
        ServedModel("wan", wan()),
        ServedModel("images", wan(num_frames=1)),
        ServedModel("sd", default_compiled()),
    )
    with running(make_app(*models)) as address:
        yield address


def stream(address: str, z: Tensor, **query: Any) -> requests.Response:
    """An answer whose body is read as it comes."""
    sent = query_of(z, output_type="mp4", **query)
    return requests.post(
        f"{address}/decode", params=sent, data=raw(z), stream=True, timeout=PATIENCE
    )


# What diffusers' client gets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_client_of_diffusers_gets_a_video(server: str, dtype: torch.dtype, frames: int) -> None:
    z = latent(frames).to(dtype)
    video = remote_decode(f"{server}/decode", z, **MP4)
    assert isinstance(video, bytes)
    assert_shows(video, z)
    assert_shows(remote_decode(f"{server}/decode?fps=23.976", z, **MP4), z, 23.976)


def test_latents_of_a_video_are_unscaled_by_the_model(server: str) -> None:
    config: Any = wan().config
    z = latent()
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    expected = wan().decode(z * std + mean).sample
    assert_shows(
        remote_decode(f"{server}/decode", z, **{**MP4, "do_scaling": True}), z * std + mean
    )
    found = remote_decode(f"{server}/decode", z, output_type="pt", return_type="pt")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_client_of_diffusers_gets_tensors_of_a_video(server: str, dtype: torch.dtype) -> None:
    z = latent().to(dtype)
    sample = wan().decode(z).sample
    processor = VideoProcessor(vae_scale_factor=8)
    shown = processor.postprocess_video(sample, output_type="pil")[0]

    def ask_for(**more: Any) -> Any:
        return remote_decode(f"{server}/decode", z, do_scaling=False, **more)

    found = ask_for(output_type="pt", return_type="pt")
    assert found.dtype == dtype and torch.equal(found, sample)
    levels = ask_for(output_type="pt", return_type="pt", partial_postprocess=True)
    assert levels.shape == (9, 32, 48, 3) and levels.dtype == torch.uint8
    for pictures in (
        ask_for(output_type="pt", partial_postprocess=True),
        ask_for(output_type="pt", processor=processor),
        ask_for(processor=processor),
    ):
        assert [picture.tobytes() for picture in pictures] == [each.tobytes() for each in shown]
    flagged = ask_for(processor=processor, return_type="pt")
    assert torch.equal(flagged, VaeImageProcessor.denormalize(sample)[0].transpose(0, 1))


def test_several_videos_come_as_one_tensor(server: str) -> None:
    z = latent(2, batch=2)
    options: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    assert torch.equal(remote_decode(f"{server}/decode", z, **options), wan().decode(z).sample)


@pytest.mark.parametrize(
    ("model", "shape", "options", "message"),
    [
        ("wan", (1, 16, 3, 4, 6), {"output_type": "pil"}, "'wrong_shape'.*that of a video"),
        ("wan", (2, 16, 3, 4, 6), {"output_type": "mp4"}, "'wrong_shape'.*one by one"),
        ("wan", (1, 16, 4, 6), {"output_type": "mp4"}, r"'wrong_shape'.*\(1, 16, T, H, W\)"),
        ("wan", (1, 15, 3, 4, 6), {"output_type": "mp4"}, "'wrong_shape'.*1, 15, 3"),
        ("images", (1, 16, 1, 4, 6), {"output_type": "mp4"}, "'no_video'.*rbln_num_frames=1"),
        ("images", (1, 16, 3, 4, 6), {"output_type": "pt"}, "'no_video'.*rbln_num_frames=1"),
        ("sd", (1, 4, 8, 8), {"output_type": "mp4"}, "'no_video'.*AutoencoderKL"),
    ],
)
def test_what_is_no_video_is_refused(
    server: str, model: str, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    more: dict[str, Any] = {**options, "return_type": options["output_type"]}
    with pytest.raises(RuntimeError, match=message):
        remote_decode(f"{server}/decode?model={model}", noise(*shape), do_scaling=False, **more)


def test_frames_with_opacity_are_no_video() -> None:
    vae = tiny_vaes.make("AutoencoderKLQwenImage", input_channels=4)
    options = {"target": "cpu", "dtype": "float32"}
    app = make_app(ServedModel("layered", RBLNAutoencoder.from_model(vae, rbln_config=options)))
    z = noise(1, 16, 2, 4, 6)
    answer = ask(app, "POST", "/decode", query_of(z, output_type="mp4"), raw(z))
    assert (answer.status, answer.code) == (422, "no_video")
    assert "4 channels" in answer.json()["message"]


@pytest.mark.parametrize("fps", ["0", "-1", "1000", "nan", "x"])
def test_a_rate_that_is_none_is_refused(server: str, fps: str) -> None:
    with pytest.raises(RuntimeError, match=r"'invalid_query'.*fps"):
        remote_decode(f"{server}/decode?fps={fps}", latent(), **MP4)


def test_without_pyav_the_answer_says_what_to_install(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RuntimeError, match=r"'no_pyav'.*pip install 'rbln-vae\[video\]'"):
        remote_decode(f"{server}/decode", latent(), **MP4)


@pytest.mark.parametrize("output_type", ["mp4", "pt"])
def test_a_video_that_is_not_finite_is_refused(server: str, output_type: str) -> None:
    z = latent().fill_(3e38)
    answer = requests.post(
        f"{server}/decode",
        params=query_of(z, output_type=output_type, partial_postprocess=True),
        data=raw(z),
        timeout=PATIENCE,
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "not_finite")


# While it is decoded


def test_the_first_bytes_come_before_the_last_frame_is_decoded() -> None:
    model = Paced()
    with running(make_app(model)) as address, ThreadPoolExecutor(1) as client:
        answering = client.submit(stream, address, latent())
        model.frames.release(3)
        answer = answering.result(PATIENCE)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.headers["transfer-encoding"] == "chunked"
        chunks = answer.iter_content(None)
        video = next(chunks)
        assert b"ftyp" in video
        assert model.decoded <= 3
        model.frames.release(9)
        video += b"".join(chunks)
        assert_shows(video, latent())
        assert model.ended == 1
        wait_until(lambda: metric(address, "rbln_vae_body_bytes") == 0)
        assert metric(address, 'rbln_vae_run_seconds_count{model="wan",part="decoder"}') == 1


def test_a_client_that_leaves_ends_the_work() -> None:
    model = Paced()
    with running(make_app(model)) as address, ThreadPoolExecutor(1) as client:
        answering = client.submit(stream, address, latent(40))
        model.frames.release(2)
        answer = answering.result(PATIENCE)
        assert metric(address, "rbln_vae_runs") == 1
        answer.close()
        model.frames.release(200)
        wait_until(lambda: metric(address, "rbln_vae_runs") == 0)
        assert model.ended == 1
        assert model.decoded < 157
        wait_until(lambda: metric(address, "rbln_vae_body_bytes") == 0)


def test_a_client_that_leaves_the_queue_is_not_decoded() -> None:
    model = Paced()
    with running(make_app(model)) as address, ThreadPoolExecutor(2) as clients:
        first = clients.submit(stream, address, latent())
        wait_until(lambda: model.begun == 1)
        with pytest.raises(requests.Timeout):
            requests.post(
                f"{address}/decode",
                params=query_of(latent(), output_type="mp4"),
                data=raw(latent()),
                timeout=1,
            )
        wait_until(lambda: metric(address, "rbln_vae_queue_images") == 0)
        model.frames.release(100)
        assert_shows(first.result(PATIENCE).content, latent())
        assert model.begun == model.ended == 1


def test_a_client_that_reads_nothing_keeps_neither_memory_nor_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rbln_vae.serving.pipe._MOST_WAITING", 4)
    monkeypatch.setattr("rbln_vae.serving.server._STALL_SECONDS", 1.0)

    class Long(ServedModel):
        """A model that goes on until it is stopped, with frames that don't compress."""

        made = 0

        def decode_frames(
            self, latent: Tensor, should_stop: ShouldStop
        ) -> Generator[Tensor, None, None]:
            while not should_stop():
                self.made += 1
                yield torch.rand(1, 3, 480, 640) * 2 - 1

    model = Long("wan", wan())
    with running(make_app(model)) as address:
        answer = stream(address, latent())
        assert answer.status_code == 200
        wait_until(lambda: metric(address, "rbln_vae_runs") == 0)
        assert model.made < 200
        with pytest.raises(requests.RequestException):
            assert answer.content


def test_two_videos_at_once_each_get_their_own() -> None:
    latents = [latent(4, seed=seed) for seed in range(4)]
    model = Paced()
    with running(make_app(model, concurrency=2)) as address, ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(stream, address, z) for z in latents]
        wait_until(lambda: model.begun == 2)
        model.frames.release(100)
        for z, answer in zip(latents, asked, strict=True):
            assert_shows(answer.result(PATIENCE).content, z)


def test_videos_do_not_wait_to_be_run_together() -> None:
    latents = [latent(2, seed=seed) for seed in range(3)]
    options = {"output_type": "pt", "partial_postprocess": True}

    def post(z: Tensor) -> requests.Response:
        return requests.post(
            f"{address}/decode", params=query_of(z, **options), data=raw(z), timeout=PATIENCE
        )

    model = GatedModel("wan", wan())
    with running(make_app(model, max_batch=4)) as address, ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(post, z) for z in latents]
        assert model.started.acquire(timeout=PATIENCE)
        model.gate.set()
        for z, answer in zip(latents, asked, strict=True):
            expected = levels_of(wan().decode(z).sample)[0].movedim(0, -1)
            assert answer.result(PATIENCE).content == raw(expected)
    assert model.shapes == [tuple(z.shape) for z in latents]


@pytest.mark.parametrize("frames", [0, 3])
def test_a_video_that_takes_too_long_ends(frames: int) -> None:
    class Slow(ServedModel):
        def decode_frames(
            self, latent: Tensor, should_stop: ShouldStop
        ) -> Generator[Tensor, None, None]:
            for number, frame in enumerate(super().decode_frames(latent, should_stop)):
                if number == frames:
                    raise TimeoutError("It took too long.")
                yield frame

    with running(make_app(Slow("wan", wan()))) as address:
        answer = stream(address, latent())
        if frames:
            # The status has been sent, so only a broken connection can tell.
            assert answer.status_code == 200
            with pytest.raises(requests.RequestException):
                assert answer.content
        else:
            assert (answer.status_code, answer.json()["code"]) == (504, "timeout")
        assert requests.get(f"{address}/health", timeout=PATIENCE).ok


# Admission


def test_a_video_takes_the_memory_of_its_frames_one_by_one() -> None:
    needed = wan().memory_needed("decoder", tuple(latent(3).shape))
    assert wan().memory_needed("decoder", tuple(latent(30).shape)) == needed
    app = make_app(ServedModel("wan", wan()), memory_limit=needed)
    long = latent(30)
    answer = ask(app, "POST", "/decode", query_of(long, output_type="mp4"), raw(long))
    assert answer.status == 200
    # As a tensor the whole of it is there at once.
    whole = ask(app, "POST", "/decode", query_of(long, output_type="pt"), raw(long))
    assert (whole.status, whole.code) == (413, "needs_too_much_memory")
    result = 4 * 3 * 117 * 32 * 48
    app = make_app(ServedModel("wan", wan()), memory_limit=needed + result)
    whole = ask(app, "POST", "/decode", query_of(long, output_type="pt"), raw(long))
    assert whole.status == 200
    small = make_app(ServedModel("wan", wan()), memory_limit=needed - 1)
    answer = ask(small, "POST", "/decode", query_of(long, output_type="mp4"), raw(long))
    assert (answer.status, answer.code) == (413, "needs_too_much_memory")


def test_pixels_are_those_of_a_frame_and_the_queue_counts_all() -> None:
    model = ServedModel("wan", wan())
    shape = tuple(latent(3).shape)
    assert model.weight("decoder", shape) == pytest.approx(
        9 * model.weight("decoder", (*shape[:2], *shape[3:]))
    )
    for pixels, status in ((32 * 48, 200), (32 * 48 - 1, 413)):
        app = make_app(model, limits=Limits(max_pixels=pixels))
        answer = ask(app, "POST", "/decode", query_of(latent(), output_type="mp4"), raw(latent()))
        assert answer.status == status


def test_a_full_queue_refuses_a_video() -> None:
    model = Paced()
    with (
        running(make_app(model, queue=0.01)) as address,
        ThreadPoolExecutor(2) as clients,
    ):
        asked = [clients.submit(stream, address, latent())]
        wait_until(lambda: model.begun == 1)
        asked.append(clients.submit(stream, address, latent()))
        wait_until(lambda: metric(address, "rbln_vae_queue_images") > 0)
        refused = stream(address, latent())
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert "retry-after" in refused.headers
        model.frames.release(100)
        assert [each.result(PATIENCE).status_code for each in asked] == [200, 200]


def test_the_service_says_which_models_run_videos(server: str) -> None:
    models = requests.get(f"{server}/models", timeout=PATIENCE).json()["models"]
    found = {each["name"]: each["frames_per_latent"] for each in models}
    assert found == {"wan": 4, "images": None, "sd": None}
