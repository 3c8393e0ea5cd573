"""Incremental text equals the text of all tokens decoded at once, and no character is split."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from loraserve.demo.paths import default_data_dir
from loraserve.gateway.text.detokenize import REPLACEMENT, TokenBytes
from loraserve.testing.tiny_tokenizer import CHAT_END, byte_level_tokenizer


@cache
def pieces_of(tokenizer: Tokenizer) -> TokenBytes:
    special = frozenset(id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return TokenBytes(tokenizer, special, json.loads(tokenizer.to_str())["decoder"])


def sentencepiece_tokenizer(strip: bool = True) -> Tokenizer:
    words = ["\u2581Hello", "\u2581world", "\u2581", "ing", "\u2581\u2581\u2581", "h\u00e9", "!"]
    vocab = {text: index for index, text in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def tokenizers() -> dict[str, Tokenizer]:
    found = {"tiny": byte_level_tokenizer()}
    demo = default_data_dir() / "models" / "smollm2-135m-instruct" / "tokenizer.json"
    if demo.exists():
        found["demo"] = Tokenizer.from_file(str(demo))
    return found


BYTE_LEVEL = tokenizers()


def run(pieces: TokenBytes, tokens: Sequence[int], cuts: Sequence[int], skip: bool = True) -> list[str]:
    """Return the text of each group of tokens, then the text held back."""
    detokenizer = pieces.detokenizer(skip)
    bounds = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    texts = [detokenizer.feed(tokens[start:end]) for start, end in pairwise(bounds)]
    return [*texts, detokenizer.flush()]


@pytest.mark.parametrize("name", sorted(BYTE_LEVEL))
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_tokens_equal_batch_decode(name: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = BYTE_LEVEL[name]
    # A few ids past the end: an embedding may have more rows than the vocabulary.
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=40))
    pieces = pieces_of(tokenizer)
    assert pieces.known
    assert "".join(run(pieces, tokens, cuts, skip)) == tokenizer.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("name", sorted(BYTE_LEVEL))
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_text_round_trips_one_token_at_a_time_without_half_characters(name: str, text: str) -> None:
    tokenizer = BYTE_LEVEL[name]
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    parts = run(pieces_of(tokenizer), tokens, range(len(tokens)), skip=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    assert "".join(parts) == whole
    if REPLACEMENT not in whole:
        assert all(REPLACEMENT not in part for part in parts)


def test_a_character_of_four_tokens_is_sent_whole() -> None:
    tokenizer = byte_level_tokenizer()
    tokens = [token_of_byte(tokenizer, byte) for byte in "\U0001f680".encode()]
    assert run(pieces_of(tokenizer), tokens, [1, 2, 3]) == ["", "", "", "\U0001f680", ""]


def id_of(tokenizer: Tokenizer, text: str) -> int:
    id_ = tokenizer.token_to_id(text)
    assert id_ is not None
    return id_


def token_of_byte(tokenizer: Tokenizer, byte: int) -> int:
    pieces = pieces_of(tokenizer)
    return next(id_ for id_ in range(256) if pieces.of(id_) == bytes([byte]))


def test_an_incomplete_character_is_flushed_at_the_end() -> None:
    tokenizer = byte_level_tokenizer()
    tokens = [token_of_byte(tokenizer, 0xF0), token_of_byte(tokenizer, 0x9F)]
    assert run(pieces_of(tokenizer), tokens, [1]) == ["", "", REPLACEMENT]


def test_special_tokens_are_left_out_unless_wanted() -> None:
    tokenizer = byte_level_tokenizer()
    end = id_of(tokenizer, CHAT_END)
    tokens = [*tokenizer.encode("hello").ids, end]
    assert "".join(run(pieces_of(tokenizer), tokens, [], skip=True)) == "hello"
    assert "".join(run(pieces_of(tokenizer), tokens, [], skip=False)) == "hello" + CHAT_END


@pytest.mark.parametrize("strip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_sentencepiece_equals_batch_decode(strip: bool, data: st.DataObject) -> None:
    tokenizer = sentencepiece_tokenizer(strip)
    words = st.integers(257, tokenizer.get_vocab_size() - 1).map(lambda id_: [id_])
    byte_runs = st.characters(exclude_categories=["Cs"]).map(lambda c: [1 + byte for byte in c.encode()])
    tokens = [id_ for run_ in data.draw(st.lists(words | byte_runs, max_size=20)) for id_ in run_]
    cuts = data.draw(st.lists(st.integers(0, 80), max_size=40))
    pieces = pieces_of(tokenizer)
    assert pieces.known
    assert "".join(run(pieces, tokens, cuts)) == tokenizer.decode(tokens)


def test_sentencepiece_drops_the_first_space_only() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokens = [id_of(tokenizer, text) for text in ("\u2581Hello", "\u2581world", "\u2581Hello")]
    assert run(pieces_of(tokenizer), tokens, [1, 2]) == ["Hello", " world", " Hello", ""]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_unknown_decoders_use_the_decode_stream(data: st.DataObject) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    words = ["\u2581Hello", "ing", "\u2581\u2581\u2581", "h\u00e9", "!"]
    tokens = data.draw(st.lists(st.sampled_from([id_of(tokenizer, word) for word in words]), max_size=20))
    cuts = data.draw(st.lists(st.integers(0, 20), max_size=20))
    pieces = pieces_of(tokenizer)
    assert not pieces.known
    assert "".join(run(pieces, tokens, cuts)) == tokenizer.decode(tokens)


def test_the_decode_stream_does_not_hold_text_for_ever() -> None:
    tokenizer = Tokenizer(models.WordLevel({REPLACEMENT: 0, "x": 1}, unk_token="x"))
    tokenizer.decoder = decoders.Fuse()
    parts = run(pieces_of(tokenizer), [0] * 100, range(100))
    assert "".join(parts) == REPLACEMENT * 100
    assert len(parts[-1]) < 20


def test_token_text_for_logprobs() -> None:
    pieces = pieces_of(byte_level_tokenizer())
    tokenizer = byte_level_tokenizer()
    (space_the,) = tokenizer.encode(" the").ids
    assert pieces.text(space_the) == " the"
    assert pieces.of(space_the) == b" the"
    assert pieces.of(10**6) == b""
