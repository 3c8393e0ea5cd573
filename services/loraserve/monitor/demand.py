"""Demand per adapter, as rates over a window and a forecast, computed from the engines' token counters.

Demand is the difference between the counters of two reports. Counters start at zero in a new incarnation of the engine
and when ``AdapterTokens.span`` changes. A version missing from a report has unchanged counters.

A report updates the sums over the window incrementally. It visits only the versions that it lists, unless a time slot
ends. AdapterDemand structs are cached until one of their values changes.
"""

from collections import deque

import msgspec

from loraserve.messages import AdapterDemand, AdapterRef, AdapterTokens, EngineStatistics
from loraserve.monitor.forecast import Mixture, TrackedForecast

SLOTS = 12
"""Number of slots in the window. The window moves by one slot at a time."""
FORGET_BELOW_TOKENS_PER_S = 0.01
"""An adapter without demand in the window is dropped if its forecast is lower than this."""


_Counts = dict[str, list[int]]
"""Counts of prefill tokens, decode tokens and requests, by version."""


class _Slot(msgspec.Struct):
    start_s: float
    counts: _Counts


class _LastReport(msgspec.Struct):
    """An engine's latest counters, and the versions ``listed`` in its last report."""

    incarnation: str
    counters: dict[str, AdapterTokens]
    listed: set[str]


class DemandWindow:
    """Computes the demand of all engines over a sliding window of ``window_s`` seconds. Version "" is the base model.

    ``horizon_s`` is the forecast horizon, normally the planner's interval. It is rounded to slots, at least one.
    """

    def __init__(self, window_s: float, horizon_s: float = 0.0) -> None:
        self._slot_s = window_s / SLOTS
        self._window_s = window_s
        self._horizon_steps = max(1, round(horizon_s / self._slot_s))
        self._first_report_s: float | None = None
        self._slots: deque[_Slot] = deque()
        self._totals: _Counts = {}
        self._reports: dict[str, _LastReport] = {}
        self._forecasts: dict[str, TrackedForecast] = {}
        self._cached: dict[str, AdapterDemand] = {}
        self._cached_seconds = 0.0
        self._versions: list[str] | None = None
        """All versions, sorted. None if the list is outdated."""

    def report(self, statistics: EngineStatistics, now: float) -> None:
        """Add an engine's tokens since its last report to the current slot. The engine's first report adds nothing."""
        slot = self._current_slot(now)
        counters = {tokens.version: tokens for tokens in statistics.adapter_tokens}
        last = self._reports.get(statistics.engine)
        if last is None:
            # The counts of a first report accumulated over an unknown time, so they are not added as demand.
            self._reports[statistics.engine] = _LastReport(statistics.incarnation, counters, set(counters))
            return
        if last.incarnation != statistics.incarnation:
            last = self._reports[statistics.engine] = _LastReport(statistics.incarnation, {}, set())
        for version, tokens in counters.items():
            before = last.counters.get(version)
            if tokens != before:
                self._count(slot, version, _difference(tokens, before))
        _update_counters(last, counters)

    def demand(self, now: float, adapters: dict[str, AdapterRef]) -> tuple[AdapterDemand, ...]:
        """Return the rates and forecasts of all adapters with demand or a forecast, sorted by version.

        Rates are averages over the window, or over the time since the first ``report`` if shorter, at least one slot.
        """
        self._current_slot(now)
        seconds = self._seconds(now)
        if seconds != self._cached_seconds:
            self._cached, self._cached_seconds = {}, seconds
        if self._versions is None:
            self._versions = sorted(self._totals.keys() | self._forecasts.keys())
        return tuple([self._demand_of(version, adapters.get(version), seconds) for version in self._versions])

    def _demand_of(self, version: str, adapter: AdapterRef | None, seconds: float) -> AdapterDemand:
        name, rank = (adapter.name, adapter.rank) if adapter else ("", 0)
        cached = self._cached.get(version)
        if cached is not None and cached.name == name and cached.rank == rank:
            return cached
        prefill, decode, requests = self._totals.get(version, (0, 0, 0))
        tracked = self._forecasts.get(version)
        demand = self._cached[version] = AdapterDemand(
            version=version,
            name=name,
            rank=rank,
            prefill_tokens_per_s=prefill / seconds,
            decode_tokens_per_s=decode / seconds,
            requests_per_s=requests / seconds,
            forecast_tokens_per_s=tracked.tokens_per_s if tracked else 0.0,
            forecast_std_tokens_per_s=tracked.std_tokens_per_s if tracked else 0.0,
        )
        return demand

    def _seconds(self, now: float) -> float:
        since_s = 0.0 if self._first_report_s is None else now - self._first_report_s
        return max(min(self._window_s, since_s), self._slot_s)

    def _count(self, slot: _Slot, version: str, added: tuple[int, int, int]) -> None:
        prefill, decode, requests = added
        if not (prefill or decode or requests):
            return
        if version not in self._totals and version not in self._forecasts:
            self._versions = None
        for counts in (slot.counts, self._totals):
            count = counts.setdefault(version, [0, 0, 0])
            count[0] += prefill
            count[1] += decode
            count[2] += requests
        self._cached.pop(version, None)

    def _current_slot(self, now: float) -> _Slot:
        """Close the slots that ended before ``now`` and return the slot that contains ``now``."""
        if self._first_report_s is None:
            self._first_report_s = now
        if not self._slots:
            self._slots.append(_Slot(now, {}))
        while now - self._slots[-1].start_s >= self._slot_s:
            self._close(self._slots[-1])
            self._slots.append(_Slot(self._slots[-1].start_s + self._slot_s, {}))
            if len(self._slots) > SLOTS:
                self._expire(self._slots.popleft())
        return self._slots[-1]

    def _close(self, slot: _Slot) -> None:
        """Update the forecasts with a complete slot."""
        for version in slot.counts.keys() - self._forecasts.keys():
            forecaster = Mixture(self._slot_s, self._horizon_steps)
            self._forecasts[version] = TrackedForecast(forecaster, self._slot_s, self._horizon_steps)
        for version, tracked in self._forecasts.items():
            prefill, decode, _ = slot.counts.get(version, (0, 0, 0))
            tracked.observe((prefill + decode) / self._slot_s)
        self._cached, self._versions = {}, None

    def _expire(self, slot: _Slot) -> None:
        """Subtract an expired slot from the sums. Drops adapters without demand and with a negligible forecast."""
        for version, counts in slot.counts.items():
            total = self._totals[version]
            for index, count in enumerate(counts):
                total[index] -= count
            if not any(total):
                del self._totals[version]
        self._forecasts = {
            version: tracked
            for version, tracked in self._forecasts.items()
            if version in self._totals or tracked.tokens_per_s >= FORGET_BELOW_TOKENS_PER_S
        }


def _difference(tokens: AdapterTokens, before: AdapterTokens | None) -> tuple[int, int, int]:
    """Return the prefill tokens, decode tokens and requests counted since ``before``.

    If ``before`` is None or has another ``span``, the counters started at zero and are returned unchanged.
    """
    if before is None or before.span != tokens.span:
        return tokens.prefill_tokens, tokens.decode_tokens, tokens.requests
    return (
        tokens.prefill_tokens - before.prefill_tokens,
        tokens.decode_tokens - before.decode_tokens,
        tokens.requests - before.requests,
    )


def _update_counters(last: _LastReport, counters: dict[str, AdapterTokens]) -> None:
    """Store a report's counters. Drop versions that left the report if their counters will restart (``span`` > 0)."""
    for version in last.listed - counters.keys():
        if last.counters[version].span:
            del last.counters[version]
    last.counters.update(counters)
    last.listed = set(counters)
