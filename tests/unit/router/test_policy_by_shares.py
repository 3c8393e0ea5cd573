"""Routing by shares, which ignores queues."""

from collections import Counter
from random import Random

import pytest

from loraserve.cost import CostModel
from loraserve.messages import EngineSeen, Placement, Plan, Rejected, Route
from loraserve.router.context import Candidates, PlannedCopies, RoutingContext, Slo
from loraserve.router.engine_view import TIMEOUTS_TO_AVOID
from loraserve.router.policy import POLICIES
from loraserve.router.view import ClusterView
from loraserve.testing.reports import MIB, adapter_ref, engine_seen, picture, resident, route_request

PIRATE = adapter_ref(1)
HELD = {"resident": (resident(PIRATE),)}
SLO = Slo(ttft_s=1.0, reject_factor=1.0)
ROUNDS = 2000


def view_of(*loads: EngineSeen) -> ClusterView:
    view = ClusterView()
    view.update(picture(*loads), now=100.0)
    return view


def plan_of(**shares: float) -> PlannedCopies:
    copies = (Placement(version=PIRATE.version, name=PIRATE.name, engine=e, share=s) for e, s in shares.items())
    return PlannedCopies(Plan(epoch=1, created_unix_s=0.0, placements=tuple(copies)))


def drawn(view: ClusterView, plan: PlannedCopies | None, request: Route | None = None) -> Counter[tuple[str, str]]:
    """Return how often each engine was the first candidate, by its reason."""
    rng, counts = Random(3), Counter[tuple[str, str]]()
    for _ in range(ROUNDS):
        choice = POLICIES["shares"](
            RoutingContext(request or route_request(adapter=PIRATE), view, plan, CostModel(), SLO, rng)
        )
        assert isinstance(choice, Candidates)
        assert len({c.engine for c in tuple(choice)}) == len(tuple(choice))
        counts[choice.first.engine, choice.first.why] += 1
    return counts


def test_copies_are_drawn_in_proportion_to_their_shares_regardless_of_queues() -> None:
    view = view_of(*(engine_seen(f"e{n}", waiting_prefill_tokens=n * 50_000, **HELD) for n in range(4)))
    counts = drawn(view, plan_of(e0=0.2, e1=0.1, e2=0.7))
    assert set(counts) == {("e0", "planned"), ("e1", "planned"), ("e2", "planned")}
    for engine, share in (("e0", 0.2), ("e1", 0.1), ("e2", 0.7)):
        # Four standard deviations.
        assert counts[engine, "planned"] / ROUNDS == pytest.approx(share, abs=4 * (share * (1 - share) / ROUNDS) ** 0.5)


def test_a_request_may_be_routed_to_a_planned_copy_that_is_not_loaded() -> None:
    view = view_of(engine_seen("e0", **HELD), engine_seen("e1"))
    assert drawn(view, plan_of(e1=1.0)) == {("e1", "spill"): ROUNDS}
    assert drawn(view_of(engine_seen("e0"), engine_seen("e1")), plan_of(e1=1.0)) == {("e1", "load"): ROUNDS}


def test_without_a_ready_planned_copy_any_engine_is_drawn() -> None:
    loads = [engine_seen("e0", state="DRAINING", **HELD), engine_seen("e1"), engine_seen("e2")]
    for plan in (plan_of(e0=1.0), plan_of(gone=1.0), None):
        counts = drawn(view_of(*loads), plan)
        assert set(counts) == {("e1", "load"), ("e2", "load")}
        assert min(counts.values()) > ROUNDS / 2 - 4 * (ROUNDS / 4) ** 0.5


def test_base_model_requests_are_drawn_uniformly() -> None:
    counts = drawn(view_of(*(engine_seen(f"e{n}") for n in range(2))), plan_of(e0=1.0), route_request())
    assert set(counts) == {("e0", "base"), ("e1", "base")}


def test_silent_engines_are_asked_last_and_the_running_engine_first() -> None:
    view = view_of(engine_seen("e0", **HELD), engine_seen("e1"), engine_seen("e2", request_ids=("r7",)))
    for number in range(TIMEOUTS_TO_AVOID):
        view.record_timeout("e0", f"lost{number}", now=100.0)
    counts = drawn(view, plan_of(e0=1.0))
    assert {engine for engine, _ in counts} == {"e1", "e2"}
    assert drawn(view, plan_of(e0=1.0), route_request("r7", adapter=PIRATE)) == {("e2", "live"): ROUNDS}


def test_a_request_never_goes_to_an_engine_whose_pool_is_too_small() -> None:
    large = adapter_ref(1, slab_bytes=5 * MIB)
    small, fits = engine_seen("e0", pool_bytes=4 * MIB), engine_seen("e1", pool_bytes=8 * MIB)
    assert {e for e, _ in drawn(view_of(small, fits), plan_of(e0=1.0), route_request(adapter=large))} == {"e1"}
    for view, code in ((view_of(small), "adapter_unavailable"), (ClusterView(), "no_engine")):
        answer = POLICIES["shares"](
            RoutingContext(route_request(adapter=large), view, None, CostModel(), SLO, Random(0))
        )
        assert isinstance(answer, Rejected)
        assert answer.code == code
