"""The router's view of the cluster: the monitor's last snapshot (``ClusterLoad``) and this router's later actions.

Requests that were sent after the last snapshot count as load. Otherwise a burst of requests would go to the single
engine that looked best in that snapshot. If the monitor is silent, the last snapshot stays valid. Engines are asked
last after two timeouts.

A monitor that is cut off from all engines reports all of them dead, although this router may reach them. If no engine
is alive, requests are therefore sent to those whose process did not certainly end, while they answer.
"""

from collections.abc import Mapping
from math import isfinite

from loraserve.cost import CostModel
from loraserve.messages import ClusterLoad, EngineSeen, Route
from loraserve.router.engine_view import (
    TIMEOUTS_TO_AVOID,
    EngineView,
    PendingAdapters,
    PendingRequest,
    RunningRequest,
)
from loraserve.router.prefixes import PrefixMemory
from loraserve.router.prices import PriceTable
from loraserve.story import Story

PENDING_TIMEOUT_S = 1.0
"""If no report lists a request within this time after it was sent, it has ended or never started."""
REPORT_MARGIN_S = 0.05
"""Margin for the transfer from the monitor to this router, which ``EngineSeen.age_s`` does not include."""
FORGET_MISSING_S = 5.0
"""Engines missing from snapshots are kept for this time, because a new monitor does not know every engine yet."""
MAX_RUNNING = 50_000
DEFAULT_OUTPUT_TOKENS = 64.0


class ClusterView:
    """The view of every engine by name, and the engine that runs each request.

    Attributes:
        running: Running requests by request id.
        drained: Names of the engines that the plan drains.
        mean_output_tokens: Mean output length of a request, from the monitor's demand.
        requests_per_s: Arrival rate of the whole cluster.
        prefixes: Prompt prefixes cached by engines; None if engines have no prefix cache.
        story: This router's actions for each request.
    """

    def __init__(self, prefix_cache: bool = True) -> None:
        self.engines: dict[str, EngineView] = {}
        self.running: dict[str, RunningRequest] = {}
        self.drained: frozenset[str] = frozenset()
        self.mean_output_tokens = DEFAULT_OUTPUT_TOKENS
        self.requests_per_s = 0.0
        self.prefixes = PrefixMemory() if prefix_cache else None
        self._prices = PriceTable()
        self._engines_with: dict[str, dict[str, EngineView]] = {}
        self._last_snapshot: tuple[str, int] = ("", 0)
        self._oldest_pending_s = float("inf")
        """A lower bound of ``EngineView.oldest_s`` of all engines."""
        self.story = Story()

    def update(self, snapshot: ClusterLoad, now: float) -> bool:
        """Apply a snapshot from the monitor. Return False and ignore it if it is not newer than the last one."""
        incarnation, sequence = self._last_snapshot
        if snapshot.incarnation == incarnation and snapshot.sequence <= sequence:
            return False
        self._last_snapshot = snapshot.incarnation, snapshot.sequence
        demand = [d for d in snapshot.demand if isfinite(d.requests_per_s) and isfinite(d.decode_tokens_per_s)]
        decoded = {d.version: d.decode_tokens_per_s / max(1, len(self.engines_with(d.version))) for d in demand}
        for seen in snapshot.engines:
            self._apply_report(seen, now - seen.age_s, now, decoded)
        reported = {seen.load.engine for seen in snapshot.engines}
        for name in self.engines.keys() - reported:
            if now - self.engines[name].reported_s > FORGET_MISSING_S:
                self._forget_engine(name)
        self._drop_ended()
        self.requests_per_s = sum(d.requests_per_s for d in demand)
        if self.requests_per_s > 0:
            decode_tokens_per_s = sum(d.decode_tokens_per_s for d in demand)
            self.mean_output_tokens = max(1.0, decode_tokens_per_s / self.requests_per_s)
        for view in self.engines.values():
            view.retry_unheard(now)
        self._prices.set_engines(self._choosable())
        return True

    def ready_engines(self) -> list[EngineView]:
        """Return the engines to choose from, ordered by name: the ready ones, including fallback engines.

        If none is ready, those that the monitor does not hear but that may serve requests.
        """
        return self._prices.engines

    def prices(self, cost: CostModel) -> PriceTable:
        """Return the prices of the ready engines, in the order of ``ready_engines``."""
        self._prices.refresh(cost, self.mean_output_tokens, self.requests_per_s)
        return self._prices

    def engines_with(self, version: str) -> Mapping[str, EngineView]:
        """Return by name the engines that hold, load, expect or have requests for the adapter. May be outdated."""
        return self._engines_with.get(version, {})

    def cached_tokens(self, request: Route) -> Mapping[int, int]:
        """Return how many prompt tokens the prefix caches of ready engines probably hold, by the engine's column."""
        cached = self.prefixes.cached_tokens(request) if self.prefixes is not None else {}
        columns = ((self.engines[name].column, tokens) for name, tokens in cached.items() if name in self.engines)
        return {column: tokens for column, tokens in columns if column >= 0}

    def set_drained(self, engines: frozenset[str]) -> None:
        self.drained = engines
        for name, view in self.engines.items():
            if view.drained != (name in engines):
                view.drained = name in engines
                self._prices.mark_changed(view)

    def record_sent(self, engine: str, request: Route, now: float, reason: str = "") -> None:
        """Count a sent request as load of its engine."""
        view = self.engines.get(engine)
        if view is not None:
            view.add_pending(request.request_id, self._pending_request(engine, request, now))
            if request.adapter is not None:
                self._list(view, request.adapter.version)
            self._oldest_pending_s = min(self._oldest_pending_s, now)
            self._prices.mark_changed(view)
        self.story.tell(request.request_id, now, f"sent to {engine}" + (f", {reason}" if reason else ""))

    def record_expected(self, engine: str, version: str, now: float) -> None:
        """Record that the engine was told to load this adapter for an expected request."""
        view = self.engines[engine]
        view.expect(version, now)
        self._list(view, version)
        self._oldest_pending_s = min(self._oldest_pending_s, now)

    def record_admitted(self, engine: str, request_id: str, incarnation: str, now: float) -> None:
        view = self.engines.get(engine)
        pending = None
        if view is not None:
            pending = view.pending.get(request_id)
            if view.timeouts:
                view.clear_timeouts()
                self._prices.mark_changed(view)
            if incarnation != view.load.incarnation:
                view.clear_adapters()
                self._prices.set_engines(self.ready_engines())
        self._set_running(request_id, engine, now, pending)
        self.story.tell(request_id, now, f"admitted by {engine}")

    def record_refused(self, engine: str, request_id: str, code: str, now: float) -> None:
        view = self.engines.get(engine)
        if view is not None:
            view.drop_pending([request_id])
            self._prices.mark_changed(view)
        self.story.tell(request_id, now, f"refused by {engine}: {code}")

    def record_timeout(self, engine: str, request_id: str, now: float) -> None:
        """Record that the engine did not answer.

        After two timeouts the engine is asked last, until it admits a request or a report ``EngineView.avoidance_s``
        later shows that it is alive.
        """
        self.story.tell(request_id, now, f"no answer from {engine}")
        view = self.engines.get(engine)
        if view is not None:
            view.drop_pending([request_id])
            view.record_timeout(now)
            self._prices.mark_changed(view)
            if not view.alive:
                self._prices.set_engines(self._choosable())

    def expire_pending(self, now: float) -> None:
        """Drop pending requests and expected adapters older than ``PENDING_TIMEOUT_S``."""
        if self._oldest_pending_s >= now - PENDING_TIMEOUT_S:
            return
        # Include engines that are not ready, because they may become ready without a later report.
        for view in self.engines.values():
            if view.oldest_s < now - PENDING_TIMEOUT_S:
                view.drop_older(now - PENDING_TIMEOUT_S)
                self._prices.mark_changed(view)
        self._oldest_pending_s = min((view.oldest_s for view in self.engines.values()), default=float("inf"))

    def validate(self) -> None:
        """Raise AssertionError if a sum or an index is wrong or a table is too large."""
        for name, view in self.engines.items():
            self._validate_engine(name, view)
        for version, views in self._engines_with.items():
            assert views, f"{version} is listed for no engine"
            assert all(self.engines.get(name) is view for name, view in views.items()), f"{version}: a lost engine"
        ready = [view.name for view in self.ready_engines()]
        assert ready == [view.name for view in self._choosable()]
        assert len(self.running) <= MAX_RUNNING
        self._prices.validate()
        if self.prefixes is not None:
            self.prefixes.validate()

    def _choosable(self) -> list[EngineView]:
        views = [view for _, view in sorted(self.engines.items())]
        return [view for view in views if view.is_ready] or [view for view in views if view.may_serve]

    def _validate_engine(self, name: str, view: EngineView) -> None:
        assert view.name == name == view.load.engine, f"{name} is listed under another name"
        assert view.drained == (name in self.drained), f"{name}: drained or not"
        assert view.pending_tokens == sum(p.tokens for p in view.pending.values()), f"{name}: pending tokens"
        adapters = PendingAdapters()
        for pending in view.pending.values():
            adapters.add(pending, view.active)
        assert view.pending_adapters == adapters, f"{name}: adapters of pending requests"
        times = [p.since_s for p in view.pending.values()]
        assert times == sorted(times), f"{name}: pending requests are out of order"
        assert list(view.expected.values()) == sorted(view.expected.values()), f"{name}: expected out of order"
        assert view.column < 0 or self._oldest_pending_s <= view.oldest_s, f"{name}: would never expire"
        avoided = view.avoided_since_s is not None
        assert not avoided or view.timeouts >= TIMEOUTS_TO_AVOID, f"{name} is avoided without reason"
        assert _versions_at(view) <= view.listed, f"{name} is not listed for all that it has"
        assert all(self.engines_with(version).get(name) is view for version in view.listed), f"{name} is not listed"

    def _apply_report(self, seen: EngineSeen, reported_s: float, now: float, decoded: Mapping[str, float]) -> None:
        load = seen.load
        view = self.engines.get(load.engine)
        if view is None:
            drained = load.engine in self.drained
            view = EngineView(load.engine, load, seen.capabilities, reported_s, seen.alive, drained=drained)
            self.engines[load.engine] = view
        if load.incarnation != view.load.incarnation and self.prefixes is not None:
            self.prefixes.forget(load.engine)
        for request_id in load.queue.request_ids:
            if request_id not in self.running:
                self._set_running(request_id, load.engine, reported_s, view.pending.get(request_id))
        known = (self.running[i] for i in load.queue.request_ids if i in self.running)
        view.apply_report(seen, reported_s, known, decoded)
        if view.pending or view.expected:
            view.drop_older(max(reported_s - REPORT_MARGIN_S, now - PENDING_TIMEOUT_S))
            view.drop_pending([i for i in load.queue.request_ids if i in view.pending])
        self._update_listing(view)

    def _update_listing(self, view: EngineView) -> None:
        versions = _versions_at(view)
        for version in view.listed - versions:
            self._unlist(view, version)
        for version in versions - view.listed:
            self._list(view, version)
        view.listed = versions

    def _list(self, view: EngineView, version: str) -> None:
        self._engines_with.setdefault(version, {})[view.name] = view
        view.listed.add(version)

    def _unlist(self, view: EngineView, version: str) -> None:
        views = self._engines_with[version]
        del views[view.name]
        if not views:
            del self._engines_with[version]

    def _forget_engine(self, name: str) -> None:
        view = self.engines.pop(name)
        for version in view.listed:
            self._unlist(view, version)
        if self.prefixes is not None:
            self.prefixes.forget(name)

    def _pending_request(self, engine: str, request: Route, now: float) -> PendingRequest:
        tokens = len(request.prompt_tokens)
        if self.prefixes is not None:
            tokens -= self.prefixes.cached_tokens(request).get(engine, 0)
            self.prefixes.record_sent(engine, request)
        if request.adapter is None:
            return PendingRequest(tokens, "", now)
        return PendingRequest(tokens, request.adapter.version, now, request.adapter.rank, request.adapter.slab_bytes)

    def _set_running(self, request_id: str, engine: str, since_s: float, pending: PendingRequest | None) -> None:
        """Record the engine that runs a request, and the request's adapter if this router sent the request."""
        known = pending or self.running.get(request_id)
        version, rank = (known.version, known.rank) if known is not None else ("", 0)
        self.running[request_id] = RunningRequest(engine, since_s, version, rank)
        if len(self.running) > MAX_RUNNING:
            del self.running[next(iter(self.running))]

    def _drop_ended(self) -> None:
        """Forget requests whose engine is unknown or not alive, or whose engine's later report does not list them."""
        reported = {name: set(view.load.queue.request_ids) for name, view in self.engines.items()}
        for request_id, request in list(self.running.items()):
            view = self.engines.get(request.engine)
            later = view is not None and request.since_s < view.reported_s - REPORT_MARGIN_S
            if view is None or not view.alive or (later and request_id not in reported[request.engine]):
                del self.running[request_id]


def _versions_at(view: EngineView) -> set[str]:
    """Return the versions of the adapters that the engine holds, loads, expects or has requests for."""
    return view.pending_adapters.versions.union(view.resident, view.loading, view.active, view.expected)
