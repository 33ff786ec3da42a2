"""The command `serve`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..serving.settings import Address, BatcherOptions, Limits
from ..units import byte_count, optional_byte_count
from .terminal import err, working

Number = TypeVar("Number")


def serve(
    models: Sequence[str],
    settings: Mapping[str, Any],
    *,
    where: Mapping[str, Any],
    address: Address,
    batching: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> None:
    """Load the models, and answer requests until a signal comes."""
    try:
        from ..serving.app import create_app
        from ..serving.backend import LocalBackend
        from ..serving.models import named_models, open_models
        from ..serving.server import make_server
    except ImportError as error:
        raise OSError(
            f"serve needs {error.name}, which isn't installed: pip install 'rbln-vae[serve]'"
        ) from error

    memory_limit = _bytes("memory-limit", batching.get("memory_limit"), optional_byte_count)
    options = BatcherOptions(**{**batching, "memory_limit": memory_limit})
    if "max_body" in limits:
        limits = {**limits, "max_body": _bytes("max-body", limits["max_body"], byte_count)}
    allowed = Limits(**limits)
    named: dict[str, str | None] = {**named_models(models)} if models else {"demo": None}
    with working(f"Loading {', '.join(named)} …"):
        served, memory = open_models(named, settings, memory_limit, **where)
    app = create_app(
        LocalBackend(served, dataclasses.replace(options, memory_limit=memory)), allowed
    )
    names = ", ".join(each.name for each in served)
    host = f"[{address.host}]" if ":" in address.host else address.host

    def listening(port: int) -> None:
        err().print(f"serving {names} on http://{host}:{port}")

    make_server(app, address, listening).run()


def _bytes(option: str, text: str | None, parse: Callable[[object], Number]) -> Number:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--{option} {text}: {error}") from None
