"""Error responses: HTTP status, stable code, message."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that gets no result.

    Args:
        status: The HTTP status.
        code: A stable code for programs, one of `CODES`.
        message: A text for people: what was expected, what came, what to do.
        retry_after: Seconds after which to try again; `None` (default) if that can't help.
    """

    def __init__(
        self, status: int, code: str, message: str, *, retry_after: int | None = None
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after


CODES = {
    "invalid_query": "422: a parameter is missing, unknown or has a wrong value",
    "unknown_model": "404: the server has no model of that name",
    "no_encoder": "422: the model was compiled without its encoder",
    "no_video": "422: the model runs images, or its frames don't go into a video file",
    "no_pyav": "501: the server lacks PyAV, which writes videos",
    "unknown_scaling": "422: the server doesn't know the scaling of the model's latents",
    "wrong_shape": "422: the shape doesn't fit the model",
    "wrong_body_size": "422: the length of the body doesn't match shape and dtype",
    "not_finite": "422: the tensor, or a result requested as a picture, has NaN or infinity",
    "not_an_image": "422: the body can't be read as a picture",
    "unsupported_body": "415: the body is compressed or is JSON",
    "too_large": "413: the body or the image exceeds the server's limits",
    "needs_too_much_memory": "413: the run doesn't fit in the server's memory limit",
    "unauthorized": "401: the key is missing or wrong",
    "not_found": "404: the address doesn't exist",
    "method_not_allowed": "405: the address doesn't support the method",
    "headers_too_large": "431: the headers or the query are too long",
    "slow_client": "408: the body didn't arrive in time",
    "queue_full": "429: the queue is full; Retry-After says when to try again",
    "busy": "429: too many bodies are being received; Retry-After says when to try again",
    "shutting_down": "503: the server is shutting down and accepts no work",
    "out_of_memory": "503: the machine ran out of memory",
    "timeout": "504: the run exceeded the time limit",
    "internal_error": "500: a defect of the server; its log has details under the request id",
}
"""Every code, with its status and meaning."""
