"""The outermost layer of the application: request ids, keys, logs, and unexpected errors."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RefusedError
from .logs import log

OPEN_ROUTES = ("/health", "/ready")
"""Routes that need no key, so that monitoring needs none."""

CLIENT_GONE = 499
"""The status in logs and metrics of a request whose client disconnected."""

_MOST_HEAD = 16 * 1024
_MOST_HEADERS = 100
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Pages are self-contained, and may connect only to this server.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'"
)

Answered = Callable[[str, str, int, float], None]


class Edge:
    """Wraps an application: refuses unauthorised requests, and answers unexpected errors.

    Args:
        app: The application.
        api_key: The key that clients must send; `None` admits everybody.
        answered: Called after each response with method, route, status and seconds.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, answered: Answered) -> None:
        self._app, self._api_key, self._answered = app, api_key, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        entry: dict[str, Any] = {
            "request_id": _request_id(headers),
            "method": scope["method"],
            "path": scope["path"][:200],
        }
        scope.setdefault("state", {})["entry"] = entry
        started, status = time.monotonic(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _mark(MutableHeaders(scope=message), entry["request_id"])
            await send(message)

        failure = None
        try:
            self._refuse_strangers(scope, headers)
            await self._app(scope, receive, send_marked)
        except RefusedError as error:
            await _answer(error, scope, send_marked)
        except Exception as error:
            failure = error
            if status:
                raise  # the response has begun, so the connection must be closed
            await _answer(_internal_error(), scope, send_marked)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            self._answered(_known_method(scope["method"]), route, status, seconds)
            log(
                logging.ERROR if failure or not status else logging.INFO,
                "request",
                error=failure,
                **entry,
                status=status,
                seconds=round(seconds, 4),
            )

    def _refuse_strangers(self, scope: Scope, headers: Headers) -> None:
        head = len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if head > _MOST_HEAD or len(scope["headers"]) > _MOST_HEADERS:
            raise RefusedError(
                431,
                "headers_too_large",
                f"The query and {len(scope['headers'])} headers have {head:,} bytes; at most "
                f"{_MOST_HEAD:,} in {_MOST_HEADERS} headers are read.",
            )
        if self._api_key is None or scope["path"] in OPEN_ROUTES:
            return
        # As bytes, because compare_digest accepts only ASCII text.
        shown = _shown_key(headers.get("authorization", "")).encode("utf-8", "replace")
        if not hmac.compare_digest(shown, self._api_key.encode()):
            raise RefusedError(
                401,
                "unauthorized",
                "This server requires a key, as 'Authorization: Bearer KEY' or as the password in "
                "the address: https://:KEY@host/decode.",
            )


def refusal(error: RefusedError, request_id: str) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an error response."""
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = 'Basic realm="rbln-vae", charset="UTF-8"'
    content = {"code": error.code, "message": error.message, "request_id": request_id}
    return json.dumps(content).encode(), headers


async def _answer(error: RefusedError, scope: Scope, send: Send) -> None:
    entry = scope["state"]["entry"]
    entry["code"] = error.code
    body, headers = refusal(error, entry["request_id"])
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _internal_error() -> RefusedError:
    return RefusedError(
        500,
        "internal_error",
        "This is a defect of the server. Its log has the details under the request id.",
    )


def _request_id(headers: Headers) -> str:
    """The client's request id if it has only harmless characters, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex


def _shown_key(authorization: str) -> str:
    """The key in a header: a bearer token, or the password of basic authentication."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _mark(headers: MutableHeaders, request_id: str) -> None:
    headers["x-request-id"] = request_id
    headers["x-content-type-options"] = "nosniff"
    headers.setdefault("cache-control", "no-store")
    if headers.get("content-type", "").startswith("text/html"):
        headers["content-security-policy"] = _PAGE_POLICY
        headers["referrer-policy"] = "no-referrer"


def _known_method(method: str) -> str:
    """A label for metrics, with a bounded number of values."""
    return method if method in ("GET", "HEAD", "POST") else "other"
