"""Which engine was sent which beginning of a prompt lately: it likely still has the KV of it. Pure.

Prompts are named by a chain of hashes over blocks of tokens, begun with the adapter's version: KV of one adapter is of
no use to another. Engines work in smaller blocks; larger ones here keep the table small and a look-up cheap.
"""

from collections.abc import Mapping

from loraserve.messages import Route

BLOCK_TOKENS = 128
MOST_BLOCKS = 64
"""Of one prompt that are remembered."""
MOST_PREFIXES = 100_000
MOST_ENGINES = 8
"""That are remembered for one prefix, the latest first: where it is everywhere, it decides nothing."""


class PrefixMemory:
    """Bounded: the prefixes that nobody sent for longest are forgotten."""

    def __init__(self, most: int = MOST_PREFIXES) -> None:
        self._most = most
        # The last use of an entry is its place in the order of insertion.
        self._engines_of: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._numbered = 0
        self._request: Route | None = None
        self._chain: list[int] = []
        self._found: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._engines_of)

    def cached_tokens(self, request: Route) -> Mapping[str, int]:
        """By engine, tokens of the prompt that need no prefill there; at least one always does."""
        if request is not self._request or self._found is None:
            self._turn_to(request)
            self._found = self._look_up(request)
        return self._found

    def _look_up(self, request: Route) -> dict[str, int]:
        found: dict[str, int] = {}
        for block in range(_blocks(request)):
            numbers = self._engines_of.get(self._digest(request, block))
            if numbers is None:
                break
            tokens = min((block + 1) * BLOCK_TOKENS, len(request.prompt_tokens) - 1)
            for number in numbers:
                if number in self._names:
                    found[self._names[number]] = tokens
        return found

    def sent(self, engine: str, request: Route) -> None:
        """The engine is about to compute all of this prompt."""
        number = self._number(engine)
        self._turn_to(request)
        self._found = None
        # The last block first: those that come before it are of no less use, and must not be forgotten sooner.
        for block in reversed(range(_blocks(request))):
            digest = self._digest(request, block)
            others = self._engines_of.pop(digest, ())
            if others[:1] != (number,):
                others = (number, *[n for n in others if n != number and n in self._names][: MOST_ENGINES - 1])
            self._engines_of[digest] = others
        while len(self._engines_of) > self._most:
            del self._engines_of[next(iter(self._engines_of))]

    def forget(self, engine: str) -> None:
        """It lost its KV cache. Its entries stay, under a number that nobody has."""
        number = self._numbers.pop(engine, None)
        if number is not None:
            del self._names[number]
            self._found = None

    def validate(self) -> None:
        """Raises AssertionError naming what broke."""
        assert len(self._engines_of) <= self._most, "more prefixes than there is room for"
        assert {n: e for e, n in self._numbers.items()} == self._names, "engines and their numbers disagree"
        for numbers in self._engines_of.values():
            assert len(set(numbers)) == len(numbers) <= MOST_ENGINES, "an engine is remembered twice for one prefix"

    def _number(self, engine: str) -> int:
        number = self._numbers.get(engine)
        if number is None:
            self._numbered += 1
            number = self._numbers[engine] = self._numbered
            self._names[number] = engine
        return number

    def _turn_to(self, request: Route) -> None:
        """A request is looked up and then sent: what was computed of it is kept between."""
        if request is not self._request:
            self._request, self._chain, self._found = request, [], None

    def _digest(self, request: Route, block: int) -> int:
        """Of the prompt up to the end of a block."""
        chain = self._chain
        while len(chain) <= block:
            first = len(chain) * BLOCK_TOKENS
            before = chain[-1] if chain else hash(request.adapter.version if request.adapter else "")
            chain.append(hash((before, request.prompt_tokens[first : first + BLOCK_TOKENS])))
        return chain[block]


def _blocks(request: Route) -> int:
    """Whole ones of its prompt that are remembered."""
    return min(len(request.prompt_tokens) // BLOCK_TOKENS, MOST_BLOCKS)
