"""The tokenizer of a model directory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from loraserve.errors import ConfigError
from loraserve.gateway.api.schema import ChatMessage, ContentPart
from loraserve.gateway.errors import ApiError
from loraserve.gateway.text.tokenizer import INLINE_CHARACTERS, ChatOptions, ModelTokenizer, check_template_arguments
from loraserve.testing.tiny_tokenizer import CHAT_END, write_tiny_tokenizer


def model_dir(path: Path, **config: Any) -> Path:
    write_tiny_tokenizer(path)
    settings = {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 512} | config
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> ModelTokenizer:
    return ModelTokenizer(model_dir(tmp_path))


def chat_text(tokenizer: ModelTokenizer, *messages: ChatMessage, **options: Any) -> str:
    return tokenizer.decode(asyncio.run(tokenizer.encode_chat(messages, ChatOptions(**options))))


def test_facts_of_the_model(tokenizer: ModelTokenizer) -> None:
    assert (tokenizer.vocab, tokenizer.max_positions) == (320, 512)
    assert tokenizer.pieces.known


@pytest.mark.parametrize("length", [10, INLINE_CHARACTERS * 3])
def test_text_round_trips_short_and_long(tokenizer: ModelTokenizer, length: int) -> None:
    text = ("hello the \u00e9 " * length)[:length]
    assert tokenizer.decode(asyncio.run(tokenizer.encode(text, True))) == text


def test_chat_template(tokenizer: ModelTokenizer) -> None:
    user = ChatMessage(role="user", content="hi")
    opening = "<|im_start|>user\nhi<|im_end|>\n"
    assert chat_text(tokenizer, user) == opening + "<|im_start|>assistant\n"
    assert chat_text(tokenizer, user, add_generation_prompt=False) == opening
    begun = ChatMessage(role="assistant", content="Well")
    assert chat_text(tokenizer, user, begun, continue_final_message=True) == opening + "<|im_start|>assistant\nWell"


def test_text_parts_are_joined_and_others_refused(tokenizer: ModelTokenizer) -> None:
    text = [ContentPart(type="text", text="a"), ContentPart(type="text", text="b")]
    assert "user\na\nb<|im_end|>" in chat_text(tokenizer, ChatMessage(role="user", content=text))
    picture = ChatMessage(role="user", content=[*text, ContentPart(type="image_url")])
    with pytest.raises(ApiError) as caught:
        chat_text(tokenizer, picture)
    assert caught.value.param == "messages[0].content[2]"


def test_what_the_template_raises_is_a_refusal(tmp_path: Path) -> None:
    model_dir(tmp_path)
    write_tiny_tokenizer(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        chat_text(ModelTokenizer(tmp_path), ChatMessage(role="user", content="hi"))
    assert caught.value.status == 400


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    model_dir(tmp_path)
    write_tiny_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ApiError, match="no chat template"):
        chat_text(ModelTokenizer(tmp_path), ChatMessage(role="user", content="hi"))


def test_template_arguments_cannot_replace_the_template() -> None:
    assert check_template_arguments(None) == {}
    assert check_template_arguments({"enable_thinking": False}) == {"enable_thinking": False}
    with pytest.raises(ApiError, match="chat_template"):
        check_template_arguments({"chat_template": "x"})


def test_fewest_tokens_never_says_too_many(tokenizer: ModelTokenizer) -> None:
    text = CHAT_END * 500
    assert tokenizer.fewest_tokens(len(text)) <= len(asyncio.run(tokenizer.encode(text, True)))
    assert tokenizer.fewest_tokens(10**6) > 1000


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.path"):
        ModelTokenizer(tmp_path)
