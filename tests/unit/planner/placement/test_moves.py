"""The moves between two plans, with their reasons and gains."""

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, Move, Placement
from loraserve.planner.placement import ours
from loraserve.planner.placement.moves import _copy_shares, diff, explain_moves
from loraserve.planner.placement.problem import PlanInput, PlanSettings, build_problem
from loraserve.planner.placement.utilisation import mean_ttft_s
from loraserve.testing.plans import Placements, plan_input
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

PADDED = CostModel(lora="padded", step_base_s=0.0, padded_decode_s=2e-5, padded_prefill_s=1.6e-5)
EXACT = CostModel()
ENGINES = [engine_capabilities(f"e{n}") for n in range(4)]
REFS = [adapter_ref(n, slab_bytes=(n + 1) * MIB) for n in range(3)]


def ranked(ranks: list[int]) -> list[AdapterRef]:
    return [adapter_ref(n, rank=rank) for n, rank in enumerate(ranks)]


def inputs_of(
    refs: list[AdapterRef], rate: float, cost: CostModel, plan_settings: PlanSettings | None = None, idle: int = 0
) -> PlanInput:
    """Return an input with four engines in which the first ``idle`` adapters have no demand."""
    return plan_input([asked_for(ref, rate, rate) for ref in refs[idle:]], refs, ENGINES, cost, (), plan_settings)


def copies(*places: tuple[int, str], share: float = 1.0) -> Placements:
    return tuple(Placement(version=f"v{n}", name=f"adapter-{n}", engine=e, share=share) for n, e in places)


def explained(inputs: PlanInput, before: Placements, after: Placements) -> tuple[Move, ...]:
    return explain_moves(msgspec.structs.replace(inputs, current=before), after)


def explained_plainly(before: Placements, after: Placements) -> tuple[Move, ...]:
    """Return the moves among three adapters of 1, 2 and 3 MiB that are all in demand."""
    return explained(inputs_of(REFS, 5.0, EXACT), before, after)


def ttft_s(inputs: PlanInput, placements: Placements) -> float:
    problem = build_problem(inputs)
    return mean_ttft_s(problem, _copy_shares(problem, placements))


def test_the_same_copies_are_no_moves_whatever_their_order_and_shares() -> None:
    plan = copies((0, "e0"), (0, "e1"), (1, "e0"))
    other = tuple(Placement(version=p.version, name=p.name, engine=p.engine, share=0.5) for p in reversed(plan))
    assert diff(plan, other) == []


def test_an_added_copy_has_its_bytes_and_a_reason() -> None:
    (move,) = explained_plainly((), copies((2, "e0")))
    assert (move.name, move.source, move.target, move.slab_bytes) == ("adapter-2", "", "e0", 3 * MIB)
    assert move.reason == "it is requested and has no copy"


def test_a_further_copy_has_another_reason() -> None:
    (move,) = explained_plainly(copies((0, "e0")), copies((0, "e0"), (0, "e1"), share=0.5))
    assert move.target == "e1"
    assert move.reason.startswith("its demand takes ")


def test_a_removed_copy_loads_nothing_and_has_a_reason() -> None:
    (move,) = explained_plainly(copies((0, "e0"), (0, "e1")), copies((0, "e0")))
    assert (move.source, move.target, move.slab_bytes) == ("e1", "", 0)
    assert move.reason == "demand fits fewer copies"


def test_a_copy_of_an_unregistered_adapter_is_removed_for_that_reason() -> None:
    (move,) = explained_plainly(copies((9, "e0")), ())
    assert (move.name, move.source, move.target) == ("adapter-9", "e0", "")
    assert move.reason == "the adapter is no longer registered"


def test_an_added_and_a_removed_copy_are_one_move() -> None:
    (move,) = explained_plainly(copies((0, "e0"), (0, "e1"), share=0.5), copies((0, "e1"), (0, "e2"), share=0.5))
    assert (move.source, move.target, move.slab_bytes) == ("e0", "e2", MIB)
    assert move.reason.startswith("e0 would be ")


def test_adapters_are_never_paired_with_each_other() -> None:
    moves = diff(copies((0, "e0")), copies((1, "e0")))
    assert [(m.version, m.source, m.target) for m in moves] == [("v0", "e0", ""), ("v1", "", "e0")]


places = st.sets(st.tuples(st.integers(0, 3), st.sampled_from(["e0", "e1", "e2"])), max_size=10)


@settings(max_examples=150, deadline=None)
@given(places, places)
def test_moves_lead_from_one_plan_to_the_other_and_none_is_superfluous(before, after) -> None:
    moves = explained_plainly(copies(*before), copies(*after))
    reached = {(f"v{n}", e) for n, e in before}
    for move in moves:
        if move.source:
            reached.remove((move.version, move.source))
        if move.target:
            assert (move.version, move.target) not in reached
            reached.add((move.version, move.target))
    assert reached == {(f"v{n}", e) for n, e in after}
    removed, added = (Counter(n for n, _ in one - other) for one, other in ((before, after), (after, before)))
    assert len(moves) == sum(max(removed[n], added[n]) for n in removed | added)
    assert diff(copies(*before), copies(*after)) == diff(copies(*sorted(before)), copies(*sorted(after)))
    registered = {ref.version for ref in REFS}
    assert all(m.reason and (m.slab_bytes > 0) == bool(m.target and m.version in registered) for m in moves)


@pytest.mark.parametrize("cost", [PADDED, EXACT], ids=["padded", "exact"])
def test_the_gain_of_the_only_move_is_what_the_plan_gains(cost: CostModel) -> None:
    inputs = inputs_of(ranked([8, 128, 8, 64]), 30.0, cost)
    before = copies((0, "e0"), (1, "e0"), (2, "e0"), (3, "e1"))
    for after in (
        copies((0, "e0"), (1, "e2"), (2, "e0"), (3, "e1")),
        copies((0, "e0"), (1, "e1"), (2, "e0"), (3, "e1")),
        copies((0, "e1"), (1, "e0"), (2, "e0"), (3, "e1")),
    ):
        (move,) = explained(inputs, before, after)
        assert move.gain_s == pytest.approx(ttft_s(inputs, before) - ttft_s(inputs, after), abs=1e-9)
        assert move.gain_s != 0


def test_the_gain_of_a_second_copy_is_that_of_its_share() -> None:
    inputs = inputs_of(ranked([8, 8]), 60.0, EXACT)
    before = copies((0, "e0"), (1, "e0"))
    after = copies((0, "e0"), (0, "e1"), share=0.5) + copies((1, "e0"))
    (move,) = explained(inputs, before, after)
    # Two engines read the slab of a split adapter, and the gain of a single move counts one of them: 1e-4 here.
    assert move.gain_s == pytest.approx(ttft_s(inputs, before) - ttft_s(inputs, after), rel=0.02)
    (back,) = explained(inputs, after, before)
    assert back.gain_s == pytest.approx(-move.gain_s, rel=0.02)


def test_a_first_copy_saves_the_load_that_each_request_would_wait_for() -> None:
    (move,) = explained(inputs_of(ranked([8, 8]), 5.0, EXACT), copies((0, "e0")), copies((0, "e0"), (1, "e1")))
    assert move.gain_s == pytest.approx((EXACT.load_base_s + MIB * EXACT.load_byte_s) / 2)
    assert move.reason == "it is requested and has no copy"


def test_an_adapter_without_demand_gains_nothing() -> None:
    inputs = inputs_of(ranked([8, 8]), 5.0, EXACT, idle=1)
    moves = explained(inputs, copies((1, "e0")), copies((0, "e1"), (1, "e0")))
    assert [(m.gain_s, m.reason) for m in moves] == [(0.0, "it is registered and has no copy")]


def test_removed_copies_have_reasons_too() -> None:
    inputs = inputs_of(ranked([8, 8]), 5.0, EXACT)
    both = copies((0, "e0"), (0, "e1"), share=0.5)
    (move,) = explained(inputs, both + copies((1, "e0")), copies((0, "e1"), (1, "e0")))
    assert move.reason == "demand fits fewer copies"
    (removed,) = explained(inputs, copies((9, "e0")), ())
    assert (removed.gain_s, removed.reason) == (0.0, "the adapter is no longer registered")


def test_reasons_name_the_ranks_that_slow_down_others() -> None:
    inputs = inputs_of(ranked([8, 128, 8]), 10.0, PADDED)
    mixed = copies((0, "e0"), (1, "e0"), (2, "e1"))
    (high,) = explained(inputs, mixed, copies((0, "e0"), (1, "e2"), (2, "e1")))
    assert high.reason == "its rank 128 slows down others on e0, whose ranks are at most 8"
    (low,) = explained(inputs, mixed, copies((0, "e1"), (1, "e0"), (2, "e1")))
    assert low.reason == "rank 128 on e0 slows it down; its own rank is 8"
    assert high.gain_s > 0
    assert low.gain_s > 0


def test_reasons_name_the_utilisation_of_both_engines() -> None:
    inputs = inputs_of(ranked([8, 8, 8]), 50.0, EXACT)
    (move,) = explained(inputs, copies((0, "e0"), (1, "e0"), (2, "e1")), copies((0, "e0"), (1, "e2"), (2, "e1")))
    assert move.reason.startswith("e0 would be ")
    assert move.reason.endswith("% busy, e2 0%")


def test_reasons_name_pins_drained_engines_and_lost_engines() -> None:
    chosen = PlanSettings(pins={"adapter-0": ("e1",)}, drained=frozenset({"e3"}))
    inputs = inputs_of(ranked([8, 8, 8]), 5.0, EXACT, chosen)
    before = copies((0, "e0"), (1, "e3"), (2, "lost"))
    reasons = [m.reason for m in explained(inputs, before, copies((0, "e1"), (1, "e0"), (2, "e2")))]
    assert reasons == ["it is pinned to e1", "e3 is being drained", "lost is gone"]


def test_further_copies_are_explained_by_the_minimum_or_by_demand() -> None:
    refs = ranked([8, 8])
    more = copies((0, "e0"), (0, "e1"), share=0.5) + copies((1, "e0"))
    (kept,) = explained(inputs_of(refs, 5.0, EXACT, PlanSettings(min_copies=2)), copies((0, "e0"), (1, "e0")), more)
    assert kept.reason == "every adapter has at least 2 copies"
    (hot,) = explained(inputs_of(refs, 50.0, EXACT), copies((0, "e0"), (1, "e0")), more)
    assert hot.reason.startswith("its demand takes ")


def test_every_move_of_a_plan_has_a_reason_and_those_that_separate_ranks_a_gain() -> None:
    refs = ranked([8, 128] * 12)
    before = copies(*((n, f"e{n // 2 % 4}") for n in range(24)))
    inputs = plan_input([asked_for(ref, 10.0, 10.0) for ref in refs], refs, ENGINES, PADDED, before)
    after = ours.plan(inputs)
    moves = explain_moves(inputs, after)
    bare = [msgspec.structs.replace(m, reason="", gain_s=0.0, slab_bytes=0) for m in moves]
    assert bare == diff(before, after)
    assert all(m.reason for m in moves)
    assert sum(m.gain_s > 0 for m in moves) >= len(moves) / 2


def test_without_moves_nothing_is_computed() -> None:
    class Unread(list[AdapterDemand]):
        def __iter__(self) -> Iterator[AdapterDemand]:
            raise AssertionError("the demand was looked at")

    inputs = plan_input(Unread(), ranked([8, 128]), ENGINES[:2], EXACT)
    placements = copies((0, "e0"), (1, "e1"))
    assert explained(inputs, placements, placements) == ()
    with pytest.raises(AssertionError, match="was looked at"):
        explained(inputs, placements, copies((0, "e1"), (1, "e1")))
