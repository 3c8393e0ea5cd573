"""The text of one choice: tokens come in, text that is safe to send comes out, and stop strings end it.

When an output ends, and which of its tokens become text, is defined in ``loraserve.messages.stop``.
"""

from collections.abc import Sequence

import msgspec

from loraserve.gateway.text.detokenize import Detokenizer
from loraserve.messages.stop import STOP, shown_count

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""The log-probability of one token, then (token, log-probability) of the most likely tokens in its place."""


class ScoredToken(msgspec.Struct, frozen=True):
    """A token with its log-probabilities."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class OutputChunk(msgspec.Struct, frozen=True):
    """New output of one choice. ``stop_reason`` is the stop string or stop token that ended it."""

    choice: int
    text: str
    scored: tuple[ScoredToken, ...] = ()
    finish: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.scored or self.finish)


class StopRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway has to know to end and cut the text of a request."""

    strings: tuple[str, ...] = ()
    include: bool = False
    min_tokens: int = 0


class OutputAssembler:
    """Turns the tokens of one choice into chunks of output. Once ``finished``, it ignores further tokens."""

    def __init__(self, index: int, detokenizer: Detokenizer, rules: StopRules) -> None:
        self.index = index
        self.completion_tokens = 0
        self.finished = False
        self.needs_abort = False
        """A stop string ended the output while the engine still runs the request."""
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
        """Return the output that these tokens complete.

        ``logprobs`` has one entry a token or none; ``finish`` and ``stop_reason`` are the engine's, for the last token.
        """
        if self.finished:
            return OutputChunk(self.index, "")
        text, used = self._text(tokens[: shown_count(len(tokens), finish, self._rules.include)])
        matched = self._matcher.matched
        if matched is None:
            used = len(tokens)
        else:
            self.needs_abort = finish is None or used < len(tokens)
            finish = STOP
        self.completion_tokens += used
        self.finished = finish is not None
        if self.finished and matched is None:
            text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        reason = stop_reason if matched is None else matched
        return OutputChunk(self.index, text, scored_tokens(tokens[:used], logprobs), finish, reason)

    def _text(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the text to send, and how many of the tokens it took: fewer than all where a stop string ends it."""
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


def scored_tokens(tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> tuple[ScoredToken, ...]:
    """Pair tokens with their log-probabilities; empty where the request asked for none."""
    return tuple(ScoredToken(token, own, top) for token, (own, top) in zip(tokens, logprobs, strict=False))


class StopMatcher:
    """Finds the first stop string that an output completes; of several completed at once, the longest.

    Text that may turn out to begin a stop string is held back. Each character is compared once per stop string, however
    the text is cut into tokens (Knuth, Morris, Pratt 1977).
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        # The longest comes first, so that it wins among those that end at the same character.
        self._stops = sorted((stop for stop in stops if stop), key=len, reverse=True)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._progress = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that is safe to send. After ``matched`` is set, this is always empty."""
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
        """Return the text held back, for an output that ends without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Return the stop string that this character completes, None if there is none."""
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
    """Return, for each position, the length of the longest proper prefix of ``stop`` that is also a suffix there."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
