"""Incremental detokenization: text as soon as its bytes are complete, never half a character.

Pure. Byte-level BPE and SentencePiece-like decoders say exactly which bytes a token stands for, so that each token is
looked at once; any other decoder goes through a short window of tokens.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
SPACE_MARK = "\u2581"
MAX_HELD_TOKENS = 16
"""More tokens than any character has bytes: what still ends in U+FFFD then is no character that will complete."""


class Detokenizer(Protocol):
    """The text of one output, token by token."""

    def feed(self, tokens: Iterable[int]) -> str:
        """Text that these tokens complete."""

    def flush(self) -> str:
        """What was held back, after the last token."""


class TokenBytes:
    """The bytes of every token of one vocabulary, worked out once each.

    ``drop_first_space``: the decoder drops the space with which SentencePiece starts every text. ``known`` is False
    for decoders that this module cannot take apart; then ``of`` is an approximation for showing single tokens.
    """

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        decode: Callable[[Sequence[int]], str],
        special: frozenset[int],
        decoder: Mapping[str, Any] | None,
    ) -> None:
        self.decode = decode
        self.special = special
        self._id_to_token = id_to_token
        self._cache: dict[int, bytes] = {}
        self._to_bytes, self.drop_first_space = _byte_rule(decoder)
        self.known = self._to_bytes is not None

    def of(self, token: int) -> bytes:
        """Bytes of one token; none for an id outside the vocabulary."""
        cached = self._cache.get(token)
        if cached is None:
            text = self._id_to_token(token)
            if text is None:
                cached = b""
            elif self._to_bytes is None:
                cached = self.decode([token]).encode()
            else:
                cached = self._to_bytes(text)
            self._cache[token] = cached
        return cached

    def text(self, token: int) -> str:
        """One token as people read it; an incomplete character shows as U+FFFD."""
        return self.of(token).decode("utf-8", "replace")

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh one for one output."""
        skipped = self.special if skip_special_tokens else frozenset()
        return ByteDetokenizer(self, skipped) if self.known else WindowDetokenizer(self.decode, skipped)


class ByteDetokenizer:
    """For vocabularies whose tokens are runs of bytes. Constant work per token.

    Equal to decoding all tokens at once, but for one thing: where a SentencePiece byte run is no valid UTF-8, that
    would take back characters already sent; here each bad byte sequence becomes one U+FFFD, as in byte-level BPE.
    """

    def __init__(self, pieces: TokenBytes, skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = pieces.drop_first_space

    def feed(self, tokens: Iterable[int]) -> str:
        of, skipped = self._pieces.of, self._skipped
        return self._trim(self._utf8.decode(b"".join([of(token) for token in tokens if token not in skipped])))

    def flush(self) -> str:
        return self._trim(self._utf8.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """For any other decoder: decode the last tokens with and without the new ones, and send the difference."""

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._sent: list[int] = []
        self._sent_text = ""
        self._held: list[int] = []

    def feed(self, tokens: Iterable[int]) -> str:
        parts = []
        for token in tokens:
            if token in self._skipped:
                continue
            self._held.append(token)
            text = self._decode(self._sent + self._held)
            if not text.endswith(REPLACEMENT) or len(self._held) >= MAX_HELD_TOKENS:
                parts.append(self._release(text))
        return "".join(parts)

    def flush(self) -> str:
        return self._release(self._decode(self._sent + self._held)) if self._held else ""

    def _release(self, text: str) -> str:
        new = text[len(self._sent_text) :]
        # Only what gave text anchors the next difference: a decoder may trim the start of a text.
        self._sent = self._held if new else self._sent + self._held
        self._sent_text = self._decode(self._sent)
        self._held = []
        return new


def _byte_rule(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes] | None, bool]:
    """How a token's text becomes bytes under the ``decoder`` of a tokenizer.json, and whether a first space goes."""
    steps = _flatten(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _is_space_mark(steps[0]):
        trims = steps[3:]
        if not trims:
            return _sentencepiece, False
        if trims == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return _sentencepiece, True
    return None, False


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", ()) for step in _flatten(part)]
    return [decoder]


def _is_space_mark(step: Mapping[str, Any]) -> bool:
    return step.get("content") == " " and step.get("pattern") == {"String": SPACE_MARK}


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: printable Latin-1 as itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + offset): byte for offset, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        with suppress(ValueError):
            return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()
