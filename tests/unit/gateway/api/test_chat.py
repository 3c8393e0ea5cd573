"""From chat messages to the tokens of a prompt."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loraserve.gateway.api.chat import encode_messages, template_arguments
from loraserve.gateway.api.schema import ChatMessage, ChatRequest, ContentPart, decode_request
from loraserve.gateway.errors import ApiError
from loraserve.gateway.text.tokenizer import ModelTokenizer
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer

CONTEXT = 512


def model_dir(path: Path, template: str | None = "") -> Path:
    if template == "":
        write_tiny_tokenizer(path)
    else:
        write_tiny_tokenizer(path, template)
    config = {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": CONTEXT}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> ModelTokenizer:
    return ModelTokenizer(model_dir(tmp_path))


def chat_text(tokenizer: ModelTokenizer, *messages: ChatMessage, **fields: Any) -> str:
    return tokenizer.decode(encode_messages(tokenizer, messages, ChatRequest(**fields), CONTEXT))


def test_chat_template(tokenizer: ModelTokenizer) -> None:
    user = ChatMessage(role="user", content="hi")
    opening = "<|im_start|>user\nhi<|im_end|>\n"
    assert chat_text(tokenizer, user) == opening + "<|im_start|>assistant\n"
    assert chat_text(tokenizer, user, add_generation_prompt=False) == opening
    begun = ChatMessage(role="assistant", content="Well")
    assert chat_text(tokenizer, user, begun, continue_final_message=True) == opening + "<|im_start|>assistant\nWell"


def test_text_parts_are_joined_and_other_parts_refused(tokenizer: ModelTokenizer) -> None:
    text = [ContentPart(type="text", text="a"), ContentPart(type="text", text="b")]
    assert "user\na\nb<|im_end|>" in chat_text(tokenizer, ChatMessage(role="user", content=text))
    picture = ChatMessage(role="user", content=[*text, ContentPart(type="image_url")])
    with pytest.raises(ApiError) as caught:
        chat_text(tokenizer, picture)
    assert caught.value.param == "messages[0].content[2]"


def test_an_error_of_the_template_refuses_the_messages(tmp_path: Path) -> None:
    model_dir(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        chat_text(ModelTokenizer(tmp_path), ChatMessage(role="user", content="hi"))
    assert caught.value.status == 400


def test_a_model_without_a_template_refuses_chat(tmp_path: Path) -> None:
    model_dir(tmp_path, None)
    with pytest.raises(ApiError, match="no chat template"):
        chat_text(ModelTokenizer(tmp_path), ChatMessage(role="user", content="hi"))


def arguments(**given: Any) -> dict[str, Any]:
    return template_arguments(msgspec.Raw(msgspec.json.encode(given)))


def test_template_arguments_cannot_replace_the_template() -> None:
    assert template_arguments(msgspec.Raw(b"null")) == {}
    assert arguments(enable_thinking=False) == {"enable_thinking": False}
    with pytest.raises(ApiError, match="chat_template"):
        arguments(chat_template="x")


def test_tool_calls_and_arguments_reach_the_template(tmp_path: Path) -> None:
    template = "{{ messages[0]['tool_calls'][0]['name'] }} {{ style }}"
    calls = msgspec.Raw(msgspec.json.encode([{"name": "search"}]))
    message = ChatMessage(role="assistant", tool_calls=calls)
    kwargs = msgspec.Raw(b'{"style": "short"}')
    text = chat_text(ModelTokenizer(model_dir(tmp_path, template)), message, chat_template_kwargs=kwargs)
    assert text == "search short"


def decoded_message(body: bytes) -> ChatMessage:
    return decode_request(body, ChatMessage)


def test_reasoning_and_function_call_of_a_message_reach_the_template(tmp_path: Path) -> None:
    template = "{{ messages[0]['reasoning_content'] }} {{ messages[0]['function_call']['name'] }}"
    message = decoded_message(b'{"role": "assistant", "reasoning_content": "why", "function_call": {"name": "search"}}')
    assert chat_text(ModelTokenizer(model_dir(tmp_path, template)), message) == "why search"


def test_a_message_that_the_model_shall_continue_is_refused_with_the_remedy(tokenizer: ModelTokenizer) -> None:
    user = ChatMessage(role="user", content="hi")
    for value in (b"null", b"false"):
        chat_text(tokenizer, user, decoded_message(b'{"role": "assistant", "content": "a", "prefix": ' + value + b"}"))
    with pytest.raises(ApiError, match="continue_final_message") as caught:
        chat_text(tokenizer, user, decoded_message(b'{"role": "assistant", "content": "a", "prefix": true}'))
    assert (caught.value.status, caught.value.param) == (400, "messages[1].prefix")


def test_a_rendered_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(model_dir(tmp_path, "{{ 'x' * 10000000 }}"))
    with pytest.raises(ApiError, match="maximum context length is 512"):
        chat_text(tokenizer, ChatMessage(role="user", content="hi"))
