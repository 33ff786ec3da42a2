"""The command `serve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..units import byte_count, optional_byte_count
from .models import open_model
from .terminal import err

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
        from ..serving.models import ServedModel
        from ..serving.server import Address, default_memory_limit, make_server
    except ImportError as error:
        raise OSError(
            f"serve needs {error.name}, which isn't installed: pip install 'rbln-vae[serve]'"
        ) from error

    memory = _bytes("memory-limit", memory_limit, optional_byte_count) or default_memory_limit()
    options = BatcherOptions(memory_limit=memory, **batching)
    allowed = Limits(max_body=_bytes("max-body", max_body, byte_count), **limits)
    run = {**settings, "memory_limit": memory}
    served = [
        ServedModel(name, open_model(where, run, **given))
        for name, where in _named(model, others).items()
    ]
    app = create_app(LocalBackend(served, options), allowed)
    server = make_server(app, Address(host, port, grace))
    err().print(f"serving {', '.join(each.name for each in served)} on http://{host}:{port}")
    server.run()


def _named(model: str | None, others: Sequence[str]) -> dict[str, str | None]:
    """The models by name, the default first."""
    named: dict[str, str | None] = {}
    if model is not None:
        named[Path(model).name] = model
    elif not others:
        named["demo"] = None
    for each in others:
        name, equals, where = each.partition("=")
        if not (name and equals and where):
            raise ValueError(f"--model {each}: expected NAME=MODEL, such as sdxl=compiled-sdxl")
        if name in named:
            raise ValueError(f"two models are named {name}; give each a name of its own")
        named[name] = where
    return named


def _bytes(option: str, text: str | None, parse: Callable[[object], Number]) -> Number:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--{option} {text}: {error}") from None
