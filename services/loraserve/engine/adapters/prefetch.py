"""Prefetching: which adapters to load before a request waits for them, and how useful these loads were.

PLAN prefetches the adapters of a plan. ADMISSION prefetches an adapter when a router announces a request for it.
PATTERN prefetches adapters whose requests usually follow the request that has just arrived. ADMISSION and PATTERN
adapters are candidates and expire. An adapter follows another if its request arrives within WINDOW_S seconds.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum

import msgspec

from loraserve.messages import AdapterRef, PrefetchCounts

WINDOW_S = 5.0
LEAST_TIMES = 4
LEAST_SHARE = 0.5
"""A follower is expected if it was requested in LEAST_TIMES of the leader's windows and in this share of them."""
HALVED_AT = 64
"""A leader's counts are halved after this many windows, so that old patterns are forgotten."""
MOST_LEADERS = 512
MOST_FOLLOWERS = 16
MOST_OPEN = 32
"""Maximum number of open windows."""
ADMISSION_LASTS_S = 5.0
"""An announced request is expected for this long. After that, it went to another engine or was refused."""
MOST_CANDIDATES = 16


class PrefetchKind(StrEnum):
    PLAN = "plan"
    ADMISSION = "admission"
    PATTERN = "pattern"


LASTS_S = {PrefetchKind.ADMISSION: ADMISSION_LASTS_S, PrefetchKind.PATTERN: WINDOW_S}
SPARES_S = {PrefetchKind.ADMISSION: ADMISSION_LASTS_S, PrefetchKind.PATTERN: 60.0}
"""A candidate does not evict adapters used within this time. It is short for ADMISSION, whose request would soon evict
them anyway. It is long for PATTERN, because half of the expected followers may never be requested."""


class _Follower(msgspec.Struct):
    adapter: AdapterRef
    times: int = 0


class _Leader(msgspec.Struct):
    windows: int = 0
    followers: dict[str, _Follower] = msgspec.field(default_factory=dict)


class _Window(msgspec.Struct):
    """The time after a request for an adapter in which requests for other adapters are counted as its followers."""

    ends_s: float
    seen: set[str] = msgspec.field(default_factory=set)


class Followers:
    """Counts, for each adapter (the leader), which adapters are requested soon after it (its followers).

    If there are too many, the least recently requested leaders and the rarest followers of a leader are forgotten.
    """

    def __init__(self) -> None:
        self._leaders: dict[str, _Leader] = {}
        """Ordered by last request, oldest first."""
        self._windows: dict[str, _Window] = {}
        """The open window of each leader, ordered by end time."""

    def note_request(self, adapter: AdapterRef, now: float) -> list[AdapterRef]:
        """Count a request for ``adapter``. Return the adapters usually requested soon after, most frequent first."""
        self._close_windows(now)
        for version, window in self._windows.items():
            if version != adapter.version and adapter.version not in window.seen:
                window.seen.add(adapter.version)
                self._count_follower(self._leaders[version], adapter)
        leader = self._leaders.pop(adapter.version, None) or _Leader()
        self._leaders[adapter.version] = leader
        expected = list(_usual_followers(leader))
        if adapter.version not in self._windows:
            self._open_window(adapter.version, leader, now)
        self._forget_surplus()
        return expected

    def forget(self, version: str) -> None:
        """Remove the adapter as a follower of all leaders. Its counts start again from zero."""
        for leader in self._leaders.values():
            leader.followers.pop(version, None)

    def validate(self) -> None:
        assert len(self._leaders) <= MOST_LEADERS, "too many leaders"
        assert len(self._windows) <= MOST_OPEN, "too many windows"
        assert self._windows.keys() <= self._leaders.keys(), "a window has no leader"
        ends = [window.ends_s for window in self._windows.values()]
        assert ends == sorted(ends), "windows are out of order"
        for version, leader in self._leaders.items():
            assert len(leader.followers) <= MOST_FOLLOWERS, f"{version} has too many followers"
            assert leader.windows < HALVED_AT, f"the counts of {version} were not halved"
            for follower in leader.followers.values():
                assert 0 < follower.times <= leader.windows, f"{version} has more follow-ups than windows"

    def _close_windows(self, now: float) -> None:
        for version in [version for version, window in self._windows.items() if window.ends_s <= now]:
            del self._windows[version]

    def _open_window(self, version: str, leader: _Leader, now: float) -> None:
        leader.windows += 1
        self._windows[version] = _Window(now + WINDOW_S)
        if leader.windows >= HALVED_AT:
            leader.windows //= 2
            for follower in leader.followers.values():
                follower.times //= 2
            leader.followers = {name: each for name, each in leader.followers.items() if each.times}

    def _count_follower(self, leader: _Leader, adapter: AdapterRef) -> None:
        followers = leader.followers
        if adapter.version not in followers and len(followers) >= MOST_FOLLOWERS:
            del followers[min(followers, key=lambda version: followers[version].times)]
        follower = followers.setdefault(adapter.version, _Follower(adapter))
        follower.adapter = adapter
        follower.times += 1

    def _forget_surplus(self) -> None:
        while len(self._windows) > MOST_OPEN:
            del self._windows[next(iter(self._windows))]
        while len(self._leaders) > MOST_LEADERS:
            oldest = next(iter(self._leaders))
            del self._leaders[oldest]
            self._windows.pop(oldest, None)


def _usual_followers(leader: _Leader) -> Iterator[AdapterRef]:
    for follower in sorted(leader.followers.values(), key=lambda each: -each.times):
        if follower.times >= LEAST_TIMES and follower.times >= LEAST_SHARE * leader.windows:
            yield follower.adapter


class PrefetchCandidate(msgspec.Struct, frozen=True):
    """An adapter for which a request is expected until ``until_s``."""

    adapter: AdapterRef
    kind: PrefetchKind
    until_s: float


class PrefetchCandidates:
    """The adapters for which requests are expected. Candidates beyond MOST_CANDIDATES are ignored."""

    def __init__(self) -> None:
        self._candidates: dict[str, PrefetchCandidate] = {}
        self._followers = Followers()

    def versions(self) -> set[str]:
        return set(self._candidates)

    def of_kind(self, kind: PrefetchKind) -> list[AdapterRef]:
        return [candidate.adapter for candidate in self._candidates.values() if candidate.kind == kind]

    def expect(self, adapter: AdapterRef, kind: PrefetchKind, now: float) -> bool:
        """Add or renew a candidate. Return whether it was added. PATTERN does not renew an ADMISSION candidate."""
        known = self._candidates.get(adapter.version)
        if known is not None and known.kind == PrefetchKind.ADMISSION and kind == PrefetchKind.PATTERN:
            return False
        if known is None and len(self._candidates) >= MOST_CANDIDATES:
            return False
        self._candidates[adapter.version] = PrefetchCandidate(adapter, kind, now + LASTS_S[kind])
        return known is None

    def note_request(self, adapter: AdapterRef, now: float) -> list[AdapterRef]:
        """Drop the candidate, as its request has arrived. Return the adapters usually requested soon afterwards."""
        self.drop(adapter.version)
        return self._followers.note_request(adapter, now)

    def expire(self, now: float) -> None:
        for version in [version for version, each in self._candidates.items() if each.until_s <= now]:
            del self._candidates[version]

    def drop(self, version: str) -> None:
        self._candidates.pop(version, None)

    def drop_failed(self, version: str) -> None:
        """Drop a candidate whose load failed, and no longer count it as a follower of other adapters."""
        self.drop(version)
        self._followers.forget(version)

    def validate(self) -> None:
        assert len(self._candidates) <= MOST_CANDIDATES, "too many prefetch candidates"
        self._followers.validate()


class PrefetchedAdapter(msgspec.Struct):
    """An adapter in the pool that was prefetched. ``ran`` tells whether a request has run with it."""

    kind: PrefetchKind
    slab_bytes: int
    ran: bool


class PrefetchTally:
    """Counts prefetched bytes by kind since the engine started.

    A prefetch is useful if a request has run with the adapter, and wasted if the adapter was evicted before that.
    """

    def __init__(self) -> None:
        self._loaded = dict.fromkeys(PrefetchKind, 0)
        self._useful = dict.fromkeys(PrefetchKind, 0)
        self._wasted = dict.fromkeys(PrefetchKind, 0)

    def count_load(self, prefetched: PrefetchedAdapter) -> None:
        self._loaded[prefetched.kind] += prefetched.slab_bytes

    def count_eviction(self, prefetched: PrefetchedAdapter) -> None:
        (self._useful if prefetched.ran else self._wasted)[prefetched.kind] += prefetched.slab_bytes

    def counts(self, in_pool: Iterable[PrefetchedAdapter]) -> tuple[PrefetchCounts, ...]:
        """Return the bytes loaded, useful and wasted by kind. ``in_pool`` yields the pool's prefetched adapters."""
        useful = self._useful.copy()
        for prefetched in in_pool:
            if prefetched.ran:
                useful[prefetched.kind] += prefetched.slab_bytes
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
