"""Converts the tokens of one choice to text, and ends the output at a stop string.

``loraserve.messages.stop`` defines when an output ends and which of its tokens become text.
"""

from collections.abc import Sequence

import msgspec

from loraserve.gateway.text.detokenize import Detokenizer
from loraserve.messages.stop import STOP, shown_count

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability, and (token, log-probability) pairs of the most likely tokens at its position."""


class ScoredToken(msgspec.Struct, frozen=True):
    """A token with its log-probability and the ``top`` (token, log-probability) pairs at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class OutputChunk(msgspec.Struct, frozen=True):
    """New output of one choice. ``stop_reason`` is the stop string or stop token id that ended it."""

    choice: int
    text: str
    scored: tuple[ScoredToken, ...] = ()
    finish: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.scored or self.finish)


class StopRules(msgspec.Struct, frozen=True, kw_only=True):
    """Stop strings of a request, not matched in the first ``min_tokens`` tokens. ``include`` keeps them in the text."""

    strings: tuple[str, ...] = ()
    include: bool = False
    min_tokens: int = 0


class OutputAssembler:
    """Converts the tokens of one choice to output chunks. After ``finished`` is set, it ignores tokens."""

    def __init__(self, index: int, detokenizer: Detokenizer, rules: StopRules) -> None:
        self.index = index
        self.completion_tokens = 0
        self.finished = False
        self.needs_abort = False
        """True if a stop string ended the output before the engine's last token. The engine may have finished."""
        self._detokenizer = detokenizer
        self._rules = rules
        self._matcher = StopMatcher(rules.strings, rules.include)

    def feed(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        finish: str | None,
        stop_reason: int | None = None,
    ) -> OutputChunk:
        """Return the output completed by these tokens.

        ``logprobs`` is empty or has one entry per token. ``finish`` and ``stop_reason`` are the engine's values.
        """
        if self.finished:
            return OutputChunk(self.index, "")
        text, used = self._text(tokens[: shown_count(len(tokens), finish, self._rules.include)])
        if self._matcher.matched is None:
            used = len(tokens)
            if finish is not None:
                text += self._flush(used)
        matched = self._matcher.matched
        if matched is not None:
            self.needs_abort = finish is None or used < len(tokens)
            finish = STOP
        self.completion_tokens += used
        self.finished = finish is not None
        reason = stop_reason if matched is None else matched
        return OutputChunk(self.index, text, scored_tokens(tokens[:used], logprobs), finish, reason)

    def _text(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the text to send and the number of tokens used. Tokens after a stop string are not used."""
        if not self._rules.strings:
            return self._detokenizer.feed(tokens), len(tokens)
        parts = []
        for used, token in enumerate(tokens, 1):
            text = self._detokenizer.feed((token,))
            may_stop = self.completion_tokens + used > self._rules.min_tokens
            parts.append(self._matcher.push(text) if may_stop else text)
            if self._matcher.matched is not None:
                return "".join(parts), used
        return "".join(parts), len(tokens)

    def _flush(self, used: int) -> str:
        """Return the held-back text when the output ends; it may complete a stop string. ``used``: new token count."""
        text = self._detokenizer.flush()
        if self.completion_tokens + used <= self._rules.min_tokens:
            return text
        return self._matcher.push(text) + self._matcher.flush()


def scored_tokens(tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> tuple[ScoredToken, ...]:
    """Pair tokens with their log-probabilities. Empty if ``logprobs`` is empty."""
    return tuple(ScoredToken(token, own, top) for token, (own, top) in zip(tokens, logprobs, strict=False))


class StopMatcher:
    """Finds the stop string that ends first in an output. If several end at one character, the longest wins.

    Text that can be the start of a stop string is held back. Matching uses the algorithm of Knuth, Morris and Pratt
    (1977): amortized constant time per character and stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        # Longest first, so that the longest wins if several end at the same character.
        self._stops = sorted((stop for stop in stops if stop), key=len, reverse=True)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._progress = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that can be sent, up to the first stop string. Empty if an earlier call set ``matched``."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        unsent = self._held + text
        end = len(self._held)
        for character in text:
            end += 1
            stop = self._advance(character)
            if stop is not None:
                self.matched, self._held = stop, ""
                return unsent[:end] if self._include else unsent[: end - len(stop)]
        safe = len(unsent) - max(self._progress)
        self._held = unsent[safe:]
        return unsent[:safe]

    def flush(self) -> str:
        """Return the held-back text. Call this when an output ends without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Return the stop string completed by this character, or None."""
        for index, stop in enumerate(self._stops):
            table, matched = self._tables[index], self._progress[index]
            while matched and stop[matched] != character:
                matched = table[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                return stop
            self._progress[index] = matched
        return None


def _failure_table(stop: str) -> list[int]:
    """Return, for each prefix of ``stop``, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
