"""Which adapters' requests usually follow which: counts of what came within a few seconds of what. Pure and bounded."""

from collections.abc import Iterator

import msgspec

from loraserve.messages import AdapterRef

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
