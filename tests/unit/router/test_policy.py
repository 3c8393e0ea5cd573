"""Which engine a request goes to, and when it is refused."""

from collections import Counter
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.messages import EngineSeen, Placement, Plan, Rejected, Route
from loraserve.router.context import Candidate, Candidates, PlannedCopies, RoutingContext, Slo
from loraserve.router.engine_view import TIMEOUTS_TO_AVOID
from loraserve.router.policy import MAX_CANDIDATES, route_by_prediction
from loraserve.router.view import ClusterView
from loraserve.testing.reports import MIB, adapter_ref, engine_seen, picture, resident, route_request

SLO = Slo(ttft_s=10.0, reject_factor=4.0)
PIRATE = adapter_ref(1)
HELD = {"resident": (resident(PIRATE),)}


def view_of(*loads: EngineSeen) -> ClusterView:
    view = ClusterView()
    view.update(picture(*loads), now=100.0)
    return view


def plan_of(**shares: float) -> PlannedCopies:
    """Return a plan for PIRATE; e0=0.5 gives engine e0 half of its traffic."""
    copies = (Placement(version=PIRATE.version, name=PIRATE.name, engine=e, share=s) for e, s in shares.items())
    return PlannedCopies(Plan(epoch=1, created_unix_s=0.0, placements=tuple(copies)))


def decide(
    view: ClusterView, request: Route, plan: PlannedCopies | None = None, seed: int = 0, slo: Slo = SLO
) -> Candidates | Rejected:
    return route_by_prediction(RoutingContext(request, view, plan, CostModel(), slo, Random(seed)))


def candidates(view: ClusterView, request: Route | None = None, **options: Any) -> tuple[Candidate, ...]:
    choice = decide(view, request or route_request(), **options)
    assert isinstance(choice, Candidates), choice
    return tuple(choice)


def first(view: ClusterView, request: Route | None = None, **options: Any) -> tuple[str, str]:
    """Return engine and reason of the first candidate."""
    best = candidates(view, request, **options)[0]
    return best.engine, best.why


def refusal(view: ClusterView, request: Route, **options: Any) -> Rejected:
    answer = decide(view, request, **options)
    assert isinstance(answer, Rejected), answer
    assert answer.request_id == request.request_id
    return answer


def win_counts(view: ClusterView, request: Route, plan: PlannedCopies | None, rounds: int = 300) -> Counter[str]:
    """Return how often each engine is the first candidate, over many draws."""
    choices = (
        route_by_prediction(RoutingContext(request, view, plan, CostModel(), SLO, rng))
        for rng in [Random(7)]
        for _ in range(rounds)
    )
    return Counter(c.first.engine for c in choices if isinstance(c, Candidates))


def test_only_ready_engines_are_chosen() -> None:
    view = view_of(engine_seen("e0", state="STARTING"), engine_seen("e1", waiting_prefill_tokens=5000))
    assert [c.engine for c in candidates(view)] == ["e1"]
    assert refusal(ClusterView(), route_request()).code == "no_engine"
    assert refusal(view_of(engine_seen("e0", state="DRAINING")), route_request()).code == "no_engine"


def test_an_engine_that_failed_the_request_is_asked_only_if_no_other_is_ready() -> None:
    request = msgspec.structs.replace(route_request(), avoid=("e0", "e7"))
    both = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=5000))
    assert [c.engine for c in candidates(both, request)] == ["e1"]
    assert [c.engine for c in candidates(view_of(engine_seen("e0")), request)] == ["e0"]


def test_a_prompt_that_fills_every_context_is_refused_with_both_lengths() -> None:
    view = view_of(engine_seen("e0", max_model_tokens=100), engine_seen("e1", max_model_tokens=200))
    answer = refusal(view, route_request(tokens=200))
    assert answer.code == "context_length"
    assert "maximum context length is 200" in answer.message
    assert "prompt has 200" in answer.message


def test_a_long_prompt_goes_to_an_engine_with_room_for_one_more_token() -> None:
    view = view_of(engine_seen("e0", max_model_tokens=100), engine_seen("e1", max_model_tokens=101))
    assert [c.engine for c in candidates(view, route_request(tokens=100))] == ["e1"]


def test_an_adapter_goes_only_to_an_engine_whose_pool_can_hold_it() -> None:
    large = adapter_ref(9, slab_bytes=5 * MIB - 1)
    # Room for the slab is not enough: its extent is one byte larger.
    view = view_of(engine_seen("e0", pool_bytes=5 * MIB - 1), engine_seen("e1", pool_bytes=5 * MIB))
    assert [c.engine for c in candidates(view, route_request(adapter=large))] == ["e1"]
    answer = refusal(view_of(engine_seen("e0", pool_bytes=5 * MIB - 1)), route_request(adapter=large))
    assert answer.code == "adapter_unavailable"
    assert large.name in answer.message


def test_the_shorter_queue_wins_and_the_prediction_is_queue_plus_own_step() -> None:
    view = view_of(
        engine_seen("e0", running=1, waiting_prefill_tokens=3000), engine_seen("e1", waiting_prefill_tokens=500)
    )
    best, other = candidates(view)
    assert (best.engine, best.why) == ("e1", "base")
    assert 0.5 < best.predicted_s < 0.53
    assert other.predicted_s == pytest.approx(3.0, abs=0.1)


def test_the_faster_engine_wins_with_the_same_queue() -> None:
    slow = engine_seen("e0", waiting_prefill_tokens=1000, prefill_tokens_per_s=200.0)
    fast = engine_seen("e1", waiting_prefill_tokens=1000, prefill_tokens_per_s=2000.0)
    assert first(view_of(slow, fast))[0] == "e1"


def test_a_burst_between_two_pictures_is_shared() -> None:
    view = view_of(*(engine_seen(f"e{n}") for n in range(4)))
    given_to: Counter[str] = Counter()
    for number in range(80):
        request = route_request(f"r{number}", tokens=200)
        engine, _ = first(view, request, seed=number)
        view.record_sent(engine, request, now=100.0)
        given_to[engine] += 1
    assert set(given_to.values()) <= set(range(18, 23)), given_to


def test_pending_prompts_are_part_of_the_queue() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=2000))
    view.record_sent("e0", route_request("long", tokens=3000), now=100.0)
    assert first(view)[0] == "e1"
    assert candidates(view)[1].predicted_s == pytest.approx(3.0, abs=0.1)


def test_an_engine_without_a_place_in_its_batch_waits_longer() -> None:
    full = engine_seen("e0", running=4, max_running=4)
    view = view_of(full, engine_seen("e1", running=4, max_running=8))
    assert first(view)[0] == "e1"


def test_an_engine_without_kv_blocks_waits_longer() -> None:
    full = engine_seen("e0", running=4, kv_blocks_free=2)
    view = view_of(full, engine_seen("e1", running=4, kv_blocks_free=500))
    assert first(view, route_request(tokens=200))[0] == "e1"


def test_the_engine_that_holds_the_adapter_wins_until_its_queue_is_longer_than_a_load() -> None:
    request = route_request(adapter=adapter_ref(1, slab_bytes=50 * MIB))
    short = engine_seen("e0", waiting_prefill_tokens=300, **HELD)
    assert first(view_of(short, engine_seen("e1")), request) == ("e0", "resident")
    long = engine_seen("e0", waiting_prefill_tokens=3000, **HELD)
    assert first(view_of(long, engine_seen("e1")), request) == ("e1", "spill")


def test_a_slightly_earlier_start_is_not_worth_a_load() -> None:
    request = route_request(adapter=adapter_ref(1, slab_bytes=50 * MIB))
    holder = engine_seen("e0", waiting_prefill_tokens=600, **HELD)
    assert first(view_of(holder, engine_seen("e1")), request) == ("e0", "resident")


def test_load_and_queue_time_overlap() -> None:
    view = view_of(engine_seen("e0", waiting_prefill_tokens=500))
    (only,) = candidates(view, route_request(adapter=adapter_ref(1, slab_bytes=50 * MIB)))
    assert only.predicted_s == pytest.approx(0.5, abs=0.03)


def test_a_load_into_a_full_pool_waits() -> None:
    used = engine_seen("e0", running=2, pool_room_bytes=0)
    free = engine_seen("e1", running=3)
    assert first(view_of(used, free), route_request(adapter=PIRATE)) == ("e1", "load")


def test_fragmented_free_bytes_do_not_count_as_room() -> None:
    pieces = engine_seen("e0", pool_free_bytes=64 * MIB, pool_room_bytes=2 * MIB)
    whole = engine_seen("e1", running=3, pool_free_bytes=8 * MIB, pool_room_bytes=8 * MIB)
    large = adapter_ref(3, slab_bytes=4 * MIB)
    assert first(view_of(pieces, whole), route_request(adapter=large))[0] == "e1"


def test_a_second_request_goes_where_the_first_started_a_load() -> None:
    view = view_of(*(engine_seen(f"e{n}", load_bytes_per_s=1.0 * MIB) for n in range(4)))
    request = route_request("r1", adapter=PIRATE)
    engine, why = first(view, request)
    assert why == "load"
    view.record_sent(engine, request, now=100.0)
    assert first(view, route_request("r2", adapter=PIRATE))[0] == engine


def test_a_loading_adapter_counts_as_held() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", loading=(PIRATE.version,)))
    assert first(view, route_request(adapter=PIRATE)) == ("e1", "resident")
    assert first(view, route_request(adapter=PIRATE), plan=plan_of(e1=1.0)) == ("e1", "planned")


def test_a_request_is_rejected_only_if_no_engine_starts_it_in_time() -> None:
    far, farther, near = (engine_seen(f"e{n}", waiting_prefill_tokens=n * 1000) for n in (50, 60, 39))
    assert first(view_of(far, near))[0] == "e39"
    answer = refusal(view_of(far, farther), route_request())
    assert answer.code == "overloaded"
    assert answer.retry_after_s == pytest.approx(40.0, abs=0.5)


@pytest.mark.parametrize("suspect", ["drained", "silent"])
def test_an_idle_fallback_engine_does_not_prevent_rejection_for_overload(suspect: str) -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=50_000))
    if suspect == "drained":
        view.set_drained(frozenset(("e0",)))
    else:
        silence(view, "e0")
    assert refusal(view, route_request()).code == "overloaded"
    alone = view_of(engine_seen("e0"))
    alone.set_drained(frozenset(("e0",)))
    assert first(alone)[0] == "e0", "where there is no other it serves"


@pytest.mark.parametrize("change", [{"generated": 1}, {"avoid": ("e9",)}])
def test_a_migrated_request_is_not_refused_for_overload(change: dict[str, Any]) -> None:
    view = view_of(engine_seen("e0", waiting_prefill_tokens=50_000))
    assert refusal(view, route_request()).code == "overloaded"
    assert first(view, msgspec.structs.replace(route_request(), **change))[0] == "e0"


def test_retry_after_is_at_least_one_second() -> None:
    view = view_of(engine_seen("e0", waiting_prefill_tokens=200))
    answer = refusal(view, route_request(), slo=Slo(ttft_s=0.1, reject_factor=1.0))
    assert answer.retry_after_s == 1.0


def test_the_engine_that_runs_the_request_is_asked_first() -> None:
    view = view_of(engine_seen("e0", waiting_prefill_tokens=5000, request_ids=("r1",)), engine_seen("e1"))
    assert first(view, route_request("r1")) == ("e0", "live")
    assert first(view, route_request("r2")) == ("e1", "base")


def silence(view: ClusterView, engine: str) -> None:
    for number in range(TIMEOUTS_TO_AVOID):
        view.record_timeout(engine, f"lost{number}", now=100.0)


def test_an_engine_that_does_not_answer_is_asked_last() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=5000))
    silence(view, "e0")
    assert [c.engine for c in candidates(view)] == ["e1", "e0"]


def test_if_all_engines_are_fallbacks_the_best_of_them_is_asked_first() -> None:
    view = view_of(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=5000))
    silence(view, "e0")
    silence(view, "e1")
    assert [c.engine for c in candidates(view)] == ["e0", "e1"]


def test_drained_engines_are_asked_after_normal_ones_and_before_silent_ones() -> None:
    view = view_of(engine_seen("e0", **HELD), engine_seen("e1", waiting_prefill_tokens=5000), engine_seen("e2"))
    for _ in range(TIMEOUTS_TO_AVOID):
        view.record_timeout("e2", "r0", 100.0)
    view.set_drained(frozenset(("e0",)))
    request = route_request(adapter=PIRATE)
    assert [c.engine for c in candidates(view, request, plan=plan_of(e0=1.0))] == ["e1", "e0", "e2"]
    view.set_drained(frozenset(("e0", "e1")))
    assert first(view, request)[0] == "e0", "where nothing else is left, it serves"
    view.set_drained(frozenset())
    assert first(view, request)[0] == "e0"


def test_an_engine_may_be_drained_before_its_first_report() -> None:
    view = ClusterView()
    view.set_drained(frozenset(("e0",)))
    view.update(picture(engine_seen("e0"), engine_seen("e1", waiting_prefill_tokens=5000)), now=100.0)
    assert first(view)[0] == "e1"


def test_ties_without_a_plan_are_broken_uniformly_at_random() -> None:
    view = view_of(*(engine_seen(f"e{n}") for n in range(4)))
    counts = win_counts(view, route_request(), plan=None)
    assert sorted(counts) == ["e0", "e1", "e2", "e3"]
    assert min(counts.values()) > 40


def test_ties_between_planned_copies_are_drawn_by_their_shares() -> None:
    view = view_of(engine_seen("e0", **HELD), engine_seen("e1", **HELD))
    counts = win_counts(view, route_request(adapter=PIRATE), plan_of(e0=0.8, e1=0.2))
    assert counts["e0"] > 2 * counts["e1"] > 0


@pytest.mark.parametrize("queue_tokens", [0, 8000])
def test_planned_copies_win_near_ties(queue_tokens: int) -> None:
    view = view_of(*(engine_seen(f"e{n}", waiting_prefill_tokens=queue_tokens, **HELD) for n in range(3)))
    counts = win_counts(view, route_request(adapter=PIRATE), plan_of(e1=0.5, e2=0.5))
    assert set(counts) == {"e1", "e2"}


def test_the_plan_does_not_outweigh_a_much_earlier_start() -> None:
    planned = engine_seen("e0", waiting_prefill_tokens=1000, **HELD)
    view = view_of(planned, engine_seen("e1", **HELD))
    assert first(view, route_request(adapter=PIRATE), plan=plan_of(e0=1.0)) == ("e1", "resident")


def test_later_candidates_are_those_of_the_time_of_the_choice() -> None:
    """Others are routed and a picture arrives while the first candidate does not answer."""
    reports = [engine_seen(f"e{n}", waiting_prefill_tokens=1000 * n, **HELD) for n in range(6)]
    view, cost = view_of(*reports), CostModel()
    choices = [
        route_by_prediction(RoutingContext(route_request("r", adapter=PIRATE), view, None, cost, SLO, Random(0)))
        for _ in range(3)
    ]
    at_once, in_time, late = (choice for choice in choices if isinstance(choice, Candidates))
    assert [candidate.engine for candidate in at_once] == ["e0", "e1", "e2", "e3"]
    expected = tuple(at_once)
    for n in range(6):
        view.record_sent(f"e{n}", route_request(f"sent-{n}", 3000, PIRATE), now=100.0)
    view.prices(cost)
    assert tuple(in_time) == expected
    view.update(picture(*reports[3:], sequence=2), now=200.0)
    view.prices(cost)
    assert tuple(late) == expected


@st.composite
def loads(draw: st.DrawFn) -> list[EngineSeen]:
    count = draw(st.integers(1, 12))
    return [
        engine_seen(
            f"e{n:02}",
            state=draw(st.sampled_from(["READY", "READY", "READY", "DRAINING"])),
            running=draw(st.integers(0, 70)),
            waiting=draw(st.integers(0, 5)),
            waiting_prefill_tokens=draw(st.integers(0, 3000)),
            kv_blocks_free=draw(st.integers(0, 1000)),
            pool_room_bytes=draw(st.sampled_from([0, 64 * MIB])),
            decode_step_s=draw(st.sampled_from([0.0, 0.05])),
            prefill_tokens_per_s=draw(st.sampled_from([0.0, 500.0])),
            load_bytes_per_s=draw(st.sampled_from([0.0, 1e6])),
            max_running=draw(st.sampled_from([0, 64])),
            **draw(st.sampled_from([{}, HELD, {"loading": (PIRATE.version,)}])),
        )
        for n in range(count)
    ]


@settings(max_examples=100, deadline=None)
@given(loads=loads(), adapter=st.sampled_from([None, PIRATE]), seed=st.integers(0, 9))
def test_candidates_are_ready_distinct_and_reproducible(loads, adapter, seed) -> None:
    request, plan = route_request(adapter=adapter), plan_of(e00=0.7, e01=0.3)
    answer = decide(view_of(*loads), request, plan, seed)
    again = decide(view_of(*loads), request, plan, seed)
    if isinstance(answer, Rejected):
        assert again == answer
        assert answer.code in ("no_engine", "overloaded")
        return
    assert isinstance(again, Candidates)
    assert tuple(again) == tuple(answer)
    names = [c.engine for c in tuple(answer)]
    ready = {load.engine for load in loads if load.load.state == "READY"}
    assert len(names) == len(set(names)) == min(MAX_CANDIDATES, len(ready))
    assert set(names) <= ready
    assert all(0 <= c.predicted_s < 1e4 for c in tuple(answer))


@settings(max_examples=60, deadline=None)
@given(loads=loads(), adapter=st.sampled_from([None, PIRATE]), more=st.integers(1, 500))
def test_more_queued_prefill_never_lowers_the_prediction(loads, adapter, more) -> None:
    lone = [load for load in loads if load.load.state == "READY"][:1]
    request, patient = route_request(adapter=adapter), Slo(ttft_s=1e6, reject_factor=1.0)
    for load in lone:
        view = view_of(load)
        before = candidates(view, request, slo=patient)[0].predicted_s
        view.record_sent(load.engine, route_request("other", tokens=more), now=100.0)
        assert candidates(view, request, slo=patient)[0].predicted_s >= before
