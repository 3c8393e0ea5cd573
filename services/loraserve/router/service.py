"""The router process: a request in, an engine that has taken it out."""

from contextlib import AsyncExitStack
from random import Random

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.cost import CostModel
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import Abort, Admit, Admitted, ClusterLoad, Plan, Rejected, Route, Routed, ToRouter
from loraserve.router.policy import Candidate, Slo, route
from loraserve.router.view import ClusterView
from loraserve.service import Service

ANOTHER_MAY_TAKE_IT = ("overloaded", "draining", "starting", "unreachable")
"""Refusals that concern the engine, not the request."""


class RouterService(Service):
    """Holds the view of the cluster and the last plan; each request is admitted in a task of its own."""

    inbox = ToRouter

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._view = ClusterView()
        self._plan: Plan | None = None
        self._cost = CostModel()
        self._slo = Slo(config.router.slo_ttft_s, config.router.reject_factor)
        self._rng = Random(bus.incarnation)
        self._routed = self.metrics.counter("routed_total", "Requests given to an engine", ["engine", "why"])
        self._rejected = self.metrics.counter("rejected_total", "Requests refused", ["code"])

    async def start(self, stack: AsyncExitStack) -> None:
        self.bus.subscribe("monitor", "load")
        self.bus.subscribe("planner", "plan")

    def ready_detail(self) -> str:
        epoch = self._plan.epoch if self._plan else "none"
        return f"{len(self._view.engines(self.clock.monotonic_s()))} engines to choose from, plan epoch {epoch}"

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case Route() as request:
                self.spawn(self._route(envelope, request))
            case ClusterLoad() as picture:
                self._view.update(picture, self.clock.monotonic_s())
            case Plan() as plan:
                self._take_plan(plan)

    def _take_plan(self, plan: Plan) -> None:
        """Epochs only grow; a planner that lost its disk begins at 1 again and is followed after its restart."""
        if self._plan is None or plan.epoch != self._plan.epoch:
            self.log.info("plan", epoch=plan.epoch, copies=len(plan.placements))
        self._plan = plan

    async def _route(self, envelope: Envelope, request: Route) -> None:
        now = self.clock.monotonic_s()
        choice = route(request, self._view.engines(now), self._plan, self._cost, self._slo, self._rng)
        answer = choice if isinstance(choice, Rejected) else await self._admit_first(request, choice.candidates)
        if isinstance(answer, Rejected):
            self._rejected.labels(answer.code).inc()
            self.log.warning("rejected", request=request.request_id, code=answer.code, reason=answer.message)
        else:
            self._routed.labels(answer.engine, answer.why).inc()
        self.bus.respond(envelope, answer)

    async def _admit_first(self, request: Route, candidates: tuple[Candidate, ...]) -> Routed | Rejected:
        """The first engine that takes it. What no engine would take is not tried everywhere."""
        refusal = Rejected(request_id=request.request_id, code="no_engine", message="no engine answered; try again")
        for candidate in candidates:
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
        version = request.adapter.version if request.adapter else ""
        now = self.clock.monotonic_s()
        self._view.admitted(engine, request.request_id, len(request.prompt_tokens), version, now)
        admit = Admit(
            request_id=request.request_id,
            gateway=request.gateway,
            prompt_tokens=request.prompt_tokens,
            sampling=request.sampling,
            adapter=request.adapter,
        )
        try:
            answer = await self.bus.request(engine, admit, Admitted, self.config.router.admit_timeout_s)
        except RequestTimeout:
            self.log.warning("engine_silent", engine=engine, request=request.request_id)
            self._view.withdrawn(engine, request.request_id)
            self._view.did_not_answer(engine, self.clock.monotonic_s())
            # It may have the request all the same, and the next engine must be the only one that runs it.
            self.bus.send(engine, Abort(request_id=request.request_id))
            return None
        except PeerError as error:
            self._view.withdrawn(engine, request.request_id)
            return Rejected(request_id=request.request_id, code=error.code, message=error.message)
        if not answer.ok:
            self._view.withdrawn(engine, request.request_id)
            return Rejected(request_id=request.request_id, code=answer.code, message=answer.message)
        return Routed(request_id=request.request_id, engine=engine, incarnation=answer.incarnation, why=candidate.why)
