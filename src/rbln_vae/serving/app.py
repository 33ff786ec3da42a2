"""The HTTP application: addresses, limits and answers around a backend."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from torch import Tensor

from ..errors import RBLNRuntimeError
from ..models.family import DECODER, ENCODER
from ..version import __version__
from ..videos import require_pyav
from . import protocol
from .backend import Backend
from .batcher import ClosedError, Outcome, QueueFullError, TooLargeError
from .body import Bodies, announced_length, read_body, too_long, unless_gone
from .edge import Edge, refusal
from .errors import CODES, RefusedError
from .metrics import CONTENT_TYPE, Metrics
from .models import ModelInfo, NotFiniteError, Output, Shape
from .protocol import DecodeQuery, EncodeQuery, PlanQuery, Reply, TensorInput
from .settings import Limits

_PAGES = Path(__file__).parent / "pages"
_RETRY_ELSEWHERE = 5


class Problem(BaseModel):
    """An answer that isn't the result."""

    code: str = Field(description="It never changes.", json_schema_extra={"x-codes": dict(CODES)})
    message: str = Field(description="What was expected, what came, and what to do.")
    request_id: str = Field(description="Under which the server's log has it.")


class ModelEntry(BaseModel):
    """What a client may know of a model."""

    name: str
    class_name: str
    frames: bool
    frames_per_latent: int | None
    parts: list[str]
    in_channels: int
    latent_channels: int
    vae_scale_factor: int
    sample_size: tuple[int, int]
    scaling_factor: float | None
    shift_factor: float | None
    latents_mean: list[float] | None
    latents_std: list[float] | None
    dtype: str
    target: str


class PlanEntry(BaseModel):
    """What one image takes in a part of a model."""

    part: str
    height: int
    width: int
    memory: int | None = Field(
        description="Bytes besides the weights; null if the server has not as much."
    )
    seconds: float | None = Field(
        description="About how long it takes alone; null if that isn't known."
    )


class Plan(BaseModel):
    """What images of usual sizes take in a model."""

    model: str
    runs: list[PlanEntry]


class ModelList(BaseModel):
    """The models of a server, the default first."""

    models: list[ModelEntry]


class Status(BaseModel):
    """How a server is."""

    status: str
    version: str


def create_app(backend: Backend, limits: Limits | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        backend: What runs the models.
        limits: What a client may ask and send.

    Returns:
        The application, which closes the backend when it ends. Whoever ends it calls its
        `state.drain()` first, if requests are still to be answered.
    """
    service = _Service(backend, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.drain()
        await backend.close()

    app = FastAPI(
        title="rbln-vae",
        version=__version__,
        description="Decodes latents and encodes images, in the protocol of diffusers' "
        "`remote_decode` and `remote_encode`.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.drain = service.drain
    app.add_middleware(Edge, api_key=service.limits.api_key, answered=service.metrics.answered)
    app.add_exception_handler(RefusedError, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid_query)
    app.add_exception_handler(HTTPException, _on_http_error)

    binary = {"type": "string", "format": "binary"}
    tensor = {protocol.TENSOR: {"schema": binary}, "application/octet-stream": {"schema": binary}}
    pictures = {f"image/{kind.lower()}": {"schema": binary} for kind in protocol.PICTURE_FORMATS}
    results = {protocol.TENSOR: {"schema": binary}}
    shown = (*protocol.IMAGE_TYPES.values(), protocol.VIDEO_TYPE)
    images = {kind: {"schema": binary} for kind in shown}
    problems: dict[int | str, dict[str, Any]] = {
        "default": {"model": Problem, "description": "Anything else; `code` says what."}
    }

    @app.post("/", include_in_schema=False)
    @app.post(
        "/decode",
        response_class=Response,
        responses={200: {"content": {**results, **images}}, **problems},
        openapi_extra={"requestBody": {"content": tensor, "required": True}},
    )
    async def decode(request: Request, query: Annotated[DecodeQuery, Query()]) -> Response:
        """Turn a latent into an image or a video; `POST /` is the same."""
        return await service.decode(request, query)

    @app.post(
        "/encode",
        response_class=Response,
        responses={200: {"content": results}, **problems},
        openapi_extra={"requestBody": {"content": {**pictures, **tensor}, "required": True}},
    )
    async def encode(request: Request, query: Annotated[EncodeQuery, Query()]) -> Response:
        """Turn an image into the mode of its latents."""
        return await service.encode(request, query)

    @app.get("/models", responses=problems)
    async def models() -> ModelList:
        """The models, the default first."""
        entries = [
            {**dataclasses.asdict(model), **dataclasses.asdict(model.scaling)}
            for model in backend.models.values()
        ]
        return ModelList(models=[ModelEntry.model_validate(entry) for entry in entries])

    @app.get("/plan", responses=problems)
    async def plan(query: Annotated[PlanQuery, Query()]) -> Plan:
        """What images of usual sizes take in memory and time."""
        model = service.model(query.model)
        runs = [dataclasses.asdict(run) for run in await backend.plan(model.name)]
        return Plan(model=model.name, runs=[PlanEntry.model_validate(run) for run in runs])

    @app.get("/health", responses=problems)
    async def health() -> Status:
        """Whether the process lives."""
        return Status(status="alive", version=__version__)

    @app.get("/ready", responses=problems)
    async def ready() -> Status:
        """Whether the server takes work."""
        if service.closing:
            raise _shutting_down()
        return Status(status="ready", version=__version__)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems},
    )
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((_PAGES / "index.html").read_text(encoding="utf-8"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse((_PAGES / "docs.html").read_text(encoding="utf-8"))

    return app


class _Service:
    """The way of a request from its query to its answer."""

    def __init__(self, backend: Backend, limits: Limits) -> None:
        self.backend, self.limits = backend, limits
        self.bodies = Bodies(limits.all_bodies)
        self.metrics = Metrics(backend.models, backend.load, lambda: self.bodies.held)
        self.closing = False

    def drain(self) -> None:
        """Say no to those who ask for more, and let nothing that is here wait for it."""
        self.closing = True
        self.backend.drain()

    async def decode(self, request: Request, query: DecodeQuery) -> Response:
        model, accept = self.model(query.model), request.headers.get("accept", "")
        expected = protocol.decode_input(query, model, accept)
        output = protocol.output_of(query, accept)
        if output == "frames":
            await _require_pyav()
        await self._admit(model, DECODER, expected.model_shape, output)
        with ExitStack() as held:
            most = held.enter_context(self._room_for(request, expected))
            body = await read_body(request, most, self.limits.body_timeout)
            # What takes a while is done in threads, so that nobody else waits for it.
            latent = await asyncio.to_thread(expected.read, body)
            latent = protocol.prepare_latent(latent, query, model, expected)
            if output == "frames":
                # Its levels are those of float32, the finest; the file has no other dtype.
                chunks = self.backend.video(model.name, latent.float(), query.fps)
                return await self._video(request, model, latent, chunks, held)
            outcome = await self._run(request, model, DECODER, latent, output)
        if output == "pictures":
            reply = await asyncio.to_thread(
                protocol.picture_reply, outcome.tensor, outcome.finite, query
            )
        else:
            reply = await asyncio.to_thread(protocol.sample_reply, outcome.tensor, query)
        return self._respond(request, reply, outcome)

    async def encode(self, request: Request, query: EncodeQuery) -> Response:
        model = self.model(query.model)
        if ENCODER not in model.parts:
            raise RefusedError(
                422,
                "no_encoder",
                f"The model {model.name!r} was compiled without its encoder. Compile it again "
                "without --decoder-only, or name another of GET /models.",
            )
        expected = protocol.encode_input(query, model)
        if expected is not None:
            await self._admit(model, ENCODER, expected.model_shape)
        with self._room_for(request, expected) as most:
            body = await read_body(request, most, self.limits.body_timeout)
            if expected is not None:
                image = await asyncio.to_thread(expected.read, body)
                image = image.view(expected.model_shape)
            else:
                size = protocol.picture_size(body)
                # What it takes in memory is known before it is there.
                self._require_pixels(size[0] * size[1])
                fitted = protocol.fitted_size(size, model)
                await self._admit(model, ENCODER, (1, model.in_channels, *fitted))
                image = await asyncio.to_thread(protocol.read_picture, body, model)
            outcome = await self._run(request, model, ENCODER, image)
        return self._respond(request, protocol.encode_reply(outcome.tensor, query, model), outcome)

    def model(self, name: str | None) -> ModelInfo:
        """The model of that name, or the default one."""
        models = self.backend.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise RefusedError(
                404,
                "unknown_model",
                f"There is no model {name!r}; there are {', '.join(map(repr, models))}.",
            )
        return models[name]

    async def _admit(
        self, model: ModelInfo, part: str, shape: Shape, output: Output = "sample"
    ) -> None:
        """Refuse what would be refused later, before more is done for it."""
        self._require_pixels(model.pixels(part, shape))
        try:
            await self.backend.check(model.name, part, shape, output)
        except ValueError as error:
            raise RefusedError(422, "wrong_shape", str(error)) from error
        except Exception as error:
            raise _refused(error) from error

    def _require_pixels(self, pixels: int) -> None:
        if pixels > self.limits.max_pixels:
            raise RefusedError(
                413,
                "too_large",
                f"The image has {pixels:,} pixels, and this server takes "
                f"{self.limits.max_pixels:,} in a request. Send a smaller image or batch.",
            )

    def _room_for(
        self, request: Request, expected: TensorInput | None
    ) -> AbstractContextManager[int]:
        """Keep room for the body, which gives the most bytes that it may have."""
        most = self.limits.max_body
        if expected is not None and expected.bytes > most:
            raise too_long(most)
        length = announced_length(request, most)
        if expected is not None:
            if length not in (None, expected.bytes):
                raise protocol.wrong_body_size(expected, length or 0)
            length = expected.bytes
        return self.bodies.hold(most if length is None else length)

    async def _run(
        self,
        request: Request,
        model: ModelInfo,
        part: str,
        tensor: Tensor,
        output: Output = "sample",
    ) -> Outcome:
        try:
            outcome = await unless_gone(request, self.backend.run(model.name, part, tensor, output))
        except RefusedError:
            raise
        except Exception as error:
            raise _refused(error) from error
        self._note(request, model, part, tensor, outcome)
        return outcome

    async def _video(
        self,
        request: Request,
        model: ModelInfo,
        latent: Tensor,
        chunks: AsyncGenerator[bytes | Outcome, None],
        held: ExitStack,
    ) -> Response:
        """The answer with a video, once its first bytes are there."""
        try:
            first = await unless_gone(request, anext(chunks))
        except RefusedError:
            raise
        except Exception as error:
            raise _refused(error) from error
        note = functools.partial(self._note, request, model, DECODER, latent)
        return _VideoResponse(request, first, chunks, note, held.pop_all())

    def _note(
        self, request: Request, model: ModelInfo, part: str, tensor: Tensor, outcome: Outcome
    ) -> None:
        """Count a result, and log how it came about."""
        self.metrics.ran(model.name, part, outcome)
        entry = request.state.entry
        entry.update(model=model.name, part=part, shape=list(tensor.shape), batch=outcome.batch)
        entry.update(waited=round(outcome.waited, 4), ran=round(outcome.ran, 4))

    def _respond(self, request: Request, reply: Reply, outcome: Outcome) -> Response:
        timing = f"queue;dur={outcome.waited * 1e3:.1f}, run;dur={outcome.ran * 1e3:.1f}"
        headers = {**reply.headers, "server-timing": timing}
        request.state.entry["bytes"] = len(reply.body)
        return Response(reply.body, media_type=reply.media_type, headers=headers)


class _VideoResponse(Response):
    """A video that is sent as it is made.

    If that fails, the connection ends in the middle: the status has been sent.

    Args:
        request: What it answers.
        first: The first bytes.
        chunks: The others, and at the end how they came about.
        note: Called with that.
        held: What is held until the end.
    """

    def __init__(
        self,
        request: Request,
        first: bytes | Outcome,
        chunks: AsyncGenerator[bytes | Outcome, None],
        note: Callable[[Outcome], None],
        held: ExitStack,
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"content-type": protocol.VIDEO_TYPE})
        self._request, self._first, self._chunks = request, first, chunks
        self._note, self._held = note, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                async with aclosing(self._chunks):
                    await unless_gone(self._request, self._send(send))
            except Exception as error:
                refused = _refused(error)
                if not isinstance(refused, RefusedError):
                    raise
                self._request.state.entry["code"] = refused.code

    async def _send(self, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        sent, data = 0, self._first
        while isinstance(data, bytes):
            await send({"type": "http.response.body", "body": data, "more_body": True})
            sent += len(data)
            data = await anext(self._chunks)
        self._note(data)
        self._request.state.entry["bytes"] = sent
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _require_pyav() -> None:
    try:
        await asyncio.to_thread(require_pyav)
    except RBLNRuntimeError as error:
        raise RefusedError(501, "no_pyav", f"{error} That is for the operator to do.") from None


def _refused(error: Exception) -> Exception:
    """What to answer if a backend doesn't run a tensor; a defect stays what it is."""
    match error:
        case QueueFullError():
            return RefusedError(
                429,
                "queue_full",
                "More waits than this server lets wait. Try again after "
                f"{error.retry_after} seconds.",
                retry_after=error.retry_after,
            )
        case TooLargeError():
            return RefusedError(
                413, "needs_too_much_memory", f"{error} Send a smaller image or batch."
            )
        case ClosedError():
            return _shutting_down()
        case MemoryError():
            return RefusedError(
                503,
                "out_of_memory",
                "The machine had no memory for this run. Send a smaller image or batch, or try "
                "again when less runs.",
                retry_after=_RETRY_ELSEWHERE,
            )
        case TimeoutError():
            return RefusedError(
                504, "timeout", f"{error} The operator gives more with --run-timeout."
            )
        case NotFiniteError():
            return protocol.not_finite(str(error))
    return error


def _shutting_down() -> RefusedError:
    return RefusedError(
        503,
        "shutting_down",
        "The server finishes what it has, and takes no more.",
        retry_after=_RETRY_ELSEWHERE,
    )


# Answers in the same form, whoever refuses


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    entry = request.state.entry
    entry["code"] = error.code
    body, headers = refusal(error, entry["request_id"])
    return Response(body, error.status, headers)


async def _on_invalid_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [
        f"{'.'.join(map(str, each['loc'][1:])) or 'query'}: {each['msg']}"
        f"{_shown(each.get('input'))}"
        for each in error.errors()
    ]
    message = f"The query is wrong. {'; '.join(found)[:1000]}. See /docs."
    return await _on_refused(request, RefusedError(422, "invalid_query", message))


def _shown(value: object) -> str:
    """A value that came, if it is short."""
    return (
        f" (it was {value!r})"
        if isinstance(value, (str, int, float)) and len(str(value)) < 50
        else ""
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_query")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}. See /docs."
    response = await _on_refused(request, RefusedError(error.status_code, code, message))
    response.headers.update(error.headers or {})
    return response
