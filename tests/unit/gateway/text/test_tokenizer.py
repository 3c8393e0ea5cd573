"""The tokenizer of a model directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraserve.errors import ConfigError
from loraserve.gateway.text.tokenizer import DECODED_SLICE, ModelTokenizer
from loraserve.testing.tiny_tokenizer import CHAT_END, write_tiny_tokenizer


def model_dir(path: Path, **config: Any) -> Path:
    write_tiny_tokenizer(path)
    settings = {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 512} | config
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> ModelTokenizer:
    return ModelTokenizer(model_dir(tmp_path))


def test_facts_of_the_model(tokenizer: ModelTokenizer) -> None:
    assert (tokenizer.vocab, tokenizer.max_positions) == (320, 512)
    assert tokenizer.token_bytes.known


@pytest.mark.parametrize("length", [10, 3000])
def test_short_and_long_texts_round_trip(tokenizer: ModelTokenizer, length: int) -> None:
    text = ("hello the \u00e9 " * length)[:length]
    assert tokenizer.decode(tokenizer.encode(text, True)) == text


def test_tokens_of_several_slices_are_decoded_as_one_text(tokenizer: ModelTokenizer) -> None:
    text = "x\u20ac" * DECODED_SLICE
    tokens = tokenizer.encode(text, False)
    assert len(tokens) > 2 * DECODED_SLICE
    assert tokenizer.decode(tokens) == text


def test_fewest_tokens_is_a_lower_bound(tokenizer: ModelTokenizer) -> None:
    text = CHAT_END * 500
    assert tokenizer.fewest_tokens(len(text)) <= len(tokenizer.encode(text, True))
    assert tokenizer.fewest_tokens(10**6) > 1000


def test_unusable_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.path"):
        ModelTokenizer(tmp_path)
