"""A table of the prompt prefixes that each engine probably has in its KV cache.

A prefix is identified by a chain of hashes over blocks of tokens. The chain starts with the adapter's version, because
KV entries of one adapter are invalid for another. The blocks are larger than the engines' KV blocks. This keeps the
table small and look-ups fast.
"""

from collections.abc import Mapping

from loraserve.messages import Route

BLOCK_TOKENS = 128
MAX_BLOCKS = 64
"""The table covers at most this many blocks of one prompt."""
MAX_PREFIXES = 100_000
MAX_ENGINES = 8
"""The table lists at most this many engines for one prefix, the latest first."""


class PrefixMemory:
    """A bounded table of prefixes. When it is full, the least recently sent prefixes are removed."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        # Engine numbers by prefix hash, the least recently sent prefix first.
        self._engines_of: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._last_number = 0
        # A request is looked up, then recorded as sent. Its hashes and the look-up's result are kept in between.
        self._request: Route | None = None
        self._chain: list[int] = []
        self._found: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._engines_of)

    def cached_tokens(self, request: Route) -> Mapping[str, int]:
        """Return how many prompt tokens need no prefill, by engine. At least one token always needs prefill."""
        if request is not self._request or self._found is None:
            self._set_request(request)
            self._found = self._look_up(request)
        return self._found

    def record_sent(self, engine: str, request: Route) -> None:
        """Record that the request was sent to the engine, whose KV cache will then hold the prompt."""
        number = self._number_of(engine)
        self._set_request(request)
        self._found = None
        # The last block is inserted first and thus removed first: it is useless without the earlier blocks.
        for block in reversed(range(_block_count(request))):
            digest = self._digest(request, block)
            numbers = self._engines_of.pop(digest, ())
            if numbers[:1] != (number,):
                numbers = (number, *[n for n in numbers if n != number and n in self._names][: MAX_ENGINES - 1])
            self._engines_of[digest] = numbers
        while len(self._engines_of) > self._max_prefixes:
            del self._engines_of[next(iter(self._engines_of))]

    def forget(self, engine: str) -> None:
        """Forget the prefixes of an engine that lost its KV cache. Look-ups ignore its old entries in the table."""
        number = self._numbers.pop(engine, None)
        if number is not None:
            del self._names[number]
            self._found = None

    def validate(self) -> None:
        assert len(self._engines_of) <= self._max_prefixes, "more prefixes than there is room for"
        assert {n: e for e, n in self._numbers.items()} == self._names, "engines and their numbers disagree"
        for numbers in self._engines_of.values():
            assert len(set(numbers)) == len(numbers) <= MAX_ENGINES, "an engine is remembered twice for one prefix"

    def _look_up(self, request: Route) -> dict[str, int]:
        found: dict[str, int] = {}
        for block in range(_block_count(request)):
            numbers = self._engines_of.get(self._digest(request, block))
            if numbers is None:
                break
            tokens = min((block + 1) * BLOCK_TOKENS, len(request.prompt_tokens) - 1)
            for number in numbers:
                if number in self._names:
                    found[self._names[number]] = tokens
        return found

    def _number_of(self, engine: str) -> int:
        number = self._numbers.get(engine)
        if number is None:
            self._last_number += 1
            number = self._numbers[engine] = self._last_number
            self._names[number] = engine
        return number

    def _set_request(self, request: Route) -> None:
        if request is not self._request:
            self._request, self._chain, self._found = request, [], None

    def _digest(self, request: Route, block: int) -> int:
        """Return the hash of the prompt from its start to the end of the block."""
        chain = self._chain
        while len(chain) <= block:
            first = len(chain) * BLOCK_TOKENS
            before = chain[-1] if chain else hash(request.adapter.version if request.adapter else "")
            chain.append(hash((before, request.prompt_tokens[first : first + BLOCK_TOKENS])))
        return chain[block]


def _block_count(request: Route) -> int:
    """Return how many full blocks of the prompt the table covers."""
    return min(len(request.prompt_tokens) // BLOCK_TOKENS, MAX_BLOCKS)
