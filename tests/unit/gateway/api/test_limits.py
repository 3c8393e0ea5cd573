"""Every input is bounded before work that grows with it."""

import json
from typing import Any

import msgspec
import pytest

from loraserve.gateway.api.limits import check_choices, check_free_json, check_messages
from loraserve.gateway.api.schema import (
    SLICE_BYTES,
    ChatMessage,
    ChatRequest,
    check_chat,
    decode_request,
    decode_token_ids,
    prompt_items,
)
from loraserve.gateway.errors import ApiError
from loraserve.messages.stop import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

MESSAGES = [{"role": "user", "content": "hi"}]
CONTEXT = 100


def check(**fields: Any) -> None:
    check_chat(decode_request(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode(), ChatRequest))


def test_stop_token_ids_are_counted_before_they_are_decoded() -> None:
    check(stop_token_ids=list(range(MAX_STOP_TOKEN_IDS)))
    for ids in ([1] * (MAX_STOP_TOKEN_IDS + 1), [1] * 100_000):
        with pytest.raises(ApiError, match=f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS}"):
            check(stop_token_ids=ids)


def test_stop_strings_are_measured_before_they_are_decoded() -> None:
    check(stop=["\u20ac" * 128] * MAX_STOP_STRINGS)
    for stops in (["a"] * (MAX_STOP_STRINGS + 1), ["a"] * 100_000, "x" * 100_000):
        with pytest.raises(ApiError, match="stop: at most 32 stop strings of 4096 characters"):
            check(stop=stops)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (["a"] * 129, "129 prompts are more than 128"),
        ([[1]] * 129, "129 prompts are more than 128"),
        ([1] * CONTEXT, "maximum context length is 100"),
        ([[1], [1] * CONTEXT], "maximum context length is 100"),
    ],
)
def test_prompts_and_their_ids_are_counted_before_they_are_decoded(prompt: Any, error: str) -> None:
    with pytest.raises(ApiError, match=error):
        prompt_items(msgspec.Raw(msgspec.json.encode(prompt)), CONTEXT)


def test_quotes_and_brackets_in_texts_are_not_counted_as_prompts() -> None:
    texts = ['say "[[[[" and \\', '"' * 300, "[" * 300]
    assert prompt_items(msgspec.Raw(msgspec.json.encode(texts)), CONTEXT) == texts


@pytest.mark.parametrize("count", [0, 1, 3, SLICE_BYTES, 2 * SLICE_BYTES])
@pytest.mark.parametrize("space", [b"", b" "])
def test_token_ids_are_decoded_in_slices(count: int, space: bytes) -> None:
    ids = list(range(count))
    data = b"[" + (b"," + space).join([b"%d" % token for token in ids]) + space + b"]"
    slices = list(decode_token_ids(msgspec.Raw(data), "tokens"))
    assert [token for part in slices for token in part] == ids
    assert all(len(part) <= SLICE_BYTES // 2 + 2 for part in slices)


@pytest.mark.parametrize("wrong", ["null", "7", '"[1]"', "{}", '["a,b"]', "[1.5]", "[[1]]", "[1, null]", "[true]"])
@pytest.mark.parametrize("before", [0, SLICE_BYTES])
def test_only_lists_of_token_ids_are_decoded(wrong: str, before: int) -> None:
    if before and wrong[0] == "[":
        wrong = "[" + "1, " * before + wrong[1:]
    with pytest.raises(ApiError, match="tokens: a list of token ids is needed") as caught:
        list(decode_token_ids(msgspec.Raw(wrong.encode()), "tokens"))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "tokens", "invalid_type")


class Tokenizer:
    """A tokenizer with the only method that the limits call."""

    def fewest_tokens(self, characters: int) -> int:
        return characters // 100


def messages(count: int, **fields: Any) -> list[ChatMessage]:
    return [ChatMessage(role="user", **fields)] * count


def test_messages_and_their_parts_are_counted() -> None:
    tokenizer: Any = Tokenizer()
    assert check_messages(tokenizer, messages(3, content="abc"), CONTEXT) == 9
    parts = decode_request(
        b'{"role": "user", "content": [' + b", ".join([b'{"type": "text"}'] * 99) + b"]}", ChatMessage
    )
    for many in (messages(100, content="a"), [parts], messages(1, content="a" * 10_000)):
        with pytest.raises(ApiError) as caught:
            check_messages(tokenizer, many, CONTEXT)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "chat_template_kwargs"])
def test_free_json_is_measured_before_it_is_decoded(field: str) -> None:
    data = msgspec.Raw(b"[" + b",".join([b"[]"] * 20) + b"]")
    of_message = {} if field == "chat_template_kwargs" else {field: data}
    arguments = msgspec.Raw(b"null") if of_message else data
    check_free_json(messages(1, **of_message), arguments, 61)
    with pytest.raises(ApiError, match=rf"{field}: 61 bytes of JSON are more than 60; .*max_free_json_bytes"):
        check_free_json(messages(1, **of_message), arguments, 60)


def test_choices_of_all_prompts_are_counted() -> None:
    check_choices(64, 2)
    check_choices(None, 128)
    with pytest.raises(ApiError, match="65 choices of 2 prompts"):
        check_choices(65, 2)
