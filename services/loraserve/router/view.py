"""What the router believes about the cluster right now. Pure.

The monitor's last picture, plus what this router has done since: a burst between two pictures must not all go to the
engine that looked best in the first. Where the monitor is silent the last picture stays, and the router goes by its own
evidence: engines that did not answer are asked last.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Protocol

from loraserve.cost import CostModel
from loraserve.messages import ClusterLoad, EngineLoad, Route
from loraserve.router.engine_view import TIMEOUTS_TO_AVOID, EngineView, Live, Pending, PendingMix
from loraserve.router.prefixes import PrefixMemory
from loraserve.router.prices import PriceTable

UNSEEN_S = 1.0
"""A request that no report mentions this long after it was sent has ended, or never began."""
DATE_MARGIN_S = 0.05
"""A report is dated from its age when published; the way from there to here takes time too."""
FORGET_MISSING_S = 5.0
"""A monitor that has just started has not heard of every engine yet."""
MOST_LIVE = 50_000
MOST_STORIES = 5_000
DEFAULT_OUTPUT_TOKENS = 64.0


class Explained(Protocol):
    """A candidate: why it was chosen, put into words only if somebody asks."""

    @property
    def reason(self) -> str: ...


class ClusterView:
    """Engines by name, where requests are, own evidence of engines that do not answer.

    ``prefix_cache``: whether engines keep the KV of prompts.
    """

    def __init__(self, prefix_cache: bool = True) -> None:
        self.engines: dict[str, EngineView] = {}
        self.live: dict[str, Live] = {}
        self.drained: frozenset[str] = frozenset()
        """Engines that the plan empties. See ``drain``."""
        self.output_tokens = DEFAULT_OUTPUT_TOKENS
        """Mean output of a request lately."""
        self.requests_per_s = 0.0
        self.prefixes = PrefixMemory() if prefix_cache else None
        self._prices = PriceTable()
        self._near: dict[str, dict[str, EngineView]] = {}
        self._picture: tuple[str, int] = ("", 0)
        self._decoded: Mapping[str, float] = {}
        """See EngineView.take."""
        self._oldest_pending_s = float("inf")
        """No pending request was sent before."""
        self._stories: dict[str, list[tuple[float, str, Explained | None]]] = {}

    def update(self, picture: ClusterLoad, now: float) -> bool:
        """A picture from the monitor; one that is older than the last changes nothing, which is False."""
        incarnation, sequence = self._picture
        if picture.incarnation == incarnation and picture.sequence <= sequence:
            return False
        self._picture = picture.incarnation, picture.sequence
        demand = [d for d in picture.demand if isfinite(d.requests_per_s) and isfinite(d.decode_tokens_per_s)]
        self._decoded = {d.version: d.decode_tokens_per_s / max(1, len(self.near(d.version))) for d in demand}
        for seen in picture.engines:
            self._report(seen.load, now - seen.age_s, seen.alive, now)
        reported = {seen.load.engine for seen in picture.engines}
        for name in self.engines.keys() - reported:
            if now - self.engines[name].reported_s > FORGET_MISSING_S:
                self._forget(name)
        self._drop_ended()
        self.requests_per_s = sum(d.requests_per_s for d in demand)
        if self.requests_per_s > 0:
            decode_tokens_per_s = sum(d.decode_tokens_per_s for d in demand)
            self.output_tokens = max(1.0, decode_tokens_per_s / self.requests_per_s)
        self._prices.begin([view for _, view in sorted(self.engines.items()) if view.is_ready])
        return True

    def ready(self) -> list[EngineView]:
        """Engines that take requests as far as is known, those that are asked last too; by name."""
        return self._prices.engines

    def drain(self, engines: frozenset[str]) -> None:
        """The plan empties these, and only these: they are asked after all others."""
        self.drained = engines
        for name, view in self.engines.items():
            if view.drained != (name in engines):
                view.drained = name in engines
                self._prices.changed(view)

    def prices(self, cost: CostModel) -> PriceTable:
        """Of the ready engines, in the same order."""
        self._prices.refresh(cost, self.output_tokens, self.requests_per_s)
        return self._prices

    def near(self, version: str) -> Mapping[str, EngineView]:
        """By name, every engine where this adapter is, is on its way to, or has requests; and perhaps some more."""
        return self._near.get(version, _NO_ENGINES)

    def cached_tokens(self, request: Route) -> Mapping[str, int]:
        """By engine, tokens of the prompt that it most likely has computed already."""
        return self.prefixes.cached_tokens(request) if self.prefixes is not None else _NO_TOKENS

    def sent(self, engine: str, request: Route, now: float, chosen: Explained | None = None) -> None:
        """A request is on its way to an engine: from now on it counts as load there."""
        view = self.engines.get(engine)
        if view is not None:
            view.add_pending(request.request_id, self._pending(engine, request, now))
            if request.adapter is not None:
                self._list(view, request.adapter.version)
            self._oldest_pending_s = min(self._oldest_pending_s, now)
            self._prices.changed(view)
        self._tell(request.request_id, now, f"sent to {engine}", chosen)

    def expected(self, engine: str, version: str, now: float) -> None:
        """The engine was told that a request for this adapter is about to come: it is on its way there."""
        view = self.engines[engine]
        view.expect(version, now)
        self._list(view, version)
        self._oldest_pending_s = min(self._oldest_pending_s, now)

    def admitted(self, engine: str, request_id: str, incarnation: str, now: float) -> None:
        """The engine has it."""
        view = self.engines.get(engine)
        pending = None
        if view is not None:
            pending = view.pending.get(request_id)
            if view.timeouts:
                view.answered()
                self._prices.changed(view)
            if incarnation != view.load.incarnation:
                view.emptied()
                self._prices.begin(self.ready())
        self._runs(request_id, engine, now, pending)
        self._tell(request_id, now, f"admitted by {engine}")

    def refused(self, engine: str, request_id: str, code: str, now: float) -> None:
        """The engine did not take it."""
        view = self.engines.get(engine)
        if view is not None:
            view.drop_pending([request_id])
            self._prices.changed(view)
        self._tell(request_id, now, f"refused by {engine}: {code}")

    def timed_out(self, engine: str, request_id: str, now: float) -> None:
        """The engine did not answer. After two in a row it is asked last, until a report shows that it lives."""
        self._tell(request_id, now, f"no answer from {engine}")
        view = self.engines.get(engine)
        if view is not None:
            view.drop_pending([request_id])
            view.timed_out(now)
            self._prices.changed(view)

    def expire(self, now: float) -> None:
        """Stop counting requests that no report has mentioned; cheap, to be called before each decision."""
        if self._oldest_pending_s >= now - UNSEEN_S:
            return
        # Also of engines that take no requests now: they may again before they report any later.
        for view in self.engines.values():
            if view.oldest_s < now - UNSEEN_S:
                view.drop_older(now - UNSEEN_S)
                self._prices.changed(view)
        self._oldest_pending_s = min((view.oldest_s for view in self.engines.values()), default=float("inf"))

    def validate(self) -> None:
        """Sums agree with what they sum, tables stay bounded; raises AssertionError naming what broke."""
        for name, view in self.engines.items():
            assert view.name == name == view.load.engine, f"{name} is listed under another name"
            assert view.drained == (name in self.drained), f"{name}: drained or not"
            assert view.pending_tokens == sum(p.tokens for p in view.pending.values()), f"{name}: pending tokens"
            mix = PendingMix()
            for pending in view.pending.values():
                mix.add(pending, view.active)
            assert view.pending_mix == mix, f"{name}: adapters of pending requests"
            times = [p.since_s for p in view.pending.values()]
            assert times == sorted(times), f"{name}: pending requests are out of order"
            assert list(view.expected.values()) == sorted(view.expected.values()), f"{name}: expected out of order"
            assert view.column < 0 or self._oldest_pending_s <= view.oldest_s, f"{name}: would never expire"
            assert (view.avoided_since_s is None) or view.timeouts >= TIMEOUTS_TO_AVOID, (
                f"{name} is avoided without reason"
            )
            assert _found_at(view) <= view.listed, f"{name} is not listed for all that it has"
            assert all(self.near(version).get(name) is view for version in view.listed), f"{name} is not listed"
        for version, views in self._near.items():
            assert views, f"{version} is listed for nobody"
            assert all(self.engines.get(name) is view for name, view in views.items()), f"{version}: a lost engine"
        assert [v.name for v in self.ready()] == sorted(v.name for v in self.engines.values() if v.is_ready)
        assert len(self.live) <= MOST_LIVE
        assert len(self._stories) <= MOST_STORIES
        self._prices.validate()
        if self.prefixes is not None:
            self.prefixes.validate()

    def story(self, request_id: str) -> list[str]:
        """What this router did with one of the last few thousand requests."""
        told = self._stories.get(request_id, ())
        return [f"{now:.3f} {what}" + (f", {chosen.reason}" if chosen else "") for now, what, chosen in told]

    def _report(self, load: EngineLoad, reported_s: float, alive: bool, now: float) -> None:
        view = self.engines.get(load.engine)
        if view is None:
            view = EngineView(load.engine, load, reported_s, alive, drained=load.engine in self.drained)
            self.engines[load.engine] = view
        if load.incarnation != view.load.incarnation and self.prefixes is not None:
            self.prefixes.forget(load.engine)
        for request_id in load.request_ids:
            if request_id not in self.live:
                self._runs(request_id, load.engine, reported_s, view.pending.get(request_id))
        known = (self.live[i] for i in load.request_ids if i in self.live)
        view.take(load, reported_s, alive, known, self._decoded)
        if view.pending or view.expected:
            view.drop_older(max(reported_s - DATE_MARGIN_S, now - UNSEEN_S))
            view.drop_pending([i for i in load.request_ids if i in view.pending])
        self._list_near(view)

    def _list_near(self, view: EngineView) -> None:
        found = _found_at(view)
        for version in view.listed - found:
            self._unlist(view, version)
        for version in found - view.listed:
            self._list(view, version)
        view.listed = found

    def _list(self, view: EngineView, version: str) -> None:
        self._near.setdefault(version, {})[view.name] = view
        view.listed.add(version)

    def _unlist(self, view: EngineView, version: str) -> None:
        views = self._near[version]
        del views[view.name]
        if not views:
            del self._near[version]

    def _forget(self, name: str) -> None:
        view = self.engines.pop(name)
        for version in view.listed:
            self._unlist(view, version)
        if self.prefixes is not None:
            self.prefixes.forget(name)

    def _pending(self, engine: str, request: Route, now: float) -> Pending:
        tokens = len(request.prompt_tokens)
        if self.prefixes is not None:
            tokens -= self.prefixes.cached_tokens(request).get(engine, 0)
            self.prefixes.sent(engine, request)
        if request.adapter is None:
            return Pending(tokens, "", now)
        return Pending(tokens, request.adapter.version, now, request.adapter.rank, request.adapter.slab_bytes)

    def _runs(self, request_id: str, engine: str, since_s: float, pending: Pending | None) -> None:
        """Its adapter is known for as long as it runs, if this router sent it."""
        if pending is not None:
            self.live[request_id] = Live(engine, since_s, pending.version, pending.rank)
        else:
            before = self.live.get(request_id)
            self.live[request_id] = (
                Live(engine, since_s, before.version, before.rank) if before else Live(engine, since_s)
            )
        if len(self.live) > MOST_LIVE:
            del self.live[next(iter(self.live))]

    def _drop_ended(self) -> None:
        """Forget where requests were that their engine, reporting later, no longer has."""
        running = {name: set(view.load.request_ids) for name, view in self.engines.items()}
        for request_id, live in list(self.live.items()):
            view = self.engines.get(live.engine)
            later = view is not None and live.since_s < view.reported_s - DATE_MARGIN_S
            if view is None or not view.alive or (later and request_id not in running[live.engine]):
                del self.live[request_id]

    def _tell(self, request_id: str, now: float, what: str, chosen: Explained | None = None) -> None:
        if request_id not in self._stories and len(self._stories) >= MOST_STORIES:
            del self._stories[next(iter(self._stories))]
        self._stories.setdefault(request_id, []).append((now, what, chosen))


_NO_ENGINES: Mapping[str, EngineView] = {}
_NO_TOKENS: Mapping[str, int] = {}


def _found_at(view: EngineView) -> set[str]:
    """Versions that requests may find something of there."""
    return view.pending_mix.versions.union(view.resident, view.loading, view.active, view.expected)
