"""HTTP errors in OpenAI's format."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from loraserve.errors import LoraServeError

INVALID = "invalid_request_error"
OVERLOAD = "rate_limit_error"
SERVER = "server_error"

MAX_SHOWN_NAME = 200


class ApiError(LoraServeError):
    """An HTTP error: its status and the fields of OpenAI's ``error`` object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type_
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)

    @property
    def headers(self) -> Mapping[str, str]:
        # Retry-After is in whole seconds.
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    return bad_request(message, param, "unsupported_parameter")


def model_not_found(name: str) -> ApiError:
    shown = name if len(name) <= MAX_SHOWN_NAME else f"{name[:MAX_SHOWN_NAME]}..."
    message = f"The model `{shown}` does not exist. GET /v1/models lists the base model and the adapters served."
    return ApiError(404, message, param="model", code="model_not_found")


def context_exceeded(limit: int, prompt_tokens: int, output_tokens: int, param: str) -> ApiError:
    # Clients recognise this error by its words, so they are the same as in vLLM and OpenAI.
    requested = (
        f"{prompt_tokens + output_tokens} tokens ({prompt_tokens} in the {param}, {output_tokens} in the output)"
    )
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested {requested}. "
        f"Please reduce the length of the {param} or of the output."
    )
    return bad_request(message, param, "context_length_exceeded")


def unavailable(message: str, code: str, retry_after_s: float | None = 1.0) -> ApiError:
    return ApiError(503, message, type_=SERVER, code=code, retry_after_s=retry_after_s)


def timed_out(timeout_s: float) -> ApiError:
    message = f"The request did not finish within {timeout_s:g} s; ask for less, or raise gateway.request_timeout_s."
    return ApiError(504, message, type_=SERVER, code="timeout")


def refused(code: str, message: str, retry_after_s: float = 1.0, param: str | None = None) -> ApiError:
    """Return the HTTP error for a refusal by the router, an engine or the store. ``param`` is the prompt's field."""
    match code:
        case "overloaded":
            return ApiError(429, message, type_=OVERLOAD, code=code, retry_after_s=retry_after_s)
        case "bad_request":
            return bad_request(message, code=code)
        case "context_length":
            return bad_request(message, param, "context_length_exceeded")
        case "no_engine" | "starting" | "draining" | "timeout" | "engine_died" | "stream_interrupted":
            return unavailable(message, code, retry_after_s)
        case "adapter_unavailable" | "adapter_damaged":
            return unavailable(message, code, retry_after_s)
        case _:
            return ApiError(500, message, type_=SERVER, code=code)
