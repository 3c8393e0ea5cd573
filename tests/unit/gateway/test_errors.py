"""OpenAI's error shape and the statuses that clients act on."""

import json

import pytest

from loraserve.gateway.errors import bad_request, model_not_found, refused, timed_out, unavailable


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("overloaded", 429),
        ("bad_request", 400),
        ("no_engine", 503),
        ("adapter_unavailable", 503),
        ("engine_died", 503),
        ("stream_interrupted", 503),
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


def test_shape() -> None:
    body = json.loads(bad_request("no", "n", "c").encode())
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}}
    assert unavailable("no", "x", 0.1).headers == {"Retry-After": "1"}
    assert timed_out(2.0).status == 504


def test_model_not_found_is_what_openai_says() -> None:
    error = model_not_found("me/x:1")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "`me/x:1` does not exist" in error.message
