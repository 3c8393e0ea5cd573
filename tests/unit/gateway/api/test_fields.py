"""Every known request field is applied, harmless, or refused where it asks for something."""

import json
from typing import Any

import pytest

from loraserve.gateway.api.fields import HARMLESS, REFUSED
from loraserve.gateway.api.schema import (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    check_chat,
    check_completion,
    check_tokenize,
    decode_request,
)
from loraserve.gateway.errors import ApiError
from loraserve.messages.sampling import FIELD_TYPES

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {*ChatRequest.__struct_fields__, *FIELD_TYPES}
COMPLETION = {*CompletionRequest.__struct_fields__, *FIELD_TYPES}


def check(endpoint: str, **fields: Any) -> None:
    if endpoint == "chat":
        check_chat(decode_request(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode(), ChatRequest))
    else:
        check_completion(
            decode_request(json.dumps({"model": "m", "prompt": "hi"} | fields).encode(), CompletionRequest)
        )


def refused_by(endpoint: str) -> list[str]:
    return [name for name in REFUSED if name not in (CHAT if endpoint == "chat" else COMPLETION)]


def something(name: str) -> list[Any]:
    """Return values of the field that would change the answer."""
    values: dict[str, list[Any]] = {
        "do_sample": [False],
        "web_search_options": [{}, {"x": 1}],
        "prompt_logprobs": [0, 5],
    }
    return values.get(name, ["some", 7.5, True, ["x"], {"type": "json_object"}, "x" * 200])


CASES = [(endpoint, name) for endpoint in ("chat", "completion") for name in refused_by(endpoint)]


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_a_field_that_would_change_the_answer_is_refused_by_name(endpoint: str, name: str) -> None:
    for value in something(name):
        with pytest.raises(ApiError) as caught:
            check(endpoint, **{name: value})
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")
        remedy = caught.value.message.removeprefix(f"{name}: ")
        assert len(remedy) > 15


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_values_that_ask_for_nothing_pass(endpoint: str, name: str) -> None:
    for value in REFUSED[name].neutral:
        check(endpoint, **{name: value})


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_fields_are_accepted_with_any_value(name: str) -> None:
    for value in ("x", 1, {"a": [True]}):
        if name not in COMPLETION:
            check("completion", **{name: value})


def test_zero_is_not_false() -> None:
    check("chat", prompt_logprobs=False)
    with pytest.raises(ApiError, match="prompt_logprobs"):
        check("chat", prompt_logprobs=0)
    check("chat", mirostat=0)
    with pytest.raises(ApiError, match="mirostat"):
        check("chat", mirostat=1)


def test_reasoning_effort_none_and_text_formats_with_further_keys_pass() -> None:
    check("chat", reasoning_effort="none")
    check("chat", response_format={"type": "text", "json_schema": None, "comment": "x" * 200})
    for value in ({"type": "json_schema", "text": "text"}, {"text": "text"}, ["text"], {"type": ["text"]}):
        with pytest.raises(ApiError, match="response_format"):
            check("chat", response_format=value)
    with pytest.raises(ApiError, match="reasoning_effort"):
        check("chat", reasoning_effort="low")


@pytest.mark.parametrize("value", [b"1e999", b'"\xff"'])
def test_a_refused_field_whose_value_cannot_be_decoded_is_refused_as_well(value: bytes) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "logit_bias": ' + value + b"}"
    with pytest.raises(ApiError) as caught:
        check_chat(decode_request(body, ChatRequest))
    assert (caught.value.status, caught.value.param) == (400, "logit_bias")


NAMED = [
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "allowed_token_ids"),
    *("bad_words", "prompt_logprobs", "truncate_prompt_tokens", "prompt_embeds", "prompt_token_ids", "cache_salt"),
    *("extra_key", "n_cmpl"),
    *("use_beam_search", "lora_path", "adapter_id", "lora_request", "logit_bias", "response_format", "functions"),
    *("grammar", "json_schema", "typical_p", "mirostat", "dry_multiplier", "xtc_probability", "top_a", "suffix"),
    *("modalities", "audio", "web_search_options"),
]


@pytest.mark.parametrize("name", NAMED)
def test_no_field_that_asks_for_another_answer_is_ignored(name: str) -> None:
    assert name in REFUSED
    assert name not in CHAT


def test_each_field_is_treated_in_one_way() -> None:
    assert not HARMLESS & set(REFUSED)
    assert "temperature" in CHAT & COMPLETION
    assert "echo" in COMPLETION - CHAT
    assert "prediction" in HARMLESS - CHAT
    check("chat", something_new={"a": 1})


def test_tools_pass_where_the_client_forbids_tool_calls() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    check("chat", tools=tools, tool_choice="none")
    for choice in ({}, {"tool_choice": None}, {"tool_choice": "auto"}):
        with pytest.raises(ApiError) as caught:
            check("chat", tools=tools, **choice)
        assert caught.value.param == "tools"


@pytest.mark.parametrize("name", ["tools", "chat_template"])
def test_fields_that_would_change_the_tokens_are_refused_by_tokenize(name: str) -> None:
    body = {"model": "m", "messages": MESSAGES}
    check_tokenize(decode_request(json.dumps(body | {name: None}).encode(), TokenizeRequest))
    with pytest.raises(ApiError) as caught:
        check_tokenize(decode_request(json.dumps(body | {name: ["x"]}).encode(), TokenizeRequest))
    assert (caught.value.status, caught.value.param) == (400, name)
