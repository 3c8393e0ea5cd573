"""What the router believes about the cluster right now. Pure.

The monitor's last picture, plus what this router has done since: a burst between two pictures must not all go to the
engine that looked best in the first. Where the monitor is silent the last picture stays, and the router goes by its own
evidence: engines that did not answer are asked last.
"""

from collections.abc import Iterable

import msgspec

from loraserve.cost import extent_bytes, largest_extent_bytes
from loraserve.messages import ClusterLoad, EngineLoad, Route

UNSEEN_S = 1.0
"""A request that no report mentions this long after it was sent has ended, or never began."""
DATE_MARGIN_S = 0.05
"""A report is dated from its age when published; the way from there to here takes time too."""
FORGET_MISSING_S = 5.0
"""A monitor that has just started has not heard of every engine yet."""
TIMEOUTS_TO_AVOID = 2
FIRST_AVOIDANCE_S = 0.5
LONGEST_AVOIDANCE_S = 8.0
MOST_LIVE = 50_000
MOST_STORIES = 5_000
DEFAULT_OUTPUT_TOKENS = 64.0


class Pending(msgspec.Struct, frozen=True):
    """A request this router sent to an engine and no report has counted yet."""

    tokens: int
    version: str
    since_s: float


class Live(msgspec.Struct, frozen=True):
    """Where a request runs."""

    engine: str
    since_s: float


class EngineView(msgspec.Struct):
    """One engine: its report in the form in which requests are priced, and what came on top."""

    name: str
    load: EngineLoad
    reported_s: float
    alive: bool
    resident: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()
    largest_extent_bytes: int = 0
    room_bytes: int = 0
    """Of the pool, for a request's adapter: what is free, and what only the plan pins."""
    pending: dict[str, Pending] = msgspec.field(default_factory=dict)
    pending_tokens: int = 0
    timeouts: int = 0
    avoided_since_s: float | None = None
    avoidance_s: float = 0.0

    @property
    def requests(self) -> int:
        return self.load.running + self.load.waiting + len(self.pending)

    def fetches(self, version: str) -> bool:
        """On its way already, or asked for by a request just sent there."""
        return version in self.loading or any(p.version == version for p in self.pending.values())

    def take(self, load: EngineLoad, reported_s: float, alive: bool) -> None:
        """A report. Of another incarnation it makes all that was known of the engine void."""
        if load.incarnation != self.load.incarnation:
            self.pending, self.pending_tokens = {}, 0
            self.timeouts, self.avoided_since_s, self.avoidance_s = 0, None, 0.0
        self.load, self.reported_s, self.alive = load, reported_s, alive
        self.resident = frozenset(adapter.version for adapter in load.resident)
        self.loading = frozenset(load.loading)
        self.largest_extent_bytes = largest_extent_bytes(load.pool_total_bytes)
        only_planned = (extent_bytes(a.slab_bytes) for a in load.resident if a.pinned and not a.running)
        self.room_bytes = load.pool_free_bytes + sum(only_planned)
        if alive and self.avoided_since_s is not None and reported_s >= self.avoided_since_s + self.avoidance_s:
            # One more timeout and it is avoided again, for longer: reports alone do not prove that it serves.
            self.avoided_since_s, self.timeouts = None, TIMEOUTS_TO_AVOID - 1

    def drop_pending(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            gone = self.pending.pop(request_id, None)
            self.pending_tokens -= gone.tokens if gone else 0


class ClusterView:
    """Engines by name, where requests are, own evidence of engines that do not answer."""

    def __init__(self) -> None:
        self.engines: dict[str, EngineView] = {}
        self.live: dict[str, Live] = {}
        self.drained: frozenset[str] = frozenset()
        """Engines that the plan empties."""
        self.output_tokens = DEFAULT_OUTPUT_TOKENS
        """Mean output of a request lately."""
        self._picture: tuple[str, int] = ("", 0)
        self._ready: list[EngineView] = []
        self._stories: dict[str, list[str]] = {}

    def update(self, picture: ClusterLoad, now: float) -> bool:
        """A picture from the monitor; one that is older than the last changes nothing, which is False."""
        incarnation, sequence = self._picture
        if picture.incarnation == incarnation and picture.sequence <= sequence:
            return False
        self._picture = picture.incarnation, picture.sequence
        for seen in picture.engines:
            self._report(seen.load, now - seen.age_s, seen.alive, now)
        reported = {seen.load.engine for seen in picture.engines}
        for name in self.engines.keys() - reported:
            if now - self.engines[name].reported_s > FORGET_MISSING_S:
                del self.engines[name]
        self._drop_ended()
        requests_per_s = sum(demand.requests_per_s for demand in picture.demand)
        if requests_per_s > 0:
            self.output_tokens = max(1.0, sum(d.decode_tokens_per_s for d in picture.demand) / requests_per_s)
        self._list_ready()
        return True

    def ready(self) -> list[EngineView]:
        """Engines that take requests as far as is known, those that are avoided too; drained ones as a last resort."""
        if not self.drained:
            return self._ready
        return [view for view in self._ready if view.name not in self.drained] or self._ready

    def sent(self, engine: str, request: Route, now: float) -> None:
        """A request is on its way to an engine: from now on it counts as load there."""
        view = self.engines.get(engine)
        if view is not None:
            view.drop_pending([request.request_id])
            tokens = len(request.prompt_tokens)
            view.pending[request.request_id] = Pending(tokens, request.adapter.version if request.adapter else "", now)
            view.pending_tokens += tokens
        self._tell(request.request_id, now, f"sent to {engine}")

    def admitted(self, engine: str, request_id: str, incarnation: str, now: float) -> None:
        """The engine has it."""
        view = self.engines.get(engine)
        if view is not None:
            view.timeouts, view.avoided_since_s, view.avoidance_s = 0, None, 0.0
            if incarnation != view.load.incarnation:
                # It was restarted since its last report, so its pool is empty.
                view.resident = view.loading = frozenset()
        self._runs(request_id, engine, now)
        self._tell(request_id, now, f"admitted by {engine}")

    def refused(self, engine: str, request_id: str, code: str, now: float) -> None:
        """The engine did not take it."""
        if engine in self.engines:
            self.engines[engine].drop_pending([request_id])
        self._tell(request_id, now, f"refused by {engine}: {code}")

    def timed_out(self, engine: str, request_id: str, now: float) -> None:
        """The engine did not answer. After two in a row it is asked last, until a report shows that it lives."""
        self._tell(request_id, now, f"no answer from {engine}")
        view = self.engines.get(engine)
        if view is None:
            return
        view.drop_pending([request_id])
        view.timeouts += 1
        if view.timeouts >= TIMEOUTS_TO_AVOID and view.avoided_since_s is None:
            view.avoided_since_s = now
            view.avoidance_s = min(LONGEST_AVOIDANCE_S, max(FIRST_AVOIDANCE_S, 2 * view.avoidance_s))

    def expire(self, now: float) -> None:
        """Stop counting requests that no report has mentioned; cheap, to be called before each decision."""
        for view in self._ready:
            if view.pending and next(iter(view.pending.values())).since_s < now - UNSEEN_S:
                view.drop_pending([i for i, p in view.pending.items() if p.since_s < now - UNSEEN_S])

    def validate(self) -> None:
        """Sums agree with what they sum, tables stay bounded; raises AssertionError naming what broke."""
        for name, view in self.engines.items():
            assert view.name == name == view.load.engine, f"{name} is listed under another name"
            assert view.pending_tokens == sum(p.tokens for p in view.pending.values()), f"{name}: pending tokens"
            times = [p.since_s for p in view.pending.values()]
            assert times == sorted(times), f"{name}: pending requests are out of order"
            assert (view.avoided_since_s is None) or view.timeouts >= TIMEOUTS_TO_AVOID, (
                f"{name} is avoided without reason"
            )
        assert [v.name for v in self._ready] == sorted(v.name for v in self.engines.values() if _is_ready(v))
        assert len(self.live) <= MOST_LIVE
        assert len(self._stories) <= MOST_STORIES

    def story(self, request_id: str) -> list[str]:
        """What this router did with one of the last few thousand requests."""
        return list(self._stories.get(request_id, ()))

    def _report(self, load: EngineLoad, reported_s: float, alive: bool, now: float) -> None:
        view = self.engines.get(load.engine)
        if view is None:
            view = self.engines[load.engine] = EngineView(load.engine, load, reported_s, alive)
        view.take(load, reported_s, alive)
        counted = [i for i, p in view.pending.items() if p.since_s < max(reported_s - DATE_MARGIN_S, now - UNSEEN_S)]
        view.drop_pending([*counted, *(i for i in load.request_ids if i in view.pending)])
        for request_id in load.request_ids:
            if request_id not in self.live:
                self._runs(request_id, load.engine, reported_s)

    def _runs(self, request_id: str, engine: str, since_s: float) -> None:
        self.live[request_id] = Live(engine, since_s)
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

    def _list_ready(self) -> None:
        self._ready = [view for _, view in sorted(self.engines.items()) if _is_ready(view)]

    def _tell(self, request_id: str, now: float, what: str) -> None:
        if request_id not in self._stories and len(self._stories) >= MOST_STORIES:
            del self._stories[next(iter(self._stories))]
        self._stories.setdefault(request_id, []).append(f"{now:.3f} {what}")


def _is_ready(view: EngineView) -> bool:
    return view.alive and view.load.state == "READY"
