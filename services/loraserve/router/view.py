"""What the router believes about the cluster right now. Pure.

The monitor's last picture, plus what this router has done since: a burst between two pictures must not all go to the
engine that looked best in the first. Where the monitor is silent the last picture stays.
"""

import msgspec

from loraserve.messages import ClusterLoad, EngineLoad

UNSEEN_S = 1.0
"""A request that no report mentions this long after it was admitted has ended, or never began."""
AVOIDED_S = 5.0


class Admitted(msgspec.Struct, frozen=True):
    """A request this router sent to an engine and no report has counted yet."""

    request_id: str
    prefill_tokens: int
    version: str
    at_s: float


class EngineView(msgspec.Struct, frozen=True):
    """One engine as of now: its report and what came on top."""

    load: EngineLoad
    pending: tuple[Admitted, ...]

    @property
    def waiting_prefill_tokens(self) -> int:
        return self.load.waiting_prefill_tokens + sum(a.prefill_tokens for a in self.pending)

    @property
    def requests(self) -> int:
        return self.load.waiting + self.load.running + len(self.pending)

    def holds(self, version: str) -> bool:
        return any(adapter.version == version for adapter in self.load.resident)

    def fetching(self, version: str) -> bool:
        """On its way already, or asked for by a request just sent there."""
        return version in self.load.loading or any(a.version == version for a in self.pending)


class ClusterView:
    """Engines by name, own admissions, own evidence of death."""

    def __init__(self) -> None:
        self._loads: dict[str, EngineLoad] = {}
        self._alive: set[str] = set()
        self._pending: dict[str, dict[str, Admitted]] = {}
        self._avoided: dict[str, tuple[str, float]] = {}

    def update(self, picture: ClusterLoad, now: float) -> None:
        """A new picture from the monitor. One without any engine (a monitor just restarted) changes nothing."""
        if not picture.engines:
            return
        known = {seen.load.engine for seen in picture.engines}
        for engine in self._loads.keys() - known:
            self._forget(engine)
        for seen in picture.engines:
            self._report(seen.load, seen.alive, now)

    def admitted(self, engine: str, request_id: str, prefill_tokens: int, version: str, now: float) -> None:
        """This router is sending a request there."""
        pending = self._pending.setdefault(engine, {})
        pending[request_id] = Admitted(request_id, prefill_tokens, version, now)

    def withdrawn(self, engine: str, request_id: str) -> None:
        """The engine did not take it after all."""
        self._pending.get(engine, {}).pop(request_id, None)

    def did_not_answer(self, engine: str, now: float) -> None:
        """Leave it alone until it shows a new incarnation or the pause is over: its reports may only be late."""
        load = self._loads.get(engine)
        if load is not None:
            self._avoided[engine] = (load.incarnation, now + AVOIDED_S)

    def engines(self, now: float) -> list[EngineView]:
        """Engines that may be asked, in order of name."""
        return [
            EngineView(self._loads[name], tuple(a for a in self._pending.get(name, {}).values()))
            for name in sorted(self._alive)
            if self._loads[name].state == "READY" and not self._is_avoided(name, now)
        ]

    def validate(self) -> None:
        """Own admissions and evidence concern known engines only."""
        assert self._alive <= self._loads.keys(), "an unknown engine is alive"
        assert self._avoided.keys() <= self._loads.keys(), "an unknown engine is avoided"

    def _report(self, load: EngineLoad, alive: bool, now: float) -> None:
        engine = load.engine
        before = self._loads.get(engine)
        self._loads[engine] = load
        (self._alive.add if alive else self._alive.discard)(engine)
        if before is not None and before.incarnation != load.incarnation:
            self._pending.pop(engine, None)
            self._avoided.pop(engine, None)
        counted = set(load.request_ids)
        self._pending[engine] = {
            request_id: admitted
            for request_id, admitted in self._pending.get(engine, {}).items()
            if request_id not in counted and now - admitted.at_s < UNSEEN_S
        }

    def _is_avoided(self, engine: str, now: float) -> bool:
        incarnation, until_s = self._avoided.get(engine, ("", 0.0))
        return incarnation == self._loads[engine].incarnation and now < until_s

    def _forget(self, engine: str) -> None:
        del self._loads[engine]
        self._alive.discard(engine)
        self._pending.pop(engine, None)
        self._avoided.pop(engine, None)
