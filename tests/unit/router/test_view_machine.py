"""The view under any order of events: it stays consistent, and ends empty when all engines are idle."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraserve.cost import CostModel
from loraserve.router.engine_view import MAX_AVOIDANCE_S, TIMEOUTS_TO_AVOID
from loraserve.router.view import PENDING_TIMEOUT_S, ClusterView
from loraserve.testing.reports import adapter_ref, engine_seen, picture, resident, route_request

ENGINES = ("e0", "e1", "e2")
REQUESTS = tuple(f"r{n}" for n in range(6))
ADAPTERS = (None, adapter_ref(1), adapter_ref(2, rank=64))
COSTS = (CostModel(), CostModel(lora="padded"))
LONG_S = MAX_AVOIDANCE_S + PENDING_TIMEOUT_S

engines = st.sampled_from([*ENGINES, "stranger"])
requests = st.sampled_from(REQUESTS)


class ViewMachine(RuleBasedStateMachine):
    """Compares the view with a model that knows only the times of events."""

    def __init__(self) -> None:
        super().__init__()
        self.view = ClusterView()
        self.now = 100.0
        self.sequence = 0
        self.incarnations = dict.fromkeys(ENGINES, 1)
        self.timeouts: dict[str, int] = {}

    def incarnation(self, engine: str) -> str:
        return f"i{self.incarnations.get(engine, 1)}"

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.6, 3.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(engine=engines, request_id=requests, tokens=st.integers(1, 50), adapter=st.sampled_from(ADAPTERS))
    def send(self, engine: str, request_id: str, tokens: int, adapter) -> None:
        self.view.record_sent(engine, route_request(request_id, tokens, adapter), self.now)
        view = self.view.engines.get(engine)
        assert view is None or view.pending[request_id].tokens == tokens

    @rule(engine=st.sampled_from(ENGINES), version=st.sampled_from(["v1", "v2"]))
    def expect(self, engine: str, version: str) -> None:
        if engine in self.view.engines:
            self.view.record_expected(engine, version, self.now)
            assert self.view.engines[engine].has(version)

    @rule(engine=engines, request_id=requests)
    def admit(self, engine: str, request_id: str) -> None:
        self.view.record_admitted(engine, request_id, self.incarnation(engine), self.now)
        self.timeouts[engine] = 0
        assert self.view.running[request_id].engine == engine

    @rule(engine=engines, request_id=requests)
    def refuse(self, engine: str, request_id: str) -> None:
        self.view.record_refused(engine, request_id, "overloaded", self.now)
        assert engine not in self.view.engines or request_id not in self.view.engines[engine].pending

    @rule(engine=engines, request_id=requests)
    def time_out(self, engine: str, request_id: str) -> None:
        self.view.record_timeout(engine, request_id, self.now)
        self.timeouts[engine] = self.timeouts.get(engine, 0) + 1
        if engine in self.view.engines:
            assert request_id not in self.view.engines[engine].pending

    @rule(engine=st.sampled_from(ENGINES))
    def restart(self, engine: str) -> None:
        self.incarnations[engine] += 1

    @rule(cost=st.sampled_from(COSTS))
    def price(self, cost: CostModel) -> None:
        """Compute prices. Later changes of an engine must renew them, which ``validate`` checks."""
        table = self.view.prices(cost)
        assert [engine.name for engine in table.engines] == [view.name for view in self.view.ready_engines()]
        assert table.fallbacks == {view.column for view in self.view.ready_engines() if view.fallback_level}

    @rule(drained=st.sets(engines))
    def drain(self, drained: set[str]) -> None:
        self.view.set_drained(frozenset(drained))
        assert {name for name, view in self.view.engines.items() if view.drained} == drained & self.view.engines.keys()

    @rule()
    def expire(self) -> None:
        self.view.expire_pending(self.now)
        for view in self.view.ready_engines():
            assert self.now - view.oldest_s <= PENDING_TIMEOUT_S

    @rule(
        reporting=st.sets(st.sampled_from(ENGINES)),
        age_s=st.sampled_from([0.0, 0.02, 0.5, 2.0]),
        draining=st.sets(st.sampled_from(ENGINES), max_size=1),
        dead=st.sets(st.sampled_from(ENGINES), max_size=1),
        running=st.dictionaries(requests, st.sampled_from(ENGINES)),
        adapter=st.sampled_from(ADAPTERS),
    )
    def see(self, reporting, age_s, draining, dead, running, adapter) -> None:
        loads = [
            engine_seen(
                engine,
                incarnation=self.incarnation(engine),
                state="DRAINING" if engine in draining else "READY",
                request_ids=tuple(sorted(r for r, e in running.items() if e == engine)),
                resident=(resident(adapter, pinned=True),) if adapter else (),
            )
            for engine in sorted(reporting)
        ]
        self.sequence += 1
        self.view.update(picture(*loads, sequence=self.sequence, age_s=age_s, dead=dead), self.now)
        ready = {view.name for view in self.view.ready_engines()}
        assert ready & reporting == reporting - draining - dead
        for load in loads:
            assert not set(load.load.queue.request_ids) & self.view.engines[load.engine].pending.keys(), "counted twice"

    @precondition(lambda self: self.sequence)
    @rule()
    def see_again(self) -> None:
        before = [view.name for view in self.view.ready_engines()]
        gone = [engine_seen(engine, state="DRAINING") for engine in ENGINES]
        self.view.update(picture(*gone, sequence=self.sequence), self.now)
        assert [view.name for view in self.view.ready_engines()] == before

    @invariant()
    def consistent(self) -> None:
        self.view.validate()
        for name, view in self.view.engines.items():
            if view.avoided_since_s is not None:
                assert self.timeouts.get(name, 0) >= 1, "avoided without a timeout since its last answer"

    def teardown(self) -> None:
        """Check that the view is empty after all engines reported later that they are idle."""
        for _ in range(2):
            self.now += LONG_S
            self.sequence += 1
            idle = [engine_seen(e, incarnation=self.incarnation(e)) for e in ENGINES]
            self.view.update(picture(*idle, sequence=self.sequence), self.now)
        self.view.validate()
        assert [view.name for view in self.view.ready_engines()] == list(ENGINES)
        assert not self.view.running
        for view in self.view.ready_engines():
            assert not view.pending
            assert not view.expected
            assert view.avoided_since_s is None
            assert view.timeouts < TIMEOUTS_TO_AVOID


TestView = ViewMachine.TestCase
TestView.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
