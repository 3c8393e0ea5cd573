"""One choice of an answer: tokens in, text out, with its stop strings, logprobs and counts. Pure."""

from collections.abc import Sequence

import msgspec

from loraserve.gateway.detokenize import Detokenizer
from loraserve.gateway.stops import StopMatcher

Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""Of one token: its own, then (token, log-probability) of the most likely."""


class Scored(msgspec.Struct, frozen=True):
    """A token with its logprobs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(msgspec.Struct, frozen=True):
    """What became ready of one choice. ``stop_reason`` is the stop string or stop token that ended it."""

    choice: int
    text: str
    scored: tuple[Scored, ...] = ()
    finish: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.scored or self.finish)


class StopRules(msgspec.Struct, frozen=True, kw_only=True):
    """``end_tokens`` end the output silently, ``stop_tokens`` are those that the client named."""

    strings: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    stop_tokens: frozenset[int] = frozenset()
    include: bool = False
    min_tokens: int = 0


class Choice:
    """Assembles one choice. Once ``finished`` it takes nothing more."""

    def __init__(self, index: int, detokenizer: Detokenizer, rules: StopRules) -> None:
        self.index = index
        self.completion_tokens = 0
        self.finished = False
        self.stopped_early = False
        """A stop string ended it: the engine does not know and has to be told."""
        self._detokenizer = detokenizer
        self._rules = rules
        self._matcher = StopMatcher(rules.strings, rules.include)

    def feed(self, tokens: Sequence[int], logprobs: Sequence[Logprobs], finish: str | None) -> Piece:
        """``logprobs`` has one entry a token, or none. ``finish`` as the engine says it, for the last token."""
        if self.finished:
            return Piece(self.index, "")
        ending = tokens[-1] if finish == "stop" and tokens and self._is_stop(tokens[-1]) else None
        shown = tokens[:-1] if ending is not None and not self._rules.include else tokens
        text, used = self._text(shown)
        if self._matcher.matched is not None:
            self.stopped_early = finish is None or used < len(tokens)
            finish = "stop"
        else:
            used = len(tokens)
        self.completion_tokens += used
        self.finished = finish is not None
        if self.finished:
            text += self._rest()
        return Piece(self.index, text, scored(tokens[:used], logprobs), finish, self._reason(ending))

    def _is_stop(self, token: int) -> bool:
        return token in self._rules.end_tokens or token in self._rules.stop_tokens

    def _text(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Text to send, and how many of the tokens it took."""
        if not self._rules.strings:
            return self._detokenizer.feed(tokens), len(tokens)
        parts = []
        for used, token in enumerate(tokens, 1):
            text = self._detokenizer.feed((token,))
            matches = self.completion_tokens + used > self._rules.min_tokens
            parts.append(self._matcher.push(text) if matches else text)
            if self._matcher.matched is not None:
                return "".join(parts), used
        return "".join(parts), len(tokens)

    def _rest(self) -> str:
        if self._matcher.matched is not None:
            return ""
        return self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()

    def _reason(self, ending: int | None) -> str | int | None:
        if self._matcher.matched is not None:
            return self._matcher.matched
        return ending if ending in self._rules.stop_tokens else None


def scored(tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> tuple[Scored, ...]:
    """Tokens paired with their logprobs; none where the request asked for none."""
    return tuple(Scored(token, own, top) for token, (own, top) in zip(tokens, logprobs, strict=False))
