"""Which bodies are accepted, and which field an error names."""

from typing import Any

import msgspec
import pytest

from loraserve.gateway.api.schema import (
    ChatRequest,
    CompletionRequest,
    check_chat,
    check_completion,
    check_token_ids,
    decode_request,
    prompt_items,
    sampling_params,
    stop_strings,
)
from loraserve.gateway.errors import ApiError

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    request = decode_request(msgspec.json.encode({"model": "m", "messages": MESSAGES} | fields), ChatRequest)
    check_chat(request)
    return request


def completion(**fields: Any) -> CompletionRequest:
    request = decode_request(msgspec.json.encode({"model": "m", "prompt": "hi"} | fields), CompletionRequest)
    check_completion(request)
    return request


NULLABLE = [
    *("stream", "stream_options", "max_tokens", "min_tokens", "n", "best_of", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "logit_bias", "response_format", "user"),
    *("logprobs", "top_logprobs", "tools", "tool_choice", "functions", "max_completion_tokens", "chat_template"),
]


@pytest.mark.parametrize("field", NULLABLE)
def test_null_stands_for_not_given(field: str) -> None:
    value = getattr(chat(**{field: None}), field, None)
    assert value is None or bytes(value) == b"null"


def test_bodies_of_common_clients_are_accepted() -> None:
    request = chat(
        max_completion_tokens=5,
        ignore_eos=True,
        repetition_penalty=1.1,
        min_tokens=2,
        top_k=-1,
        min_p=0.1,
        seed=-3,
        best_of=1,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": False},
        response_format={"type": "text"},
        tools=[],
        logit_bias={},
        stop="x",
        something_new={"a": [1]},
    )
    assert sampling_params(request, 5, None, 0, 0).temperature == 0.0
    assert stop_strings(request) == ("x",)
    assert stop_strings(chat(stop=["a", "b"])) == ("a", "b")
    assert chat(n=3, best_of=3).n == 3
    assert chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}], "extra": 1}]).messages


WRONG: dict[str, list[Any]] = {
    "max_tokens": ["7", 0, -1, 1.5],
    "temperature": ["hot", -0.1],
    "top_p": [0, 1.1],
    "top_k": [-2, 0.5],
    "min_p": [-0.1, 2],
    "n": [0, 129, True],
    "best_of": [2],
    "seed": [1 << 63],
    "presence_penalty": [3],
    "frequency_penalty": [-3],
    "repetition_penalty": [0, -1],
    "stop": ["", ["a", ""], ["a"] * 33, "x" * 5000, 5],
    "stop_token_ids": [[-1]],
    "messages": [[], "hi", None],
    "top_logprobs": [3],
    "response_format": [{"type": "json_object"}],
    "tools": [[{"type": "function"}]],
    "logit_bias": [{"5": 1.0}],
    "chat_template": ["{{ messages }}"],
    "stream": ["yes"],
    "max_completion_tokens": [0],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_errors_name_the_field_with_the_wrong_value(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**{field: value})
    assert caught.value.status == 400
    assert caught.value.param == field
    assert field in caught.value.message


def test_errors_name_nested_fields_by_their_path() -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[{"role": "user", "content": "a"}, {"role": 5}])
    assert caught.value.param == "messages[1].role"


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b'{"temperature": 1e999}'])
def test_broken_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_request(body, ChatRequest)
    assert caught.value.status == 400
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_logprobs_differ_between_endpoints() -> None:
    assert chat(logprobs=True, top_logprobs=5).top_logprobs == 5
    assert completion(logprobs=5).logprobs == 5
    for fields in ({"logprobs": 21}, {"logprobs": -1}, {"logprobs": True}, {"echo": True, "logprobs": 0}):
        with pytest.raises(ApiError):
            completion(**fields)
    with pytest.raises(ApiError):
        chat(logprobs=1)


@pytest.mark.parametrize(
    ("prompt", "items"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
    ],
)
def test_prompts_of_all_shapes(prompt: Any, items: list[Any]) -> None:
    assert prompt_items(completion(prompt=prompt).prompt, 100) == items


@pytest.mark.parametrize("prompt", [None, [], ["a", 1], [[1], "a"], [1, [2]], [1.5], {"a": 1}, ["x"] * 200])
def test_prompts_of_other_shapes_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        prompt_items(completion(prompt=prompt).prompt, 100)
    assert (caught.value.param or "").startswith("prompt")


def test_token_ids_must_be_in_the_vocabulary() -> None:
    check_token_ids([0, 9], 10, "prompt")
    for wrong in (-1, 10, 10**30):
        with pytest.raises(ApiError, match=str(wrong)):
            check_token_ids([0, wrong], 10, "prompt")


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"tools": ' + b"[" * 100_000, b'{"a": ' * 100_000])
def test_bodies_nested_too_deeply_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_request(body, ChatRequest)
    assert caught.value.status == 400


def test_prompts_are_counted_before_they_are_decoded() -> None:
    with pytest.raises(ApiError, match="199 prompts are more than 128"):
        prompt_items(completion(prompt=["a"] * 199 + [1]).prompt, 100)


def test_both_endpoints_take_max_completion_tokens() -> None:
    assert chat(max_completion_tokens=5).max_completion_tokens == 5
    assert completion(max_completion_tokens=5).max_completion_tokens == 5
    with pytest.raises(ApiError, match="max_completion_tokens"):
        completion(max_completion_tokens=0)
