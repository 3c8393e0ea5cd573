"""The router process: a request in, an engine that has taken it out."""

from collections.abc import Iterable
from contextlib import AsyncExitStack
from random import Random

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.cost import CostLearner
from loraserve.cost.profile import initial_cost_model
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import (
    Abort,
    Admit,
    Admitted,
    ClusterLoad,
    Expect,
    ExpectAdapter,
    Plan,
    Rejected,
    Route,
    Routed,
    ToRouter,
)
from loraserve.router.context import Candidate, PlannedCopies, Slo
from loraserve.router.policy import ROUTERS, expected_at
from loraserve.router.view import ClusterView
from loraserve.service import Service

ANOTHER_MAY_TAKE_IT = ("overloaded", "draining", "starting", "unreachable")
"""Refusals that concern the engine, not the request."""


class RouterService(Service):
    """Holds the view of the cluster and the last plan; each request is admitted in a task of its own."""

    inbox = ToRouter

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._view = ClusterView(config.engine.prefix_cache)
        self._choose = ROUTERS[config.router.policy]
        self._plan: PlannedCopies | None = None
        self._plan_of = (0, 0.0)
        """Epoch and date of the plan."""
        self._learner = CostLearner(initial_cost_model(config))
        self._slo = Slo(config.router.slo_ttft_s, config.router.reject_factor)
        self._rng = Random(bus.incarnation)
        self._routed = self.metrics.counter("routed_total", "Requests given to an engine", ["engine", "why"])
        self._rejected = self.metrics.counter("rejected_total", "Requests refused", ["code"])

    async def start(self, stack: AsyncExitStack) -> None:
        self.bus.subscribe("monitor", "load")
        self.bus.subscribe("planner", "plan")

    def ready_detail(self) -> str:
        epoch = self._plan.epoch if self._plan else "none"
        return f"{len(self._view.ready())} engines to choose from, plan epoch {epoch}"

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case Route() as request:
                self.spawn(self._route(envelope, request))
            case Expect() as expect:
                self._expect(expect)
            case ClusterLoad() as picture:
                self._take_picture(picture)
            case Plan() as plan:
                self._take_plan(plan)

    def _take_picture(self, picture: ClusterLoad) -> None:
        if self._view.update(picture, self.clock.monotonic_s()):
            self._learner.learn((engine.load for engine in self._view.ready()), self._view.engines)

    def _take_plan(self, plan: Plan) -> None:
        """Published again and again. A planner that lost its disk may begin at epoch 1 again, and is followed."""
        if self._plan_of == (plan.epoch, plan.created_unix_s):
            return
        self._plan_of = plan.epoch, plan.created_unix_s
        self.log.info("plan", epoch=plan.epoch, copies=len(plan.placements), drained=plan.drained)
        self._plan = PlannedCopies(plan)
        self._view.drain(frozenset(plan.drained))

    async def _route(self, envelope: Envelope, request: Route) -> None:
        self._view.expire(self.clock.monotonic_s())
        choice = self._choose(request, self._view, self._plan, self._learner.cost, self._slo, self._rng)
        answer = choice if isinstance(choice, Rejected) else await self._admit_first(request, choice)
        if isinstance(answer, Rejected):
            self._rejected.labels(answer.code).inc()
            self.log.warning("rejected", request=request.request_id, code=answer.code, reason=answer.message)
        else:
            self._routed.labels(answer.engine, answer.why).inc()
        self.bus.respond(envelope, answer)

    def _expect(self, expect: Expect) -> None:
        """Only where the request is sure to find what is on its way: a lot by shares is drawn anew."""
        now = self.clock.monotonic_s()
        self._view.expire(now)
        if self.config.router.policy != "predicted":
            return
        engine = expected_at(expect, self._view, self._plan, self._learner.cost, self._slo, self._rng)
        if engine is not None:
            self._view.expected(engine, expect.adapter.version, now)
            self.bus.send(engine, ExpectAdapter(adapter=expect.adapter))

    async def _admit_first(self, request: Route, candidates: Iterable[Candidate]) -> Routed | Rejected:
        """The first engine that takes it. What no engine would take is not tried everywhere."""
        refusal = Rejected(request_id=request.request_id, code="no_engine", message="no engine answered; try again")
        for candidate in candidates:
            if refusal.code == "overloaded" and candidate.engine in self._view.drained:
                break  # It is there for those that are lost, or under load it would never be empty.
            answer = await self._admit(request, candidate)
            if isinstance(answer, Routed):
                return answer
            if answer is not None:
                refusal = answer
                if answer.code not in ANOTHER_MAY_TAKE_IT:
                    return answer
        if refusal.code not in ("overloaded", "no_engine"):
            return Rejected(request_id=request.request_id, code="no_engine", message=refusal.message)
        return refusal

    async def _admit(self, request: Route, candidate: Candidate) -> Routed | Rejected | None:
        """None where the engine did not answer."""
        engine = candidate.engine
        self._view.sent(engine, request, self.clock.monotonic_s(), candidate)
        admit = Admit(
            request_id=request.request_id,
            gateway=request.gateway,
            prompt_tokens=request.prompt_tokens,
            sampling=request.sampling,
            adapter=request.adapter,
        )
        try:
            answer = await self.bus.request(engine, admit, Admitted, self.config.router.admit_timeout_s)
        except RequestTimeoutError:
            self.log.warning("engine_silent", engine=engine, request=request.request_id)
            self._view.timed_out(engine, request.request_id, self.clock.monotonic_s())
            # It may have the request all the same, and the next engine must be the only one that runs it.
            self.bus.send(engine, Abort(request_id=request.request_id))
            return None
        except PeerError as error:
            # It may have taken the request and failed to say so.
            self.bus.send(engine, Abort(request_id=request.request_id))
            return self._refused(engine, request, error.code, error.message)
        if not answer.ok:
            return self._refused(engine, request, answer.code, answer.message)
        self._view.admitted(engine, request.request_id, answer.incarnation, self.clock.monotonic_s())
        adapter = request.adapter.name if request.adapter else ""
        self.log.info(
            "routed",
            request=request.request_id,
            adapter=adapter,
            engine=engine,
            why=candidate.why,
            reason=candidate.reason,
        )
        return Routed(request_id=request.request_id, engine=engine, incarnation=answer.incarnation, why=candidate.why)

    def _refused(self, engine: str, request: Route, code: str, message: str) -> Rejected:
        self._view.refused(engine, request.request_id, code, self.clock.monotonic_s())
        return Rejected(request_id=request.request_id, code=code, message=message)
