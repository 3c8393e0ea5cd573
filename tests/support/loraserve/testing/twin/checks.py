"""Judges a run: the texts that clients got, the errors that faults explain, and what must hold once all is settled."""

from typing import TYPE_CHECKING, Any, NamedTuple

from loraserve.engine.service import EngineService
from loraserve.gateway.service import GatewayService
from loraserve.monitor.service import MonitorService
from loraserve.planner.rollout.machine import Phase
from loraserve.planner.service import PlannerService
from loraserve.router.service import RouterService
from loraserve.service import ServiceState
from loraserve.testing.twin.model import true_answer
from loraserve.testing.twin.schedule import (
    ENGINES,
    Ask,
    BadStore,
    Cut,
    Disturb,
    Fault,
    Kill,
    Pause,
    Schedule,
    Stop,
    fault_end_s,
)

if TYPE_CHECKING:
    from loraserve.testing.twin.cluster import Cluster

GRACE_S = 3.0
"""A process counts as disturbed for this time after its fault: it starts, and others have to learn that it is back."""


class Outcome(NamedTuple):
    """What a run found. ``ended_s`` is in virtual seconds. ``trace`` is equal for runs that went equally."""

    violations: tuple[str, ...]
    answers: int
    ended_s: float
    trace: int


class Answer:
    """What one client got. ``outcome`` is "ok", "left", "killed" (with the gateway) or the code of the error."""

    def __init__(self, number: int, ask: Ask, asked_s: float) -> None:
        self.number = number
        self.ask = ask
        self.asked_s = self.accepted_s = asked_s
        self.ended_s = 0.0
        self.text = ""
        self.finish: str | None = None
        self.outcome = ""
        self.message = ""
        self.truth = true_answer(ask.adapter, ask.prompt, ask.sampling)
        self.true_text = "".join(f"{token} " for token in self.truth.shown)

    def end(self, outcome: str, now: float, message: str = "") -> None:
        """Record the end. Only the first call counts."""
        if not self.outcome and outcome:
            self.outcome, self.ended_s, self.message = outcome, now, message

    def describe(self) -> str:
        got = len(self.text.split())
        end = f"{self.outcome or 'no end'} at {self.ended_s:.3f} s"
        return (
            f"request {self.number} asked at {self.asked_s:.3f} s (adapter {self.ask.adapter or 'none'}): "
            f"{end} after {got} of {len(self.truth.shown)} tokens {self.message}"
        )


def judge_text(answer: Answer, violations: list[str]) -> None:
    """Check that the text so far begins the true text, so that no token is wrong, missing or there twice."""
    if not answer.true_text.startswith(answer.text):
        violations.append(f"wrong text: {answer.describe()}: {answer.text!r} instead of {answer.true_text!r}")


def judge_answers(answers: list[Answer], schedule: Schedule, violations: list[str]) -> None:
    for answer in answers:
        if answer.outcome == "ok" and (answer.text, answer.finish) != (answer.true_text, answer.truth.finish):
            violations.append(f"wrong end: {answer.describe()}: {answer.finish} instead of {answer.truth.finish}")
        elif answer.outcome not in ("", "ok", "left") and not _is_explained(answer, schedule.faults, schedule.engines):
            violations.append(f"error: {answer.describe()}")


def _is_explained(answer: Answer, faults: tuple[Fault, ...], engines: int) -> bool:
    """Return whether a fault explains an error, even though other engines could have answered."""
    from_s, to_s = answer.asked_s - GRACE_S, answer.ended_s

    def during(kind: Any) -> list[Any]:
        return [f for f in faults if isinstance(f, kind) and f.at_s <= to_s and fault_end_s(f) + GRACE_S >= from_s]

    match answer.outcome:
        case "killed":
            return any(kill.process == "gateway-0" for kill in during(Kill))
        case "shutting_down":
            return any(stop.process == "gateway-0" for stop in during(Stop))
        case "request_quarantined":
            return sum(kill.process in ENGINES for kill in during(Kill)) >= 2
        case "adapter_unavailable":
            return any(bad.fails for bad in during(BadStore))
        case "no_store":
            return bool([f for f in during(Fault) if "store" in touched(f)])
        case "no_engine":
            disturbed = {name for fault in during(Fault) for name in touched(fault)}
            return disturbed >= set(ENGINES[:engines])
        case _:
            return False


def touched(fault: Fault) -> set[str]:
    """Return the processes that a fault disturbs."""
    match fault:
        case Kill() | Stop() | Pause():
            return {fault.process}
        case Disturb():
            return {fault.sender, fault.receiver}
        case Cut():
            return {fault.process, *fault.others}
        case BadStore():
            return {"store"}
        case _:
            return set()


def unsettled(cluster: "Cluster") -> list[str]:
    """Return what is left of requests and faults. Raises nothing: a broken invariant is reported like the rest."""
    left: list[str] = []
    for name in cluster.names:
        running = cluster.running.get(name)
        if running is None or running.service.state is not ServiceState.READY:
            left.append(f"{name} is not ready")
            continue
        try:
            _check_service(cluster, running.service)
        except AssertionError as error:
            left.append(f"{name}: {error}")
    return left


def _check_service(cluster: "Cluster", service: Any) -> None:
    match service:
        case EngineService():
            _check_engine(service, cluster)
        case GatewayService():
            streams = service.gateway.streams
            streams.validate()
            assert not len(streams), f"{len(streams)} streams are left"
            assert not service.gateway.trial.locked(), "a suspect is still tried"
        case RouterService():
            view = service._view
            view.validate()
            assert not service._routing, "requests are still routed"
            ready = [engine.name for engine in view.ready_engines()]
            assert ready == list(ENGINES[: cluster.schedule.engines]), f"only {ready} are ready"
        case MonitorService():
            service._copies.validate()
            assert len(service._alive) == cluster.schedule.engines, f"only {sorted(service._alive)} are alive"
        case PlannerService():
            service._rollout.validate()
            assert service._rollout.phase is Phase.IDLE, "a roll-out is under way"
        case _:
            lost = cluster.registered - service._store.registry.snapshot.records.keys()
            assert not lost, f"registered adapters were lost: {lost}"


def _check_engine(engine: EngineService, cluster: "Cluster") -> None:
    scheduler, lender = engine._scheduler, engine._adapters.lender
    scheduler.validate()
    lender.validate()
    engine._adapters.cache.validate()
    assert scheduler.is_idle, f"requests are left: {scheduler.load().queue.request_ids}"
    assert scheduler.blocks.free == scheduler.limits.kv_blocks, "KV blocks are in use"
    leases = sum(len(region.leases) for region in lender._regions)
    assert not leases, f"{leases} leases are held"
    entries = list(scheduler.residency.pool.entries())
    assert all(entry.is_complete and not entry.running for entry in entries), "an adapter is loading or in use"
    assert not engine._leaks, f"{engine._leaks} leaks were counted"
    plan = cluster.disk.plan
    planned = {copy.version for copy in plan.placements if copy.engine == engine.bus.name} if plan else set()
    pinned = {entry.adapter.version for entry in entries if entry.planned}
    assert pinned <= planned, "an adapter is pinned that is not in the plan"
