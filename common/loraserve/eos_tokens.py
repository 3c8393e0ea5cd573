"""Reads the EOS tokens of a model from its Hugging Face directory.

The engine has no tokenizer, so this module reads the JSON files. As in vLLM, the EOS tokens are those of the generation
config (or model config) and that of the tokenizer, because fine-tunes often change only one of the two.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraserve.errors import ConfigError


def eos_token_ids(model_dir: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of all EOS tokens of a model directory whose parsed ``config.json`` is ``config``.

    They are the ``eos_token_id`` of ``generation_config.json``, or else of ``config.json``, and the id of the
    tokenizer's ``eos_token``. Raises ConfigError if a file is not JSON or an id is not a token id.
    """
    declared = _read(model_dir / "generation_config.json").get("eos_token_id")
    if declared is None:
        declared = config.get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(_is_token_id(token) for token in ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of token ids, found {declared!r}")
    of_tokenizer = _tokenizer_eos(model_dir)
    return tuple(dict.fromkeys([*ids, *([] if of_tokenizer is None else [of_tokenizer])]))


def _tokenizer_eos(model_dir: Path) -> int | None:
    """Return the id of the tokenizer's EOS token, or None if the token or the tokenizer is missing."""
    settings = _read(model_dir / "tokenizer_config.json")
    named = settings.get("eos_token") or _read(model_dir / "special_tokens_map.json").get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    if not isinstance(text, str):
        return None
    for token, added in _added_tokens_decoder(settings).items():
        if added.get("content") == text:
            return int(token)
    tokenizer = _read(model_dir / "tokenizer.json")
    for added in tokenizer.get("added_tokens") or ():
        if added.get("content") == text:
            return int(added["id"])
    vocab = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocab, list):
        # A Unigram model lists pairs of piece and score. The id is the index.
        vocab = {pair[0]: token for token, pair in enumerate(vocab)}
    for ids in (vocab or {}, _read(model_dir / "added_tokens.json")):
        if _is_token_id(ids.get(text)):
            return int(ids[text])
    return None


def _added_tokens_decoder(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    decoder = settings.get("added_tokens_decoder") or {}
    if isinstance(decoder, dict) and all(key.isdecimal() and isinstance(added, dict) for key, added in decoder.items()):
        return decoder
    raise ConfigError("tokenizer_config.json: added_tokens_decoder must map token ids to objects; repair the file")


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dict if the file does not exist."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; repair the file, or remove it if the model does not need it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object; repair the file")
    return content


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
