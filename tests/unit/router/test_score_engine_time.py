"""How the engine time of a request decides: mixed ranks, slabs that are read anyway, cached prefixes."""

from random import Random

import msgspec
import pytest

from loraserve.cost import CostModel
from loraserve.messages import AdapterRef, EngineSeen, Placement, Plan, Route
from loraserve.router.context import Candidate, Candidates, PlannedCopies, RoutingContext, Slo
from loraserve.router.policy import route_by_prediction
from loraserve.router.prefixes import BLOCK_TOKENS
from loraserve.router.score import score
from loraserve.router.view import ClusterView
from loraserve.testing.reports import MIB, adapter_ref, engine_seen, picture, resident, route_request

SLO = Slo(ttft_s=100.0, reject_factor=4.0)
LOW = adapter_ref(8, rank=8)
HIGH = adapter_ref(128, rank=128)
OTHER_HIGH = adapter_ref(129, rank=128)
PADDED = CostModel(lora="padded")
EXACT = CostModel(lora="exact", slab_byte_s=1e-9)


def view_of(*loads: EngineSeen) -> ClusterView:
    view = ClusterView()
    view.update(picture(*loads), now=100.0)
    return view


def engine(name: str, *adapters: AdapterRef, running: int = 0, queue: int = 0, pinned: bool = False) -> EngineSeen:
    """Return an engine with all adapters of these tests; each of ``adapters`` has ``running`` requests."""
    held = tuple(
        resident(a, pinned and a in adapters, running if a in adapters else 0) for a in (LOW, HIGH, OTHER_HIGH)
    )
    return engine_seen(name, running=running * len(adapters), waiting_prefill_tokens=queue, resident=held)


def best(view: ClusterView, request: Route, cost: CostModel, plan: PlannedCopies | None = None) -> Candidate:
    choice = route_by_prediction(RoutingContext(request, view, plan, cost, SLO, Random(1)))
    assert isinstance(choice, Candidates)
    return choice.first


@pytest.mark.parametrize("queue", [0, 2, 4])
def test_padded_a_high_rank_avoids_low_ranks_if_another_engine_is_nearly_as_free(queue: int) -> None:
    view = view_of(engine("e0", LOW, running=8), engine("e1", HIGH, running=8, queue=queue))
    assert best(view, route_request(adapter=HIGH), PADDED).engine == "e1"


def test_padded_a_high_rank_joins_low_ranks_if_the_high_rank_engine_is_far_behind() -> None:
    view = view_of(engine("e0", LOW, running=8), engine("e1", HIGH, running=8, queue=5000))
    assert best(view, route_request(adapter=HIGH), PADDED).engine == "e0"


def test_padded_a_low_rank_avoids_high_ranks() -> None:
    view = view_of(engine("e0", HIGH, running=8), engine("e1", LOW, running=8, queue=4))
    view.mean_output_tokens = 500.0
    request = route_request(adapter=LOW)
    long = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, max_tokens=1000))
    assert best(view, long, PADDED).engine == "e1"


def test_padded_the_ranks_of_pending_requests_count() -> None:
    view = view_of(engine("e0", LOW, running=4), engine("e1", LOW, running=4))
    view.record_sent("e1", route_request("r0", tokens=1, adapter=HIGH), now=100.0)
    assert best(view, route_request("r1", adapter=HIGH), PADDED).engine == "e1"
    assert best(view, route_request("r2", adapter=LOW), PADDED).engine == "e0"


def test_padded_the_ranks_of_waiting_requests_stay_known_after_a_report() -> None:
    view = view_of(engine("e0", LOW, running=4), engine("e1", LOW, running=4))
    view.record_sent("e1", route_request("r0", tokens=1, adapter=HIGH), now=100.0)
    held = tuple(resident(a, running=4 if a == LOW else 0) for a in (LOW, HIGH))
    waits = engine_seen("e1", running=4, waiting=1, waiting_prefill_tokens=1, resident=held, request_ids=("r0",))
    view.update(picture(engine("e0", LOW, running=4), waits, sequence=2), now=100.2)
    assert not view.engines["e1"].pending
    assert best(view, route_request("r1", adapter=HIGH), PADDED).engine == "e1"


def test_padded_a_high_rank_avoids_an_idle_engine_planned_for_low_ranks() -> None:
    busy = engine("e2", LOW, running=8)
    view = view_of(engine("e0", LOW, pinned=True), engine("e1", HIGH, pinned=True, queue=2), busy)
    assert best(view, route_request(adapter=OTHER_HIGH), PADDED).engine == "e1"
    far = view_of(engine("e0", LOW, pinned=True), engine("e1", HIGH, pinned=True, queue=5000), busy)
    assert best(far, route_request(adapter=OTHER_HIGH), PADDED).engine == "e0"


def test_exact_ranks_do_not_affect_each_other() -> None:
    view = view_of(engine("e0", LOW, running=8), engine("e1", HIGH, running=8, queue=100))
    assert best(view, route_request(adapter=OTHER_HIGH), EXACT).engine == "e0"


def test_exact_a_slab_that_is_read_anyway_costs_nothing() -> None:
    heavy = adapter_ref(1, rank=8, slab_bytes=16 * MIB)
    other = adapter_ref(2, rank=8, slab_bytes=16 * MIB)
    loads = [
        engine_seen(f"e{n}", running=1, resident=(resident(heavy, running=n), resident(other, running=1 - n)))
        for n in range(2)
    ]
    assert best(view_of(*loads), route_request(adapter=heavy), EXACT).engine == "e1"
    assert best(view_of(*loads), route_request(adapter=other), EXACT).engine == "e0"


def test_a_request_follows_its_cached_prefix_until_the_queue_outweighs_the_saving() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=50))
    view.record_sent("e1", route_request("r0", tokens=4 * BLOCK_TOKENS), now=99.0)
    view.expire_pending(now=101.0)
    follows = best(view, route_request("r1", tokens=4 * BLOCK_TOKENS + 9), EXACT)
    assert (follows.engine, follows.why) == ("e1", "prefix")
    view.update(picture(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=2000), sequence=2), now=101.0)
    leaves = best(view, route_request("r2", tokens=4 * BLOCK_TOKENS + 9), EXACT)
    assert (leaves.engine, leaves.why) == ("e0", "base")


def test_a_cached_prefix_counts_for_more_on_a_full_engine() -> None:
    """Saved engine time is time for waiting requests."""
    saved = []
    for free in (1000, 50):
        view = view_of(engine_seen("e0", kv_blocks_free=free), engine_seen("e1", kv_blocks_free=free))
        view.record_sent("e1", route_request("r0", tokens=4 * BLOCK_TOKENS), now=99.0)
        view.expire_pending(now=101.0)
        request = route_request("r1", tokens=4 * BLOCK_TOKENS + 9)
        scores = score(RoutingContext(request, view, None, EXACT, SLO, Random(0)), view.prices(EXACT), {})
        saved.append(scores.score[0] - scores.score[1])
    assert saved[1] > 2 * saved[0]


def test_a_cached_prefix_that_does_not_decide_is_not_the_reason() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=500))
    view.record_sent("e0", route_request("r0", tokens=4 * BLOCK_TOKENS), now=99.0)
    view.expire_pending(now=101.0)
    assert best(view, route_request("r1", tokens=4 * BLOCK_TOKENS), EXACT).why == "base"


def test_without_a_prefix_cache_prefixes_do_not_count() -> None:
    view = ClusterView(prefix_cache=False)
    view.update(picture(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=50)), now=100.0)
    view.record_sent("e1", route_request("r0", tokens=4 * BLOCK_TOKENS), now=99.0)
    view.expire_pending(now=101.0)
    assert best(view, route_request("r1", tokens=4 * BLOCK_TOKENS + 9), EXACT).engine == "e0"


def test_a_restarted_engine_has_no_cached_prefixes() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=50))
    view.record_sent("e1", route_request("r0", tokens=4 * BLOCK_TOKENS), now=100.0)
    fresh = engine_seen("e1", waiting_prefill_tokens=50, incarnation="i2")
    view.update(picture(engine_seen("e0"), fresh, sequence=2), now=100.1)
    assert best(view, route_request("r1", tokens=4 * BLOCK_TOKENS + 9), EXACT).engine == "e0"


def test_cached_tokens_do_not_count_as_pending_prefill() -> None:
    view = view_of(engine_seen("e0"))
    view.record_sent("e0", route_request("r0", tokens=2 * BLOCK_TOKENS), now=100.0)
    view.record_sent("e0", route_request("r1", tokens=2 * BLOCK_TOKENS + 7), now=100.0)
    assert view.engines["e0"].pending_tokens == 2 * BLOCK_TOKENS + 7


def test_the_reason_names_the_parts_of_the_prediction() -> None:
    plan = Plan(
        epoch=1,
        created_unix_s=0.0,
        placements=(Placement(version=LOW.version, name=LOW.name, engine="e0", share=1.0),),
    )
    view = view_of(engine("e0", HIGH, running=8, queue=500), engine("e1", HIGH, queue=9000))
    chosen = best(view, route_request(adapter=LOW), PADDED, PlannedCopies(plan))
    parts = chosen.prediction
    assert parts is not None
    assert chosen.predicted_s == pytest.approx(max(parts.queue_s, parts.load_s) + parts.own_s)
    assert 0 < parts.step_s < parts.own_s
    assert parts.engine_s > 0
    assert chosen.reason.startswith(f"planned: first token in {chosen.predicted_s:.3f} s (queue {parts.queue_s:.3f}")
    view.record_sent("e0", route_request("r9", adapter=LOW), 100.0, chosen.reason)
    assert view.story.lines("r9") == [f"100.000 sent to e0, {chosen.reason}"]
