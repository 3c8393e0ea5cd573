"""Placement on engines whose pools differ in size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import Placement
from loraserve.planner.placement import PLACEMENT_POLICIES
from loraserve.planner.placement.bins import fill_bins
from loraserve.planner.placement.problem import POOL_FRACTION
from loraserve.planner.placement.utilisation import mean_ttft_s
from loraserve.testing.plans import Situation
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

# A token at rank 128 costs twice what it costs at rank 8, nearly.
PADDED = CostModel(lora="padded", step_base_s=0.0, padded_decode_s=2e-5, padded_prefill_s=1.6e-5)


def above_ideal(s: Situation, placements: tuple[Placement, ...]) -> float:
    """Return the predicted TTFT relative to that of a plan for which memory is free."""
    problem = s.problem(placements)
    return s.ttft_s(placements) / mean_ttft_s(problem, fill_bins(problem, len(problem.engines)).shares)


def situation(ranks: list[int], rates: list[float], rooms_mib: list[int], cost: CostModel) -> Situation:
    refs = [adapter_ref(n, rank * MIB // 8, rank) for n, rank in enumerate(ranks)]
    demand = [asked_for(ref, rate / 2, rate / 2) for ref, rate in zip(refs, rates, strict=True) if rate]
    pools = [int(mib * MIB / POOL_FRACTION) + 1 for mib in rooms_mib]
    loads = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n, pool_bytes in enumerate(pools)]
    return Situation(demand, {ref.version: ref for ref in refs}, loads, cost=cost)


def ranks_by_engine(s: Situation, placements: tuple[Placement, ...]) -> dict[str, set[int]]:
    ranks: dict[str, set[int]] = {}
    for p in placements:
        ranks.setdefault(p.engine, set()).add(s.adapters[p.version].rank)
    return ranks


@pytest.mark.parametrize("rooms_mib", [[40, 40, 200, 200], [200, 40, 200, 40], [200, 200, 40, 40]])
def test_high_ranks_are_on_engines_with_more_room(rooms_mib: list[int]) -> None:
    s = situation([8, 128] * 12, [20.0] * 24, rooms_mib, PADDED)
    placements = s.plan()
    ranks = ranks_by_engine(s, placements)
    small = [f"e{n}" for n, mib in enumerate(rooms_mib) if mib == 40]
    # Rank 8 fills one engine and shares another with rank 128.
    assert sorted(map(len, ranks.values())) == [1, 1, 1, 2]
    assert {8} in [ranks[e] for e in small]
    assert above_ideal(s, placements) < 1.05


@pytest.mark.parametrize("rooms_mib", [[80, 80, 320, 320], [80, 320, 80, 320], [90, 90, 300, 300]])
def test_a_plan_for_even_pools_is_replaced_when_pools_are_uneven(rooms_mib: list[int]) -> None:
    ranks, rates = [8, 16, 32, 64, 128] * 8, [200.0 / (n + 1) ** 0.9 for n in range(40)]
    current = situation(ranks, rates, [200] * 4, PADDED).plan()
    s = situation(ranks, rates, rooms_mib, PADDED)
    assert above_ideal(s, s.plan(current)) < 1.1


@pytest.mark.parametrize("rooms_mib", [[3, 3, 40, 40], [40, 3, 40, 3]])
def test_hot_adapters_keep_small_pools_as_busy_as_large_ones(rooms_mib: list[int]) -> None:
    s = situation([8] * 40, [100.0 / (n + 1) for n in range(40)], rooms_mib, CostModel())
    placements = s.plan()
    assert len({p.version for p in placements}) == 40
    utilisation = s.utilisation(placements)
    assert max(utilisation) <= 1.05 * min(utilisation)


def test_a_small_pool_keeps_what_it_holds_when_demand_changes_a_little() -> None:
    rates = [100.0 / (n + 1) for n in range(40)]
    s = situation([8] * 40, rates, [3, 3, 40, 40], CostModel())
    before = s.plan()
    s.demand = situation(
        [8] * 40, [r * (1.04 if n % 2 else 0.96) for n, r in enumerate(rates)], [1], CostModel()
    ).demand
    assert {(p.version, p.engine) for p in s.plan(before)} == {(p.version, p.engine) for p in before}


@st.composite
def uneven(draw: st.DrawFn) -> Situation:
    ranks = draw(st.lists(st.sampled_from([8, 32, 128]), min_size=1, max_size=30))
    rates = draw(st.lists(st.sampled_from([0.0, 1.0, 5.0, 20.0]), min_size=len(ranks), max_size=len(ranks)))
    rooms_mib = draw(st.lists(st.sampled_from([0, 2, 10, 40, 160, 640]), min_size=2, max_size=6))
    return situation(ranks, rates, rooms_mib, draw(st.sampled_from([PADDED, CostModel()])))


@pytest.mark.parametrize("policy", sorted(PLACEMENT_POLICIES))
@settings(max_examples=150, deadline=None)
@given(s=uneven())
def test_uneven_pools_are_never_overfull_hold_what_they_can_and_are_planned_the_same_again(
    policy: str, s: Situation
) -> None:
    placements = s.plan(policy=policy)
    room = s.room(placements)
    assert min(room.values()) >= 0
    extents = {version: extent_bytes(ref.slab_bytes) for version, ref in s.adapters.items()}
    left_out = extents.keys() - {p.version for p in placements}
    assert all(extents[version] > max(room.values()) for version in left_out)
    # Second copies take at most as much again, and each engine wastes less than the largest slab.
    if sum(s.room(()).values()) >= 2 * sum(extents.values()) + len(s.engines) * max(extents.values()):
        assert not left_out
    assert s.plan(placements, policy) == placements
