"""One choice of an answer: tokens in, text out, with its stop strings, logprobs and counts. Pure."""

from collections.abc import Sequence

import msgspec

from loraserve.gateway.text.detokenize import Detokenizer

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


class OutputAssembler:
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


# MERGED: loraserve.gateway.text.output
# """Stop strings: found across token boundaries, with nothing sent that might turn out to belong to one. Pure."""


class StopMatcher:
    """Watches one output for the first stop string to complete; of several that do at once, the longest.

    Looks at each character once per stop string, however the text is cut into tokens.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        # Longest first, so that the first to match at a character is the longest.
        self._stops = sorted((stop for stop in stops if stop), key=len, reverse=True)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._progress = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is safe to send. Once ``matched`` is set the output is over and nothing more comes."""
        if self.matched is not None or not self._stops:
            return "" if self._stops else text
        held = self._held + text
        end = len(self._held)
        for character in text:
            end += 1
            stop = self._advance(character)
            if stop is not None:
                self.matched, self._held = stop, ""
                return held[:end] if self._include else held[: end - len(stop)]
        keep = max(self._progress)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when the output ends without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
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
    """Knuth-Morris-Pratt: per position, the length of the longest proper prefix that is also a suffix there."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
