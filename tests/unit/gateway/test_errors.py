"""Errors have OpenAI's shape and the statuses that clients act on."""

import json

import pytest

from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.api.models import refused_adapter, store_silent
from loraserve.gateway.errors import INVALID, bad_request, model_not_found, refused, timed_out, unavailable


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("overloaded", 429),
        ("bad_request", 400),
        ("no_engine", 503),
        ("adapter_unavailable", 503),
        ("engine_died", 503),
        ("stream_interrupted", 503),
        ("draining", 503),
        ("adapter_damaged", 503),
        ("engine_error", 500),
        ("anything else", 500),
    ],
)
def test_refusals_by_code(code: str, status: int) -> None:
    error = refused(code, "why", 2.3)
    assert (error.status, error.code, error.message) == (status, code, "why")
    assert ("Retry-After" in error.headers) == (status in (429, 503))
    if error.headers:
        assert error.headers["Retry-After"] == "3"


# First the codes of routers and engines, then those of the bus and of every service.
CLIENTS_FAULT = {"bad_request": 400, "context_length": 400, "overloaded": 429}
NOT_CLIENTS_FAULT = {
    **dict.fromkeys(("no_engine", "adapter_unavailable", "starting", "timeout"), 503),
    **dict.fromkeys(("engine_error", "refused", "internal"), 500),
    **dict.fromkeys(("bad_message", "bad_reply", "protocol_mismatch"), 500),
}


@pytest.mark.parametrize(("code", "status"), [*CLIENTS_FAULT.items(), *NOT_CLIENTS_FAULT.items()])
def test_only_failures_of_the_cluster_are_5xx(code: str, status: int) -> None:
    assert refused(code, "why").status == status


def test_a_length_refused_by_an_engine_is_the_gateway_s_own_error() -> None:
    error = refused("context_length", "too long", param="messages")
    assert (error.code, error.type, error.param) == ("context_length_exceeded", INVALID, "messages")
    assert not error.headers


WRONG_ADAPTER = [
    *("bad_format", "bad_shape", "bad_rank", "bad_name", "not_finite", "unsupported", "not_found", "duplicate"),
    *("forbidden", "too_large"),
]
STORE_TROUBLE = {
    **dict.fromkeys(("disk_full", "storage", "corrupt", "mismatch", "bad_range", "internal"), 500),
    "starting": 503,
}


@pytest.mark.parametrize(("code", "status"), [*((code, 400) for code in WRONG_ADAPTER), *STORE_TROUBLE.items()])
def test_refusals_of_the_store(code: str, status: int) -> None:
    error = refused_adapter("pirate", PeerError(code, "why"))
    assert (error.status, error.code) == (status, code)


def test_the_error_for_a_dead_store_names_the_lost_connection() -> None:
    error = store_silent(RequestTimeoutError("store: its connection was lost before it answered"))
    assert (error.status, error.code) == (503, "no_store")
    assert "its connection was lost" in error.message


def test_the_shape_of_an_error() -> None:
    body = json.loads(bad_request("no", "n", "c").encode())
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}}
    assert unavailable("no", "x", 0.1).headers == {"Retry-After": "1"}
    assert timed_out(2.0).status == 504


def test_an_unknown_model_is_reported_as_by_openai() -> None:
    error = model_not_found("me/x:1")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "`me/x:1` does not exist" in error.message
