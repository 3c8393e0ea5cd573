"""The output of one choice: from tokens to text."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.output import OutputAssembler, OutputChunk, StopRules
from loraserve.testing.tiny_tokenizer import CHAT_END, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id(CHAT_END) or 0
TOKENS = TokenBytes(TOKENIZER, frozenset({END}), json.loads(TOKENIZER.to_str())["decoder"])


def choice(skip: bool = True, **rules: Any) -> OutputAssembler:
    return OutputAssembler(0, TOKENS.detokenizer(skip), StopRules(**rules))


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def text_of(pieces: list[OutputChunk]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("skip", [True, False])
def test_the_eos_token_is_counted_and_not_shown(skip: bool) -> None:
    one = choice(skip)
    tokens = [*ids("hello"), END]
    piece = one.feed(tokens, (), "stop")
    assert (piece.text, piece.finish, piece.stop_reason) == ("hello", "stop", None)
    assert one.completion_tokens == len(tokens)
    assert not one.needs_abort


def test_a_stop_token_is_the_stop_reason_and_shown_on_request() -> None:
    (bang,) = ids("!")
    piece = choice().feed([*ids("hello"), bang], (), "stop", bang)
    assert (piece.text, piece.stop_reason) == ("hello", bang)
    included = choice(include=True).feed([*ids("hello"), bang], (), "stop", bang)
    assert included.text == "hello!"


def test_the_last_token_of_an_output_cut_by_length_is_shown() -> None:
    (bang,) = ids("!")
    assert choice().feed([bang], (), "length").text == "!"


def test_a_stop_string_ends_the_output_and_the_count_of_tokens() -> None:
    one = choice(strings=("STOP",))
    before, after = ids("abcSTOP"), ids("defg")
    piece = one.feed([*before, *after], (), None)
    assert (piece.text, piece.finish, piece.stop_reason) == ("abc", "stop", "STOP")
    assert one.completion_tokens == len(before)
    assert one.needs_abort
    assert one.feed(ids("more"), (), "length").is_empty


def test_a_stop_string_on_the_last_token_needs_no_abort() -> None:
    one = choice(strings=("STOP",))
    piece = one.feed(ids("abcSTOP"), (), "length")
    assert (piece.text, piece.finish, one.needs_abort) == ("abc", "stop", False)


def test_stop_strings_wait_for_min_tokens() -> None:
    one = choice(strings=("a",), min_tokens=2)
    pieces = [one.feed([token], (), None) for token in ids("aaa")]
    assert text_of(pieces) == "aa"
    assert pieces[-1].finish == "stop"


def test_text_held_back_for_a_stop_string_is_flushed_at_the_end() -> None:
    one = choice(strings=("!!!",))
    assert one.feed(ids("hi!!"), (), None).text == "hi"
    assert one.feed([END], (), "stop").text == "!!"


def test_logprobs_are_sent_with_their_tokens() -> None:
    one = choice(strings=("STOP",))
    tokens = ids("aSTOPb")
    piece = one.feed(tokens, [(-0.5, ((token, -0.5),)) for token in tokens], None)
    assert [scored.token for scored in piece.scored] == tokens[:-1]
    assert piece.scored[0].top == ((tokens[0], -0.5),)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\u00e9\U0001f680 ", max_size=20),
    stops=st.lists(st.text("ab\u00e9 ", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 60)),
)
def test_the_output_does_not_depend_on_how_tokens_are_grouped(text: str, stops: list[str], cuts: list[int]) -> None:
    tokens = ids(text)
    whole, parts = choice(strings=tuple(stops)), choice(strings=tuple(stops))
    expected = whole.feed(tokens, (), "length")
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    pieces = [parts.feed(tokens[a:b], (), None) for a, b in pairwise(bounds)]
    if not parts.finished:
        pieces.append(parts.feed([], (), "length"))
    assert text_of(pieces) == expected.text
    assert (parts.completion_tokens, pieces[-1].finish or "stop") == (whole.completion_tokens, expected.finish)


def test_a_stop_string_completed_by_the_last_held_text_is_the_stop_reason() -> None:
    """The incomplete character at the end of an output becomes text only when the output ends."""
    (first_byte,) = (token for token in range(TOKENIZER.get_vocab_size()) if TOKENS.of(token) == b"\xc3")
    one = choice(strings=("a\ufffd",))
    piece = one.feed([*ids("ba"), first_byte], (), "length")
    assert (piece.text, piece.finish, piece.stop_reason) == ("b", "stop", "a\ufffd")
    assert not one.needs_abort
    short = choice(strings=("\ufffd",), min_tokens=9).feed([*ids("b"), first_byte], (), "length")
    assert (short.text, short.finish) == ("b\ufffd", "length")
