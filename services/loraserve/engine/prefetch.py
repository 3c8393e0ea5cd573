"""Adapters that no request waits for yet and one probably will: who is expected, and what came of it. Pure.

Three kinds are brought in before they are asked for: what a plan wants, what a router says a request is about to come
for, and what has usually followed what was asked for just now. The last two are guesses, which expire.
"""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from loraserve.engine.followers import WINDOW_S, Followers
from loraserve.messages import AdapterRef, PrefetchCounts

ADMISSION_LASTS_S = 5.0
"""A request that is not here so long after its adapter was expected went elsewhere, or was refused on the way."""
MOST_GUESSES = 16


class Kind(StrEnum):
    PLAN = "plan"
    ADMISSION = "admission"
    PATTERN = "pattern"


LASTS_S = {Kind.ADMISSION: ADMISSION_LASTS_S, Kind.PATTERN: WINDOW_S}
SPARES_S = {Kind.ADMISSION: ADMISSION_LASTS_S, Kind.PATTERN: 60.0}
"""What was used so lately does not leave for a guess. A request that is about to come would soon make it leave anyway;
of what usually follows half may be wrong."""


class Guess(msgspec.Struct, frozen=True):
    adapter: AdapterRef
    kind: Kind
    until_s: float


class Guesses:
    """What requests are expected for, few at a time: while there is no place for one more it is not taken up."""

    def __init__(self) -> None:
        self._guesses: dict[str, Guess] = {}
        self._followers = Followers()

    def __contains__(self, version: str) -> bool:
        return version in self._guesses

    def versions(self) -> set[str]:
        return set(self._guesses)

    def of(self, kind: Kind) -> list[AdapterRef]:
        """In the order in which they were expected."""
        return [guess.adapter for guess in self._guesses.values() if guess.kind == kind]

    def expect(self, adapter: AdapterRef, kind: Kind, now: float) -> bool:
        """False where nothing is new: it is expected for as good a reason already, or too many are."""
        known = self._guesses.get(adapter.version)
        if known is not None and known.kind == Kind.ADMISSION and kind == Kind.PATTERN:
            return False
        if known is None and len(self._guesses) >= MOST_GUESSES:
            return False
        self._guesses[adapter.version] = Guess(adapter, kind, now + LASTS_S[kind])
        return known is None

    def arrived(self, adapter: AdapterRef, now: float) -> list[AdapterRef]:
        """A request for it is here; what usually follows, most often first."""
        self.drop(adapter.version)
        return self._followers.arrived(adapter, now)

    def expire(self, now: float) -> None:
        for version in [version for version, guess in self._guesses.items() if guess.until_s <= now]:
            del self._guesses[version]

    def drop(self, version: str) -> None:
        """It is here, or its request is."""
        self._guesses.pop(version, None)

    def failed(self, version: str) -> None:
        """It cannot be had: it is not tried again until a request is here for it."""
        self.drop(version)
        self._followers.forget(version)

    def validate(self) -> None:
        """Raises AssertionError naming what broke."""
        assert len(self._guesses) <= MOST_GUESSES, "too many guesses"
        self._followers.validate()


class Brought(msgspec.Struct):
    """A resident that was brought in before it was asked for. ``ran``: a request has run with it."""

    kind: Kind
    slab_bytes: int
    ran: bool


class PrefetchTally:
    """Bytes by kind since the beginning; those of residents that nobody has run with yet are neither useful nor
    wasted."""

    def __init__(self) -> None:
        self._loaded = dict.fromkeys(Kind, 0)
        self._useful = dict.fromkeys(Kind, 0)
        self._wasted = dict.fromkeys(Kind, 0)

    def loaded(self, brought: Brought) -> None:
        self._loaded[brought.kind] += brought.slab_bytes

    def left(self, brought: Brought) -> None:
        """The pool."""
        (self._useful if brought.ran else self._wasted)[brought.kind] += brought.slab_bytes

    def counts(self, here: Iterable[Brought]) -> tuple[PrefetchCounts, ...]:
        """Of the kinds of which there was anything; ``here`` are the residents."""
        useful = self._useful.copy()
        for brought in here:
            if brought.ran:
                useful[brought.kind] += brought.slab_bytes
        return tuple(
            PrefetchCounts(
                kind=kind.value,
                loaded_bytes=loaded,
                useful_bytes=useful[kind],
                wasted_bytes=self._wasted[kind],
            )
            for kind, loaded in self._loaded.items()
            if loaded
        )
