"""The router process: it chooses an engine for each request and asks that engine to admit it."""

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
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
from loraserve.router.context import Candidate, PlannedCopies, RoutingContext, Slo
from loraserve.router.policy import POLICIES, placeholder_request, prefetch_engine
from loraserve.router.view import ClusterView
from loraserve.service import Service

FIRST_ENGINE_TIMEOUT_S = 5.0
"""A router knows no engine when it starts. For this time, requests wait until it has learned of one. The monitor's
first publication may not list them all, because the monitor may just have started too."""

ENGINE_REFUSALS = ("overloaded", "draining", "starting")
"""Codes with which an engine refuses a request that another engine may still admit."""


class RouterService(Service):
    """Routes each request in its own task, with the current view of the cluster and the last plan."""

    inbox = ToRouter

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._view = ClusterView(config.engine.prefix_cache)
        self.story = self._view.story
        self._policy = POLICIES[config.router.policy]
        self._plan: PlannedCopies | None = None
        self._plan_id = (0, 0.0)
        self._view_changed = asyncio.Event()
        self._learns_until_s = 0.0
        self._routing: dict[str, list[Envelope]] = {}
        """The unanswered questions about each request that is being routed."""
        self._learner = CostLearner(initial_cost_model(config))
        self._slo = Slo(config.router.slo_ttft_s, config.router.reject_factor)
        self._rng = Random(bus.incarnation)
        self._routed = self.metrics.counter("routed_total", "Requests given to an engine", ["engine", "why"])
        self._rejected = self.metrics.counter("rejected_total", "Requests refused", ["code"])

    async def start(self, stack: AsyncExitStack) -> None:
        self._learns_until_s = self.clock.monotonic_s() + FIRST_ENGINE_TIMEOUT_S
        self.bus.subscribe("monitor", "load")
        self.bus.subscribe("planner", "plan")

    def ready_detail(self) -> str:
        epoch = self._plan.epoch if self._plan else "none"
        return f"{len(self._view.ready_engines())} engines to choose from, plan epoch {epoch}"

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case Route() as request:
                self._answer_route(envelope, request)
            case Expect() as expect:
                self._prefetch(expect)
            case ClusterLoad() as snapshot:
                self._update_view(snapshot)
            case Plan() as plan:
                self._set_plan(plan)

    def _update_view(self, snapshot: ClusterLoad) -> None:
        if self._view.update(snapshot, self.clock.monotonic_s()):
            self._learner.learn((engine.load for engine in self._view.ready_engines()), self._view.engines)
        if self._view.ready_engines():
            self._learns_until_s = 0.0
        # Wakes all that wait now. Later ones wait for the next change.
        self._view_changed.set()
        self._view_changed.clear()

    def _set_plan(self, plan: Plan) -> None:
        # The planner publishes each plan repeatedly. The creation time is compared too, because a planner that lost its
        # disk starts again at epoch 1.
        if self._plan_id == (plan.epoch, plan.created_unix_s):
            return
        self._plan_id = plan.epoch, plan.created_unix_s
        self.log.info("plan", epoch=plan.epoch, copies=len(plan.placements), drained=plan.drained)
        self._plan = PlannedCopies(plan)
        self._view.set_drained(frozenset(plan.drained))

    def _context(self, request: Route) -> RoutingContext:
        return RoutingContext(request, self._view, self._plan, self._learner.cost, self._slo, self._rng)

    def _answer_route(self, envelope: Envelope, request: Route) -> None:
        """Route the request. A repeated question about a request that is being routed gets the same answer."""
        waiting = self._routing.setdefault(request.request_id, [])
        waiting.append(envelope)
        if len(waiting) == 1:
            self.spawn(self._route(request))

    async def _route(self, request: Route) -> None:
        try:
            answer = await self._choose_engine(request)
        except Exception:
            # The service refuses only the message that started this task.
            for envelope in self._routing.pop(request.request_id):
                self.bus.refuse(envelope, "internal", "the router failed; try again")
            raise
        for envelope in self._routing.pop(request.request_id):
            self.bus.respond(envelope, answer)

    async def _choose_engine(self, request: Route) -> Routed | Rejected:
        await self._wait_for_engines()
        self._view.expire_pending(self.clock.monotonic_s())
        choice = self._policy(self._context(request))
        answer = choice if isinstance(choice, Rejected) else await self._ask_candidates(request, choice)
        if isinstance(answer, Rejected):
            self._rejected.labels(answer.code).inc()
            self.log.warning("rejected", request=request.request_id, code=answer.code, reason=answer.message)
        else:
            self._routed.labels(answer.engine, answer.why).inc()
        return answer

    async def _wait_for_engines(self) -> None:
        """Wait until this router has learned of an engine, at most until it has run for FIRST_ENGINE_TIMEOUT_S."""
        while (left_s := self._learns_until_s - self.clock.monotonic_s()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._view_changed.wait()

    def _prefetch(self, expect: Expect) -> None:
        """Tell an engine to load the adapter of a request that will arrive soon. Only for the policy ``predicted``."""
        now = self.clock.monotonic_s()
        self._view.expire_pending(now)
        if self.config.router.policy != "predicted":
            return  # ``shares`` draws engines at random: the request may go elsewhere.
        engine = prefetch_engine(self._context(placeholder_request(expect)))
        if engine is not None:
            self._view.record_expected(engine, expect.adapter.version, now)
            self.bus.send(engine, ExpectAdapter(adapter=expect.adapter))

    async def _ask_candidates(self, request: Route, candidates: Iterable[Candidate]) -> Routed | Rejected:
        """Ask the candidates in turn until one admits the request or refuses with a code not in ``ENGINE_REFUSALS``."""
        refusal = Rejected(request_id=request.request_id, code="no_engine", message="no engine answered; try again")
        for candidate in candidates:
            if refusal.code == "overloaded" and candidate.engine in self._view.drained:
                break  # Drained engines replace lost engines, not overloaded ones: they have to become empty.
            answer = await self._ask_engine(request, candidate)
            if isinstance(answer, Routed):
                return answer
            if answer is not None:
                refusal = answer
                if answer.code not in ENGINE_REFUSALS:
                    return answer
        if refusal.code not in ("overloaded", "no_engine"):
            return Rejected(request_id=request.request_id, code="no_engine", message=refusal.message)
        return refusal

    async def _ask_engine(self, request: Route, candidate: Candidate) -> Routed | Rejected | None:
        """Ask one engine to admit the request. Return None if it does not answer."""
        engine, reason = candidate.engine, candidate.reason
        self._view.record_sent(engine, request, self.clock.monotonic_s(), reason)
        admit = Admit(
            request_id=request.request_id,
            gateway=request.gateway,
            prompt_tokens=request.prompt_tokens,
            sampling=request.sampling,
            adapter=request.adapter,
            generated=request.generated,
        )
        try:
            answer = await self.bus.request(engine, admit, Admitted, self.config.router.admit_timeout_s)
        except RequestTimeoutError:
            self.log.warning("engine_silent", engine=engine, request=request.request_id)
            self._view.record_timeout(engine, request.request_id, self.clock.monotonic_s())
            # The engine may have admitted the request. Abort it there, because another engine will run it.
            self.bus.send(engine, Abort(request_id=request.request_id))
            return None
        except PeerError as error:
            # The engine may have admitted the request before the error.
            self.bus.send(engine, Abort(request_id=request.request_id))
            return self._refuse(engine, request, error.code, error.message)
        if not answer.ok:
            return self._refuse(engine, request, answer.code, answer.message)
        self._view.record_admitted(engine, request.request_id, answer.incarnation, self.clock.monotonic_s())
        adapter = request.adapter.name if request.adapter else ""
        self.log.info(
            "routed", request=request.request_id, adapter=adapter, engine=engine, why=candidate.why, reason=reason
        )
        return Routed(request_id=request.request_id, engine=engine, incarnation=answer.incarnation, why=candidate.why)

    def _refuse(self, engine: str, request: Route, code: str, message: str) -> Rejected:
        self._view.record_refused(engine, request.request_id, code, self.clock.monotonic_s())
        return Rejected(request_id=request.request_id, code=code, message=message)
