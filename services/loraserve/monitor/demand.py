"""Demand per adapter from the engines' counters: rates over a window, and what to expect next. Pure.

Engines count tokens; differences between two reports of one incarnation are demand, and a restart begins from zero
again. A version that is missing from a report is unchanged; under a new ``span`` it counts from zero. Sums are kept,
not made anew: a report costs what it lists, and while a piece of the window lasts only what was reported is made again.
"""

from collections import deque

import msgspec

from loraserve.messages import AdapterDemand, AdapterRef, AdapterTokens, EngineStatistics
from loraserve.monitor.forecast import Mixture, Tracked

SLOTS = 12
"""A window is kept in this many pieces; a rate is exact to one piece of it."""
FORGOTTEN_BELOW_TOKENS_PER_S = 0.01
"""An adapter that is expected to do less, and did nothing in the window, is no longer spoken of."""


class Rates(msgspec.Struct, frozen=True):
    """Per second over the window."""

    prefill_tokens: float = 0.0
    decode_tokens: float = 0.0
    requests: float = 0.0


_Counts = dict[str, list[int]]
"""By version: prefill tokens, decode tokens, requests."""


class _Slot(msgspec.Struct):
    start_s: float
    counts: _Counts


class _Reported(msgspec.Struct):
    """What an engine said last, and the versions that its last report listed."""

    incarnation: str
    counters: dict[str, AdapterTokens]
    listed: set[str]


class DemandWindow:
    """Sliding window over all engines. The version "" is the base model.

    ``horizon_s`` is how far ahead forecasts reach, the planner's interval; one piece of the window without it.
    """

    def __init__(self, window_s: float, horizon_s: float | None = None) -> None:
        self._slot_s = window_s / SLOTS
        self._window_s = window_s
        self._horizon_steps = max(1, round((horizon_s or 0.0) / self._slot_s))
        self._began_s: float | None = None
        self._slots: deque[_Slot] = deque()
        self._totals: _Counts = {}
        self._reported: dict[str, _Reported] = {}
        self._forecasts: dict[str, Tracked] = {}
        self._made: dict[str, AdapterDemand] = {}
        self._made_for_s = 0.0
        self._order: list[str] | None = None

    def report(self, statistics: EngineStatistics, now: float) -> None:
        """Count what an engine did since its last report."""
        slot = self._slot(now)
        counted = {tokens.version: tokens for tokens in statistics.adapter_tokens}
        last = self._reported.get(statistics.engine)
        if last is None:
            # Of an engine heard for the first time it is not known when it counted what it has: no demand of now.
            self._reported[statistics.engine] = _Reported(statistics.incarnation, counted, set(counted))
            return
        if last.incarnation != statistics.incarnation:
            last = self._reported[statistics.engine] = _Reported(statistics.incarnation, {}, set())
        for version, tokens in counted.items():
            before = last.counters.get(version)
            # Engines go on reporting what they once served: that alone is no demand.
            if tokens != before:
                self._count(slot, version, _added(tokens, before))
        _remember(last, counted)

    def rates(self, now: float) -> dict[str, Rates]:
        """Per version over the window, or over the time since the first report where that is shorter."""
        self._slot(now)
        seconds = self._seconds(now)
        return {version: Rates(*(count / seconds for count in total)) for version, total in self._totals.items()}

    def demand(self, now: float, adapters: dict[str, AdapterRef]) -> tuple[AdapterDemand, ...]:
        """Demand and forecast of every adapter that has any, by version."""
        self._slot(now)
        seconds = self._seconds(now)
        if seconds != self._made_for_s:
            self._made, self._made_for_s = {}, seconds
        if self._order is None:
            self._order = sorted(self._totals.keys() | self._forecasts.keys())
        return tuple([self._demand_of(version, adapters.get(version), seconds) for version in self._order])

    def _demand_of(self, version: str, adapter: AdapterRef | None, seconds: float) -> AdapterDemand:
        name, rank = (adapter.name, adapter.rank) if adapter else ("", 0)
        made = self._made.get(version)
        if made is not None and made.name == name and made.rank == rank:
            return made
        prefill, decode, requests = self._totals.get(version, (0, 0, 0))
        tracked = self._forecasts.get(version)
        made = self._made[version] = AdapterDemand(
            version=version,
            name=name,
            rank=rank,
            prefill_tokens_per_s=prefill / seconds,
            decode_tokens_per_s=decode / seconds,
            requests_per_s=requests / seconds,
            forecast_tokens_per_s=tracked.ahead if tracked else 0.0,
            forecast_std_tokens_per_s=tracked.std_tokens_per_s if tracked else 0.0,
        )
        return made

    def _seconds(self, now: float) -> float:
        since_s = 0.0 if self._began_s is None else now - self._began_s
        return max(min(self._window_s, since_s), self._slot_s)

    def _count(self, slot: _Slot, version: str, added: tuple[int, int, int]) -> None:
        prefill, decode, requests = added
        if not (prefill or decode or requests):
            return
        if version not in self._totals and version not in self._forecasts:
            self._order = None
        for counts in (slot.counts, self._totals):
            count = counts.get(version)
            if count is None:
                counts[version] = list(added)
            else:
                count[0] += prefill
                count[1] += decode
                count[2] += requests
        self._made.pop(version, None)

    def _slot(self, now: float) -> _Slot:
        """The current piece of the window; closing a piece feeds the forecasts."""
        if self._began_s is None:
            self._began_s = now
        if not self._slots:
            self._slots.append(_Slot(now, {}))
        while now - self._slots[-1].start_s >= self._slot_s:
            self._close(self._slots[-1])
            self._slots.append(_Slot(self._slots[-1].start_s + self._slot_s, {}))
            if len(self._slots) > SLOTS:
                self._leave(self._slots.popleft())
        return self._slots[-1]

    def _close(self, slot: _Slot) -> None:
        for version in slot.counts.keys() - self._forecasts.keys():
            forecaster = Mixture(self._slot_s, self._horizon_steps)
            self._forecasts[version] = Tracked(forecaster, self._slot_s, self._horizon_steps)
        for version, tracked in self._forecasts.items():
            prefill, decode, _ = slot.counts.get(version, (0, 0, 0))
            tracked.observe((prefill + decode) / self._slot_s)
        self._made, self._order = {}, None

    def _leave(self, slot: _Slot) -> None:
        """A piece is older than the window: nothing of it is in the sums any more, and who is idle may be forgotten."""
        for version, counts in slot.counts.items():
            total = self._totals[version]
            for index, count in enumerate(counts):
                total[index] -= count
            if not any(total):
                del self._totals[version]
        self._forecasts = {
            version: tracked
            for version, tracked in self._forecasts.items()
            if version in self._totals or tracked.ahead >= FORGOTTEN_BELOW_TOKENS_PER_S
        }


def _added(tokens: AdapterTokens, before: AdapterTokens | None) -> tuple[int, int, int]:
    """What was done since; counters of another span began at zero."""
    if before is None or before.span != tokens.span:
        return tokens.prefill_tokens, tokens.decode_tokens, tokens.requests
    return (
        tokens.prefill_tokens - before.prefill_tokens,
        tokens.decode_tokens - before.decode_tokens,
        tokens.requests - before.requests,
    )


def _remember(last: _Reported, counted: dict[str, AdapterTokens]) -> None:
    """What is no longer listed is unchanged; where spans are counted it comes again only under another one."""
    for version in last.listed - counted.keys():
        if last.counters[version].span:
            del last.counters[version]
    last.counters.update(counted)
    last.listed = set(counted)
