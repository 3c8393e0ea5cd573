"""A small real tokenizer directory for tests: byte-level BPE, two special tokens, a chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT_START = "<|im_start|>"
CHAT_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("the", " the", "and", " and", "hello", " world", "ing", "\u00e9", "\U0001f600")


def byte_level_tokenizer() -> Tokenizer:
    """Return a tokenizer of all 256 bytes, a few words and the chat template's tokens. Every text round-trips."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        ((text, _),) = splitter.pre_tokenize_str(word)
        # Merges apply in order: a space is merged with a word that is whole already.
        cuts = [1] if text[1:] in vocab else range(1, len(text))
        for cut in cuts:
            merged = text if cuts == [1] else text[: cut + 1]
            if merged not in vocab:
                merges.append((merged[:cut], merged[cut:]))
                vocab[merged] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (CHAT_START, CHAT_END)])
    tokenizer.add_tokens([AddedToken("<|a tool \u2581|>", special=False, normalized=False)])
    return tokenizer


def write_tiny_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into an existing directory and return the tokenizer."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": CHAT_END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer
