"""The HTTP application: limits, refusals, batches, and what can be seen from outside."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import struct
import zlib
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from services import PATIENCE, Answer, GatedModel, ask, call, make_app, measured, query_of, raw
from vaes import compile_vae, default_compiled, default_vae, make_vae, noise

from rbln_vae.serving.errors import CODES
from rbln_vae.serving.models import ServedModel
from rbln_vae.serving.settings import Limits
from rbln_vae.targets.watch import ShouldStop

LATENT = noise(1, 4, 4, 4)
BINARY = {"content-type": "tensor/binary"}


def decode(app: Any, latent: torch.Tensor = LATENT, **more: Any) -> Any:
    """A call of `/decode`, to be awaited."""
    query = query_of(latent, output_type="pt", **more)
    return call(app, "POST", "/decode", query, raw(latent), BINARY)


def png(width: int, height: int) -> bytes:
    """A picture of one colour, with a head that tells the size at once."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A small file that claims to be a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


async def never_read() -> dict[str, Any]:
    raise AssertionError("the body was read")


# Batches, the queue, and those who leave


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_requests_that_wait_together_get_the_bits_that_they_get_alone(
    target: str, dtype: str
) -> None:
    async def main() -> list[Answer]:
        app = make_app(model, max_batch=4)
        calls = [asyncio.ensure_future(decode(app, latents[0]))]
        await asyncio.to_thread(model.started.acquire)
        calls += [asyncio.ensure_future(decode(app, latent)) for latent in latents[1:]]
        # Each is of 12x10 pixels, in images of 16x16.
        await measured(app, "rbln_vae_queue_images", (len(calls) - 1) * 120 / 256)
        model.gate.set()
        return await asyncio.gather(*calls)

    vae = compile_vae(default_vae(), target=target, dtype=dtype)
    model = GatedModel(vae=vae)
    latents = [noise(1, 4, 6, 5, seed=seed) for seed in range(9)]
    for latent, answer in zip(latents, asyncio.run(main()), strict=True):
        assert answer.body == raw(vae.decode(latent).sample)
    # Together in one tensor only where that is exact.
    assert [shape[0] for shape in model.shapes] == ([1, 4, 4] if vae.exact_batches else [1] * 9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_target_that_says_so_has_exact_batches(dtype: str) -> None:
    for threads in (1, 3, 8):
        vae = compile_vae(make_vae(block_out_channels=(32, 64)), dtype=dtype, num_threads=threads)
        assert vae.exact_batches
        for batch, height, width in ((2, 9, 4), (5, 3, 8), (3, 17, 16)):
            latents = noise(batch, 4, height, width)
            images = noise(batch, 3, 2 * height, 2 * width)
            together = vae.decode(latents).sample
            moments = vae.encode(images).latent_dist.parameters
            for i in range(batch):
                assert torch.equal(vae.decode(latents[i : i + 1]).sample[0], together[i])
                alone = vae.encode(images[i : i + 1]).latent_dist.parameters[0]
                assert torch.equal(alone, moments[i])


def test_pictures_that_are_decoded_together_are_those_of_diffusers_and_one_is_refused() -> None:
    class Broken(GatedModel):
        """A model that finds values that aren't finite in what ones show."""

        def decode_images(self, latent: Any, should_stop: ShouldStop) -> Any:
            images, finite = super().decode_images(latent, should_stop)
            return images, finite & ~(latent == 1).flatten(1).all(1)

    async def main() -> list[Answer]:
        app = make_app(model, max_batch=4)
        calls = [asyncio.ensure_future(decode(app, latents[0]))]
        await asyncio.to_thread(model.started.acquire)
        calls += [
            asyncio.ensure_future(decode(app, latent, partial_postprocess="true"))
            for latent in latents[1:]
        ]
        await measured(app, "rbln_vae_queue_images", (len(calls) - 1) * 120 / 256)
        model.gate.set()
        return await asyncio.gather(*calls)

    model = Broken()
    latents = [noise(1, 4, 6, 5, seed=1), torch.ones(1, 4, 6, 5), noise(1, 4, 6, 5, seed=2)]
    _, refused, shown = asyncio.run(main())
    assert model.shapes == [(1, 4, 6, 5), (2, 4, 6, 5)]
    assert (refused.status, refused.code) == (422, "not_finite")
    assert (shown.headers["shape"], shown.headers["dtype"]) == ("[1, 12, 10, 3]", "uint8")
    expected = VaeImageProcessor().postprocess(default_compiled().decode(latents[2]).sample)
    assert shown.body == expected[0].tobytes()


def test_a_latent_whose_image_is_not_finite_is_refused_a_picture() -> None:
    app = make_app()
    latent = torch.full((1, 4, 4, 4), 3e38)
    answer = asyncio.run(decode(app, latent, partial_postprocess="true"))
    assert (answer.status, answer.code) == (422, "not_finite")


def test_a_shape_that_the_target_doesnt_take_is_refused() -> None:
    class Fixed(ServedModel):
        def memory_needed(self, part: str, shape: tuple[int, ...]) -> int:
            raise ValueError("The decoder was compiled for another shape.")

    answer = asyncio.run(decode(make_app(Fixed("fixed", default_compiled()))))
    assert (answer.status, answer.code) == (422, "wrong_shape")


def test_beyond_the_queue_the_answer_is_429_and_says_when_to_come_back() -> None:
    async def main() -> None:
        model = GatedModel()
        # An image of the compiled size is 16 by 16; one of 8 by 8 counts as the least.
        app = make_app(model, queue=2, max_batch=1)
        image = noise(1, 4, 8, 8)
        calls = [asyncio.ensure_future(decode(app, image))]
        await asyncio.to_thread(model.started.acquire)
        calls += [asyncio.ensure_future(decode(app, image)) for _ in range(2)]
        await measured(app, "rbln_vae_queue_images", 2)
        refused = await call(
            app,
            "POST",
            "/decode",
            query_of(image),
            headers={"content-length": "1024"},
            receive=never_read,
        )
        assert (refused.status, refused.code) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        model.gate.set()
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 3
        assert (await decode(app, image)).status == 200

    asyncio.run(main())


def test_who_leaves_the_queue_is_not_run() -> None:
    async def main() -> None:
        model = GatedModel()
        app = make_app(model, max_batch=1)
        first = asyncio.ensure_future(decode(app))
        await asyncio.to_thread(model.started.acquire)
        messages = [{"type": "http.request", "body": raw(LATENT), "more_body": False}]
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        query = query_of(LATENT)
        leaving = asyncio.ensure_future(call(app, "POST", "/decode", query, receive=receive))
        await measured(app, "rbln_vae_queue_images", 0.25)
        left.set()
        assert (await leaving).status == 499
        model.gate.set()
        await first
        assert len(model.shapes) == 1

    asyncio.run(main())


def test_who_leaves_in_the_middle_of_a_body_is_forgotten() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    answer = ask(make_app(), "POST", "/decode", query_of(LATENT), receive=receive)
    assert answer.status == 499


def test_what_needs_more_memory_than_there_is_is_refused_before_its_body_is_read() -> None:
    needed = default_compiled().memory_needed("decoder", (1, 4, 4, 4))
    app = make_app(memory_limit=needed)
    assert asyncio.run(decode(app)).status == 200
    larger = noise(1, 4, 4, 8)
    answer = ask(
        app,
        "POST",
        "/decode",
        query_of(larger),
        headers={"content-length": "512"},
        receive=never_read,
    )
    assert (answer.status, answer.code) == (413, "needs_too_much_memory")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (MemoryError("no"), 503, "out_of_memory"),
        (TimeoutError("too slow."), 504, "timeout"),
        (ArithmeticError("secret"), 500, "internal_error"),
    ],
)
def test_a_run_that_fails_is_an_answer_too(error: Exception, status: int, code: str) -> None:
    class Failing(ServedModel):
        def run(self, part: str, tensor: torch.Tensor, should_stop: ShouldStop) -> torch.Tensor:
            raise error

    answer = asyncio.run(decode(make_app(Failing("failing", default_compiled()))))
    assert (answer.status, answer.code) == (status, code)
    assert b"secret" not in answer.body


# Plans


def test_the_service_answers_while_a_plan_is_made() -> None:
    async def main() -> None:
        model = GatedModel()
        model.gate.set()
        model.plans.clear()
        app = make_app(model)
        asked = asyncio.ensure_future(decode(app))
        assert await asyncio.to_thread(model.planning.acquire, timeout=PATIENCE)
        assert (await call(app, "GET", "/health")).status == 200
        assert not asked.done()
        model.plans.set()
        assert (await asked).status == 200

    asyncio.run(main())


def test_the_service_answers_while_a_batch_is_planned() -> None:
    async def main() -> None:
        model = GatedModel()
        app = make_app(model)
        calls = [asyncio.ensure_future(decode(app))]
        await asyncio.to_thread(model.started.acquire)
        calls += [asyncio.ensure_future(decode(app)) for _ in range(2)]
        await measured(app, "rbln_vae_queue_images", 0.5)
        model.plans.clear()
        while model.planning.acquire(blocking=False):
            pass
        model.gate.set()
        assert await asyncio.to_thread(model.planning.acquire, timeout=PATIENCE)
        assert (await call(app, "GET", "/health")).status == 200
        model.plans.set()
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 3
        assert [shape[0] for shape in model.shapes] == [1, 2]

    asyncio.run(main())


def test_many_plans_at_once_are_bounded_by_the_queue() -> None:
    async def main() -> None:
        model = GatedModel()
        model.gate.set()
        model.plans.clear()
        app = make_app(model, queue=2)
        image = noise(1, 4, 8, 8)
        calls = [asyncio.ensure_future(decode(app, image)) for _ in range(2)]
        await measured(app, "rbln_vae_queue_images", 2)
        refused = await decode(app, image)
        assert (refused.status, refused.code) == (429, "queue_full")
        model.plans.set()
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 2

    asyncio.run(main())


# Limits


@pytest.mark.parametrize(
    ("path", "query", "headers"),
    [
        ("/decode", query_of(noise(1, 4, 16, 16)), {}),
        ("/encode", query_of(noise(1, 3, 32, 32)), {}),
        ("/encode", {}, {"content-length": "1000000"}),
        ("/encode", {}, {"content-length": "9" * 5000}),
    ],
)
def test_what_is_too_large_is_refused_before_its_body_is_read(
    path: str, query: dict[str, Any], headers: dict[str, str]
) -> None:
    app = make_app(limits=Limits(max_pixels=1000, max_body=10_000))
    answer = ask(app, "POST", path, query, headers=headers, receive=never_read)
    assert (answer.status, answer.code) == (413, "too_large")


def test_a_body_that_doesnt_fit_its_shape_is_refused_before_it_is_read() -> None:
    headers = {"content-length": "255"}
    answer = ask(
        make_app(), "POST", "/decode", query_of(LATENT), headers=headers, receive=never_read
    )
    assert (answer.status, answer.code) == (422, "wrong_body_size")


def test_a_body_of_unknown_length_is_read_no_further_than_allowed() -> None:
    chunks = [bytes(600)] * 1000
    app = make_app(limits=Limits(max_body=1000))
    answer = ask(app, "POST", "/encode", {}, chunks)
    assert (answer.status, answer.code) == (413, "too_large")
    # A tensor is as long as its shape says.
    answer = ask(app, "POST", "/decode", query_of(LATENT), [bytes(200)] * 1000)
    assert (answer.status, answer.code) == (413, "too_large")
    answer = ask(app, "POST", "/decode", query_of(LATENT), [raw(LATENT)[:100], raw(LATENT)[100:]])
    assert answer.status == 200


def test_all_bodies_together_are_bounded() -> None:
    async def main() -> None:
        app = make_app(limits=Limits(max_body=1000))
        waiting = asyncio.Event()

        async def slowly() -> dict[str, Any]:
            await waiting.wait()
            return {"type": "http.disconnect"}

        calls = [
            asyncio.ensure_future(call(app, "POST", "/encode", receive=slowly, body=[b""]))
            for _ in range(8)
        ]
        await measured(app, "rbln_vae_body_bytes", 8000)
        answer = await call(app, "POST", "/encode", body=png(4, 4))
        assert (answer.status, answer.code) == (429, "busy")
        assert "retry-after" in answer.headers
        waiting.set()
        await asyncio.gather(*calls)
        assert (await call(app, "POST", "/encode", body=png(4, 4))).status == 200

    asyncio.run(main())


def test_a_slow_body_is_given_up() -> None:
    chunks = [b"x", b"y"]

    async def slowly() -> dict[str, Any]:
        if not chunks:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunks.pop(), "more_body": True}

    app = make_app(limits=Limits(body_timeout=0.2))
    answer = ask(app, "POST", "/decode", query_of(LATENT), receive=slowly)
    assert (answer.status, answer.code) == (408, "slow_client")


@pytest.mark.parametrize("size", [(100_000, 100_000), (2, 9_000_000), (65_500, 65_500)])
def test_a_picture_that_would_fill_the_memory_is_refused(size: tuple[int, int]) -> None:
    answer = ask(make_app(), "POST", "/encode", body=huge_png(*size))
    assert answer.code in ("too_large", "not_an_image")


def test_a_picture_within_the_limit_that_lies_about_its_size_is_refused() -> None:
    answer = ask(make_app(), "POST", "/encode", body=huge_png(4000, 4000))
    assert (answer.status, answer.code) == (422, "not_an_image")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-encoding": "gzip"},
        {"content-encoding": "deflate, gzip"},
    ],
)
def test_json_and_compressed_bodies_are_refused_before_they_are_read(
    headers: dict[str, str],
) -> None:
    answer = ask(
        make_app(), "POST", "/decode", query_of(LATENT), headers=headers, receive=never_read
    )
    assert (answer.status, answer.code) == (415, "unsupported_body")


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("&".join(["shape=1"] * 5000), {}),
        ("", {f"x-{i}": "1" for i in range(200)}),
        ("", {"x-long": "x" * 20_000}),
    ],
)
def test_long_headers_and_queries_are_refused(query: str, headers: dict[str, str]) -> None:
    answer = ask(make_app(), "POST", "/decode", query, headers=headers, receive=never_read)
    assert (answer.status, answer.code) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "shape=1&dtype=float32",
        "shape=[1,4,4,4]&dtype=float32",
        "shape=1&shape=4&shape=4&shape=4&dtype=int8",
        "shape=1&shape=4&shape=4&shape=4&dtype=float32&output_type=gif",
        "shape=1&shape=4&shape=4&shape=4&dtype=float32&scaling_factor=0",
        "shape=1&shape=4&shape=4&shape=4&dtype=float32&scaling_factor=nan",
        "shape=1&shape=4&shape=4&shape=4&dtype=float32&shift_factor=inf",
        "shape=1&shape=4&shape=4&shape=4&dtype=float32&scale=1",
        "shape=1&shape=4&shape=4&shape=99999999999999999999999&dtype=float32",
        "shape=1&shape=4&shape=16777216&shape=16777216&dtype=float32",
        "&".join(["shape=1"] * 50) + "&dtype=float32",
    ],
)
def test_queries_that_make_no_sense_are_refused(query: str) -> None:
    answer = ask(make_app(), "POST", "/decode", query, receive=never_read)
    assert answer.status in (413, 422)
    assert answer.code in ("invalid_query", "wrong_shape", "too_large")
    assert set(answer.json()) == {"code", "message", "request_id"}


# Keys


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


def test_an_empty_key_is_refused() -> None:
    """As a variable gives it that isn't set, which would let everybody in."""
    with pytest.raises(ValueError, match="api_key is empty"):
        Limits(api_key="")


@pytest.mark.parametrize("header", ["Bearer kéy", "bearer kéy", basic(":kéy"), basic("me:kéy")])
def test_the_key_opens(header: str) -> None:
    app = make_app(limits=Limits(api_key="kéy"))
    sent = header.encode().decode("latin-1") if "é" in header else header
    headers = {"authorization": sent}
    answer = ask(app, "GET", "/models", headers=headers)
    # Headers are Latin-1; a key beyond ASCII arrives whole only in a basic login.
    assert answer.status == (200 if header.startswith("Basic") else 401)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer  ",
        basic("key"),
        "Basic ???",
        "Digest key",
        "key",
    ],
)
@pytest.mark.parametrize("path", ["/models", "/decode", "/encode", "/", "/docs", "/metrics", "/x"])
def test_without_the_key_nothing_opens(header: str | None, path: str) -> None:
    app = make_app(limits=Limits(api_key="key"))
    headers = {} if header is None else {"authorization": header}
    answer = ask(app, "POST", path, headers=headers, receive=never_read)
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Basic")


def test_the_key_is_plain_ascii_in_the_usual_case() -> None:
    app = make_app(limits=Limits(api_key="key"))
    assert ask(app, "GET", "/models", headers={"authorization": "Bearer key"}).status == 200


def test_those_who_watch_need_no_key() -> None:
    app = make_app(limits=Limits(api_key="key"))
    assert ask(app, "GET", "/health").status == 200
    assert ask(app, "GET", "/ready").status == 200


# Models


def test_models_are_listed_with_what_a_client_must_know() -> None:
    decoder_only = compile_vae(default_vae(), uses_encoder=False)
    app = make_app(ServedModel("a", default_compiled()), ServedModel("b", decoder_only))
    models = ask(app, "GET", "/models").json()["models"]
    assert [model["name"] for model in models] == ["a", "b"]
    assert models[0]["parts"] == ["encoder", "decoder"]
    assert models[1]["parts"] == ["decoder"]
    assert models[0]["vae_scale_factor"] == 2
    assert models[0]["scaling_factor"] == pytest.approx(0.18215)


def test_the_plan_of_a_model_is_what_its_runs_take() -> None:
    app = make_app(ServedModel("a", compile_vae(default_vae(), memory_limit="40MiB")))
    answer = ask(app, "GET", "/plan", {"model": "a"}).json()
    assert answer["model"] == "a"
    runs = {(run["part"], run["height"]): run for run in answer["runs"]}
    assert set(runs) == {(p, n) for p in ("encoder", "decoder") for n in (256, 512, 1024, 2048)}
    assert all(run["width"] == run["height"] for run in answer["runs"])
    vae = compile_vae(default_vae(), memory_limit="40MiB")
    shape = (1, 4, 128, 128)
    run = runs["decoder", 256]
    assert run["memory"] == vae.memory_needed("decoder", shape)
    assert run["seconds"] == pytest.approx(vae.seconds_expected("decoder", shape))
    # 2048² pixels have 48 MiB as a result alone.
    assert runs["decoder", 2048]["memory"] is runs["decoder", 2048]["seconds"] is None


def test_the_plan_of_a_decoder_has_no_encoder_and_that_of_a_fixed_shape_one_size() -> None:
    decoder_only = compile_vae(default_vae(), uses_encoder=False)
    app = make_app(ServedModel("b", decoder_only))
    assert {run["part"] for run in ask(app, "GET", "/plan").json()["runs"]} == {"decoder"}
    assert ask(app, "GET", "/plan", {"model": "c"}).code == "unknown_model"
    assert ask(app, "GET", "/plan", {"modle": "b"}).code == "invalid_query"
    fixed = compile_vae(default_vae(), uses_encoder=False)
    fixed._target = type("Fixed", (), {"static_shapes": True})()
    (run,) = ServedModel("fixed", fixed).plan()
    assert (run.height, run.width) == (16, 16)


def test_a_model_without_encoder_says_so() -> None:
    app = make_app(ServedModel("b", compile_vae(default_vae(), uses_encoder=False)))
    answer = ask(app, "POST", "/encode", body=png(4, 4))
    assert (answer.status, answer.code) == (422, "no_encoder")


# The end


def test_a_draining_service_is_not_ready_and_starts_what_waits() -> None:
    async def main() -> None:
        app = make_app(max_wait=2 * PATIENCE)
        calls = [asyncio.ensure_future(decode(app)) for _ in range(2)]
        await measured(app, "rbln_vae_queue_images", 0.5)
        assert (await call(app, "GET", "/ready")).status == 200
        app.state.drain()
        refused = await call(app, "GET", "/ready")
        assert (refused.status, refused.code) == (503, "shutting_down")
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 2

    asyncio.run(main())


# What is seen from outside


def test_metrics_count_what_happened() -> None:
    async def main() -> str:
        app = make_app()
        await decode(app)
        await decode(app)
        await call(app, "POST", "/encode", body=png(8, 8))
        await call(app, "POST", "/decode", "dtype=x")
        await call(app, "BREW", "/../../etc/passwd")
        return (await call(app, "GET", "/metrics")).body.decode()

    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(asyncio.run(main()))
        for sample in family.samples
    }
    assert found["rbln_vae_requests_total", "/decode", "200", "POST"] == 2
    assert found["rbln_vae_requests_total", "/encode", "200", "POST"] == 1
    assert found["rbln_vae_requests_total", "/decode", "422", "POST"] == 1
    assert found["rbln_vae_requests_total", "404", "other", "other"] == 1
    assert found["rbln_vae_run_seconds_count", "decoder", "tiny"] == 2
    assert found["rbln_vae_queue_seconds_count", "encoder", "tiny"] == 1
    assert found["rbln_vae_queue_images",] == 0
    assert found["rbln_vae_body_bytes",] == 0
    assert found["rbln_vae_model", "cpu", "float32", "tiny"] == 1


def test_logs_have_ids_and_no_content(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("rbln_vae.serving").propagate = True
    with caplog.at_level(logging.INFO, "rbln_vae.serving"):
        app = make_app(limits=Limits(api_key="s3cret"))
        headers = {"authorization": "Bearer s3cret", "x-request-id": "mine-1"}
        answer = ask(app, "POST", "/decode", query_of(LATENT), raw(LATENT), {**headers, **BINARY})
    assert answer.headers["x-request-id"] == "mine-1"
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert fields["request_id"] == "mine-1"
    assert fields["status"] == 200
    assert fields["shape"] == [1, 4, 4, 4]
    assert "s3cret" not in json.dumps(fields)


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "{}", "a\\nb"])
def test_ids_that_could_spoil_a_log_are_replaced(given: str) -> None:
    answer = ask(make_app(), "GET", "/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


def test_timings_come_with_the_answer() -> None:
    answer = asyncio.run(decode(make_app()))
    assert answer.headers["server-timing"].startswith("queue;dur=")


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_ask_nobody_else(path: str) -> None:
    answer = ask(make_app(), "GET", path)
    assert answer.status == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert b"http://" not in answer.body
    assert b"https://" not in answer.body


def test_unknown_addresses_and_methods_are_answered_in_the_same_form() -> None:
    for method, path, status, code in (
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/decode", 405, "method_not_allowed"),
        ("DELETE", "/models", 405, "method_not_allowed"),
    ):
        answer = ask(make_app(), method, path)
        assert (answer.status, answer.code) == (status, code)


def test_every_code_is_documented() -> None:
    schema = ask(make_app(), "GET", "/openapi.json").json()
    assert schema["components"]["schemas"]["Problem"]["properties"]["code"]["x-codes"] == CODES
