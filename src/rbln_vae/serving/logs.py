"""Logs as JSON, one object per line, without contents of requests."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

LOGGER = logging.getLogger("rbln_vae.serving")


class JSONFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, message and `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def log(level: int, message: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """Write a log entry with additional fields."""
    LOGGER.log(level, message, extra={"fields": fields}, exc_info=error)


def configure() -> None:
    """Send this package's logs and those of the HTTP server to stderr, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter())
    for name in (LOGGER.name, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
