"""Which adapters' requests usually follow which: counts of what came within a few seconds of what. Pure and bounded."""

from collections.abc import Iterable, Iterator
from enum import StrEnum

import msgspec

from loraserve.messages import AdapterRef, PrefetchCounts

WINDOW_S = 5.0
LEAST_TIMES = 4
LEAST_SHARE = 0.5
"""So often, and after so many of the leader's windows, a follower has to have come before it is expected."""
HALVED_AT = 64
"""Windows of one leader at which its counts are halved, so that what was usual long ago is forgotten."""
MOST_LEADERS = 512
MOST_FOLLOWERS = 16
MOST_OPEN = 32
"""Windows at a time."""


class _Follower(msgspec.Struct):
    adapter: AdapterRef
    times: int = 0


class _Leader(msgspec.Struct):
    windows: int = 0
    followers: dict[str, _Follower] = msgspec.field(default_factory=dict)


class _Window(msgspec.Struct):
    """Opened by a request for the leader; further ones for it do not open another, a burst would be all evidence."""

    ends_s: float
    seen: set[str] = msgspec.field(default_factory=set)


class Followers:
    """Leaders that were not asked for longest are forgotten, and of one's followers those that came least often."""

    def __init__(self) -> None:
        # By the last arrival, oldest first.
        self._leaders: dict[str, _Leader] = {}
        # All last as long: in the order in which they end.
        self._windows: dict[str, _Window] = {}

    def arrived(self, adapter: AdapterRef, now: float) -> list[AdapterRef]:
        """A request for it came: what usually follows, most often first."""
        self._close(now)
        for version, window in self._windows.items():
            if version != adapter.version and adapter.version not in window.seen:
                window.seen.add(adapter.version)
                self._follows(self._leaders[version], adapter)
        leader = self._leaders.pop(adapter.version, None) or _Leader()
        self._leaders[adapter.version] = leader
        expected = list(_usual(leader))
        if adapter.version not in self._windows:
            self._open(adapter.version, leader, now)
        self._bound()
        return expected

    def forget(self, version: str) -> None:
        """It is followed for by nobody any more, as long as no request comes for it."""
        for leader in self._leaders.values():
            leader.followers.pop(version, None)

    def validate(self) -> None:
        """Raises AssertionError naming what broke."""
        assert len(self._leaders) <= MOST_LEADERS, "too many leaders"
        assert len(self._windows) <= MOST_OPEN, "too many windows"
        assert self._windows.keys() <= self._leaders.keys(), "a window of nobody"
        ends = [window.ends_s for window in self._windows.values()]
        assert ends == sorted(ends), "windows are out of order"
        for version, leader in self._leaders.items():
            assert len(leader.followers) <= MOST_FOLLOWERS, f"{version} has too many followers"
            assert leader.windows < HALVED_AT, f"{version} was not halved"
            for follower in leader.followers.values():
                assert 0 < follower.times <= leader.windows, f"{version} is followed more often than it came"

    def _close(self, now: float) -> None:
        for version in [version for version, window in self._windows.items() if window.ends_s <= now]:
            del self._windows[version]

    def _open(self, version: str, leader: _Leader, now: float) -> None:
        leader.windows += 1
        self._windows[version] = _Window(now + WINDOW_S)
        if leader.windows >= HALVED_AT:
            leader.windows //= 2
            for follower in leader.followers.values():
                follower.times //= 2
            leader.followers = {name: each for name, each in leader.followers.items() if each.times}

    def _follows(self, leader: _Leader, adapter: AdapterRef) -> None:
        followers = leader.followers
        if adapter.version not in followers and len(followers) >= MOST_FOLLOWERS:
            del followers[min(followers, key=lambda version: followers[version].times)]
        follower = followers.setdefault(adapter.version, _Follower(adapter))
        follower.adapter = adapter
        follower.times += 1

    def _bound(self) -> None:
        while len(self._windows) > MOST_OPEN:
            del self._windows[next(iter(self._windows))]
        while len(self._leaders) > MOST_LEADERS:
            oldest = next(iter(self._leaders))
            del self._leaders[oldest]
            self._windows.pop(oldest, None)


def _usual(leader: _Leader) -> Iterator[AdapterRef]:
    for follower in sorted(leader.followers.values(), key=lambda each: -each.times):
        if follower.times >= LEAST_TIMES and follower.times >= LEAST_SHARE * leader.windows:
            yield follower.adapter


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
