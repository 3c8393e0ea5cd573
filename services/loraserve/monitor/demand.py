"""Demand per adapter from the engines' counters: rates over a window, and what to expect next. Pure.

Engines count tokens since their incarnation began; differences between two reports of one incarnation are demand, and a
restart begins from zero again. The forecast is level plus trend (Holt, "Forecasting seasonals and trends by
exponentially weighted moving averages", 1957).
"""

from collections import deque

import msgspec

from loraserve.messages import AdapterDemand, AdapterRef, AdapterTokens, EngineLoad

SLOTS = 12
"""A window is kept in this many pieces; a rate is exact to one piece of it."""
LEVEL_WEIGHT, TREND_WEIGHT = 0.4, 0.2


class Rates(msgspec.Struct, frozen=True):
    """Per second over the window."""

    prefill_tokens: float = 0.0
    decode_tokens: float = 0.0
    requests: float = 0.0


class _Slot(msgspec.Struct):
    start_s: float
    counts: dict[str, list[int]]


class DemandWindow:
    """Sliding window over all engines. The version "" is the base model."""

    def __init__(self, window_s: float) -> None:
        self._slot_s = window_s / SLOTS
        self._window_s = window_s
        self._began_s: float | None = None
        self._slots: deque[_Slot] = deque()
        self._last: dict[str, tuple[str, dict[str, AdapterTokens]]] = {}
        self._forecasts: dict[str, _Holt] = {}

    def report(self, load: EngineLoad, now: float) -> None:
        """Count what an engine did since its last report."""
        slot = self._slot(now)
        counted = {tokens.version: tokens for tokens in load.adapter_tokens}
        # Of an engine heard for the first time it is not known when it counted what it has: that is no demand of now.
        incarnation, before = self._last.get(load.engine, (load.incarnation, counted))
        self._last[load.engine] = (load.incarnation, counted)
        if incarnation != load.incarnation:
            before = {}
        for tokens in load.adapter_tokens:
            past = before.get(tokens.version)
            added = (
                tokens.prefill_tokens - (past.prefill_tokens if past else 0),
                tokens.decode_tokens - (past.decode_tokens if past else 0),
                tokens.requests - (past.requests if past else 0),
            )
            # Engines go on reporting what they once served: that alone is no demand.
            if any(added):
                counts = slot.counts.setdefault(tokens.version, [0, 0, 0])
                slot.counts[tokens.version] = [count + more for count, more in zip(counts, added, strict=True)]

    def rates(self, now: float) -> dict[str, Rates]:
        """Per version over the window, or over the time since the first report where that is shorter."""
        self._slot(now)
        if self._began_s is None:
            return {}
        seconds = max(min(self._window_s, now - self._began_s), self._slot_s)
        totals: dict[str, list[int]] = {}
        for slot in self._slots:
            for version, counts in slot.counts.items():
                total = totals.setdefault(version, [0, 0, 0])
                for index, count in enumerate(counts):
                    total[index] += count
        return {version: Rates(*(count / seconds for count in total)) for version, total in totals.items()}

    def demand(self, now: float, adapters: dict[str, AdapterRef]) -> tuple[AdapterDemand, ...]:
        """Demand and forecast of every adapter that has any, by version."""
        rates = self.rates(now)
        found = []
        for version in sorted(rates.keys() | self._forecasts.keys()):
            rate = rates.get(version, Rates())
            adapter = adapters.get(version)
            found.append(
                AdapterDemand(
                    version=version,
                    name=adapter.name if adapter else "",
                    rank=adapter.rank if adapter else 0,
                    prefill_tokens_per_s=rate.prefill_tokens,
                    decode_tokens_per_s=rate.decode_tokens,
                    requests_per_s=rate.requests,
                    forecast_tokens_per_s=self._forecasts.get(version, _Holt()).next(),
                )
            )
        return tuple(found)

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
                self._slots.popleft()
        return self._slots[-1]

    def _close(self, slot: _Slot) -> None:
        for version in slot.counts.keys() | self._forecasts.keys():
            prefill, decode, _ = slot.counts.get(version, (0, 0, 0))
            forecast = self._forecasts.setdefault(version, _Holt())
            forecast.observe((prefill + decode) / self._slot_s)
        self._forecasts = {v: f for v, f in self._forecasts.items() if f.next() > 1e-3}


class _Holt:
    """Level and trend of one series."""

    def __init__(self) -> None:
        self._level: float | None = None
        self._trend = 0.0

    def observe(self, value: float) -> None:
        if self._level is None:
            self._level = value
            return
        before = self._level
        self._level = LEVEL_WEIGHT * value + (1 - LEVEL_WEIGHT) * (before + self._trend)
        self._trend = TREND_WEIGHT * (self._level - before) + (1 - TREND_WEIGHT) * self._trend

    def next(self) -> float:
        """Expected value of the next interval; demand is never negative."""
        return max(0.0, (self._level or 0.0) + self._trend)
