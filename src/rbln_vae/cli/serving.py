"""The command `serve`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..units import byte_count, optional_byte_count
from .terminal import err, working

Number = TypeVar("Number")


def serve(
    model: str | None,
    others: Sequence[str],
    settings: Mapping[str, Any],
    *,
    given: Mapping[str, Any],
    host: str,
    port: int,
    grace: float,
    memory_limit: str | None,
    max_body: str,
    batching: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> None:
    """Load the models, and answer requests until a signal comes."""
    try:
        from ..serving.app import Limits, create_app
        from ..serving.backend import LocalBackend
        from ..serving.batcher import BatcherOptions
        from ..serving.models import named_models, open_models
        from ..serving.server import Address, make_server
    except ImportError as error:
        raise OSError(
            f"serve needs {error.name}, which isn't installed: pip install 'rbln-vae[serve]'"
        ) from error

    given_memory = _bytes("memory-limit", memory_limit, optional_byte_count)
    options = BatcherOptions(**batching)
    allowed = Limits(max_body=_bytes("max-body", max_body, byte_count), **limits)
    texts = [*([] if model is None else [model]), *others]
    named: dict[str, str | None] = {**named_models(texts)} if texts else {"demo": None}
    with working(f"Loading {', '.join(named)} …"):
        served, memory = open_models(named, settings, given_memory, **given)
    options = dataclasses.replace(options, memory_limit=memory)
    app = create_app(LocalBackend(served, options), allowed)
    server = make_server(app, Address(host, port, grace))
    err().print(f"serving {', '.join(each.name for each in served)} on http://{host}:{port}")
    server.run()


def _bytes(option: str, text: str | None, parse: Callable[[object], Number]) -> Number:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--{option} {text}: {error}") from None
