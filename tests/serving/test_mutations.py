"""Whatever comes, the service answers: never with 500, never not at all."""

from __future__ import annotations

import asyncio
import io
import random
import string
from typing import Any
from urllib.parse import urlencode

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks as openapi_checks
from services import Answer, call, make_app, query_of, raw
from vaes import noise

from rbln_vae.serving.errors import CODES
from rbln_vae.serving.settings import Limits

LIMITS = Limits(max_body=200_000, max_pixels=64 * 64)

# Mutations


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((16, 12), 90).convert("RGB").save(
        file, random.choice(["PNG", "JPEG", "WEBP"])
    )
    return file.getvalue()


def good_request(rng: random.Random) -> dict[str, Any]:
    """A request that would be answered with 200."""
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    if rng.random() < 0.3:
        return {"path": "/encode", "query": [], "body": picture(), "headers": {}}
    part = rng.choice(["decode", "encode"])
    shape = (1, 4, rng.randint(1, 8), rng.randint(1, 8)) if part == "decode" else (1, 3, 8, 8)
    tensor = noise(*shape, dtype=dtype)
    fields = query_of(tensor)
    if part == "decode":
        fields["output_type"] = rng.choice(["pil", "pt"])
        fields["image_format"] = rng.choice(["png", "jpg"])
        fields["partial_postprocess"] = rng.choice(["True", "False"])
        if rng.random() < 0.3:
            fields["do_scaling"] = "True"
    if rng.random() < 0.3:
        fields["scaling_factor"] = 0.5
    query = [
        (name, str(item))
        for name, value in fields.items()
        for item in (value if isinstance(value, list) else [value])
    ]
    path = rng.choice(["/decode", "/"]) if part == "decode" else "/encode"
    return {
        "path": path,
        "query": query,
        "body": raw(tensor),
        "headers": {"content-type": "tensor/binary", "accept": "tensor/binary"},
    }


WORDS = [
    "", "0", "-1", "1e999", "nan", "inf", "-inf", "true", "null", "[1,4,8,8]", "{}", "1.5", "é",
    "99999999999999999999", "16777216", "16777217", "4294967296", "float32", "float64", "uint8",
    "mp4", "pil", "pt", "../../etc/passwd", "\x00", "%00", "a" * 300, "1_000", "١", " 1 ",
]  # fmt: skip
NAMES = [
    "shape", "dtype", "output_type", "image_format", "partial_postprocess", "scaling_factor",
    "shift_factor", "do_scaling", "height", "width", "model", "x",
]  # fmt: skip


def mutate(request: dict[str, Any], rng: random.Random) -> None:
    """Change one thing."""
    query, body = request["query"], request["body"]
    match rng.randrange(12):
        case 0 if query:
            query.pop(rng.randrange(len(query)))
        case 1:
            query.insert(rng.randint(0, len(query)), (rng.choice(NAMES), rng.choice(WORDS)))
        case 2 if query:
            at = rng.randrange(len(query))
            query[at] = (query[at][0], rng.choice(WORDS))
        case 3 if query:
            at = rng.randrange(len(query))
            query[at] = (query[at][0], str(rng.randint(-2, 20)))
        case 4 if body:
            request["body"] = body[: rng.randrange(len(body))]
        case 5:
            request["body"] = body + rng.randbytes(rng.randint(1, 50))
        case 6 if body:
            changed = bytearray(body)
            for _ in range(rng.randint(1, 20)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            request["body"] = bytes(changed)
        case 7:
            request["body"] = rng.randbytes(rng.choice([0, 1, 7, 64, 4096, 250_000]))
        case 8:
            request["path"] = rng.choice(["/decode", "/encode", "/", "/models", "/x", "//decode"])
        case 9:
            request["method"] = rng.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"])
        case 10:
            names = ["content-type", "accept", "content-length", "content-encoding", "x-request-id"]
            letters = rng.choices(string.printable.strip(), k=rng.randint(0, 30))
            request["headers"][rng.choice([*names, "authorization"])] = rng.choice(
                ["".join(letters), "0", "99999999999", "gzip", "image/png", "application/json"]
            )
        case 11:
            request["chunks"] = rng.randint(2, 5)
        case _:
            query.append((rng.choice(NAMES), rng.choice(WORDS)))


async def send(app: Any, request: dict[str, Any]) -> Answer:
    body = request["body"]
    if "chunks" in request:
        size = len(body) // request["chunks"] + 1
        body = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    query = urlencode(request["query"])
    method = request.get("method", "POST")
    return await call(app, method, request["path"], query, body, request["headers"])


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(400, id="some"),
        pytest.param(10_000, id="all", marks=pytest.mark.slow),
    ],
)
def test_mutated_requests_are_answered(count: int) -> None:
    async def main() -> dict[int, int]:
        app, rng, seen = make_app(limits=LIMITS), random.Random(0), dict[int, int]()
        for number in range(count):
            request = good_request(rng)
            for _ in range(number % 4):
                mutate(request, rng)
            answer = await send(app, request)
            seen[answer.status] = seen.get(answer.status, 0) + 1
            assert 200 <= answer.status < 500, (request, answer)
            if number % 4 == 0:
                assert answer.status == 200, (request, answer)
            elif answer.status >= 400 and request.get("method") != "HEAD":
                assert answer.code in CODES, (request, answer)
        return seen

    seen = asyncio.run(main())
    # The mutations reach far: most kinds of refusal were seen.
    assert seen[200] > count / 4
    assert {404, 405, 413, 415, 422} <= set(seen)


# The service against its own description

load_all_checks()
schemathesis.openapi.media_type("tensor/binary", st.binary(max_size=2000))
for kind in ("png", "jpeg", "webp"):
    schemathesis.openapi.media_type(f"image/{kind}", st.binary(max_size=2000))

_app = make_app(limits=LIMITS)


async def lasting_app(scope: Any, receive: Any, send: Any) -> None:
    """The application without its end, which would come after every single request."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
    else:
        await _app(scope, receive, send)


schema = schemathesis.openapi.from_asgi("/openapi.json", lasting_app)


@schema.parametrize()
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_to_its_description(case: schemathesis.Case) -> None:
    # Bytes that the description allows must still be the bytes of the tensor that the query
    # names, which it can't say; and schemes of keys are not in it.
    case.call_and_validate(excluded_checks=[openapi_checks.positive_data_acceptance])
