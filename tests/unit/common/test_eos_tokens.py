"""The set of EOS tokens comes from the model's configuration and from its tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraserve.engine.model.config import read_decoder_config
from loraserve.eos_tokens import eos_token_ids
from loraserve.errors import ConfigError
from loraserve.testing.tiny_tokenizer import CHAT_END, write_tiny_tokenizer


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_an_engine_stops_at_the_eos_token_of_the_tokenizer(tmp_path: Path) -> None:
    end = write_tiny_tokenizer(tmp_path).token_to_id(CHAT_END)
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1,
        "intermediate_size": 8, "vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 2,
    }  # fmt: skip
    write(tmp_path, config=config, generation_config={"eos_token_id": [2, 3]})
    assert read_decoder_config(tmp_path).eos_token_ids == (2, 3, end)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "E", "added_tokens_decoder": {"9": {"content": "E"}}}}, (7, 9)),
        ({"tokenizer_config": {"eos_token": {"content": "E"}}, "tokenizer": {"model": {"vocab": {"E": 4}}}}, (7, 4)),
        (
            {"special_tokens_map": {"eos_token": "E"}, "tokenizer": {"added_tokens": [{"id": 5, "content": "E"}]}},
            (7, 5),
        ),
        ({"tokenizer_config": {"eos_token": "E"}, "tokenizer": {"model": {"vocab": [["A", 0.0]]}}}, (7,)),
        (
            {"tokenizer_config": {"eos_token": "E"}, "tokenizer": {"model": {"vocab": [["A", 0.0], ["E", -1.5]]}}},
            (7, 1),
        ),
        ({"tokenizer_config": {"eos_token": "E"}, "added_tokens": {"A": 5, "E": 6}}, (7, 6)),
        ({"tokenizer_config": {"eos_token": None}}, (7,)),
        ({"tokenizer_config": {"eos_token": "E", "added_tokens_decoder": {"7": {"content": "E"}}}}, (7,)),
    ],
)
def test_every_way_in_which_a_tokenizer_names_its_eos_token(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert eos_token_ids(write(tmp_path, **files), {"eos_token_id": 7}) == expected


@pytest.mark.parametrize("name", ["generation_config", "tokenizer_config"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.json").write_text("[]")
    with pytest.raises(ConfigError, match=name):
        eos_token_ids(tmp_path, {})


@pytest.mark.parametrize("added", [[{"content": "E"}], {"9": "E"}, {"x": {"content": "E"}}])
def test_added_tokens_of_another_form_are_refused(tmp_path: Path, added: Any) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "E", "added_tokens_decoder": added})
    with pytest.raises(ConfigError, match="added_tokens_decoder"):
        eos_token_ids(tmp_path, {})
