"""What can be set of a service: each setting with its default and its meaning.

The command line and Ray Serve's options are made of these, so nothing heavy is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import setting

RUN_TIMEOUT = 120.0
"""Seconds that one run may take."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how it ends."""

    host: str = setting("127.0.0.1", "The interface to listen on.")
    port: int = setting(8000, "The port; 0 takes a free one.")
    grace: float = setting(
        120.0, "Seconds that admitted requests get to finish after SIGTERM, 0 or more."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535.")
        if not 0 <= self.grace < math.inf:
            raise ValueError(f"grace is {self.grace}, expected seconds, 0 or more.")


@dataclass(frozen=True)
class BatcherOptions:
    """When work is admitted, and when it runs."""

    max_batch: int = setting(8, "The most images that run together.")
    max_wait: float = setting(0.0, "Seconds that a request waits for others to join it.")
    memory_limit: int | None = setting(
        None,
        "The most memory that all runs together may take besides the weights, such as 2GiB: "
        "activations, scratch memory of their threads, what is kept for the next run, and the "
        "results. By default half of the memory of the device.",
    )
    queue: float = setting(
        32.0,
        "How much may wait, in images of the size that the model was compiled for; a larger "
        "image counts as many times as it is larger. Beyond it the answer is 429.",
    )
    concurrency: int = setting(1, "The most runs at once.")

    def __post_init__(self) -> None:
        for name in ("max_batch", "concurrency", "queue"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0.")
        if not 0 <= self.max_wait < math.inf:
            raise ValueError(f"max_wait is {self.max_wait}, expected seconds, 0 or more.")


@dataclass(frozen=True)
class Limits:
    """What a client may ask and send."""

    max_body: int = setting(
        64 * 2**20, "The most bytes of one body, as 64MiB, which is the default."
    )
    max_pixels: int = setting(
        4096 * 4096,
        "The most pixels of the images of one request; a latent counts as the images that it "
        "stands for.",
    )
    body_timeout: float = setting(30.0, "Seconds in which a body must arrive.")
    api_key: str | None = setting(None, "What clients must show. By default everybody is let in.")

    def __post_init__(self) -> None:
        for name in ("max_body", "max_pixels", "body_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0.")
        if self.api_key == "":
            raise ValueError(
                "api_key is empty. Say what clients must show, or leave it out to let everybody in."
            )

    @property
    def all_bodies(self) -> int:
        """Bytes of all bodies that are held at once."""
        return 8 * self.max_body
