"""Examples of our placement: copies, memory and moves. Properties are in test_policies.py."""

from collections import Counter

import msgspec

from loraserve.cost import CostModel
from loraserve.planner.placement.problem import PlanSettings
from loraserve.testing.plans import Situation, copy, count_new, engines_by_version
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

COST = CostModel()


def situation(*rates: float, engines: int = 2, pool_bytes: int = 64 * MIB, slab_bytes: int = MIB) -> Situation:
    """Return a situation with one adapter per rate of decode tokens, all of one size."""
    refs = [adapter_ref(n, slab_bytes) for n in range(len(rates))]
    demand = [asked_for(ref, rate) for ref, rate in zip(refs, rates, strict=True) if rate]
    loads = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n in range(engines)]
    return Situation(demand, {ref.version: ref for ref in refs}, loads)


def test_a_hot_adapter_gets_two_copies_and_cold_ones_get_one() -> None:
    placed = engines_by_version(situation(100.0, *[10.0] * 10, engines=4).plan())
    assert len(placed["v0"]) == 2
    assert all(len(placed[f"v{n}"]) == 1 for n in range(1, 11))


def test_equal_adapters_are_spread_evenly() -> None:
    placements = situation(*[5.0] * 12, engines=4).plan()
    assert sorted(Counter(p.engine for p in placements).values()) == [3, 3, 3, 3]


def test_a_higher_rank_counts_more_for_the_same_traffic() -> None:
    s = situation(10.0, 10.0, 10.0)
    s.adapters["v0"] = adapter_ref(0, rank=1024)
    placed = engines_by_version(s.plan())
    assert placed["v1"] == placed["v2"] != placed["v0"]


def test_forecast_demand_counts_before_it_is_measured() -> None:
    s = situation(5.0, 5.0, 5.0, 5.0)
    s.demand[0] = asked_for(s.adapters["v0"], 5.0, forecast=500.0)
    placed = engines_by_version(s.plan())
    assert len(placed["v0"]) == 2
    s.demand = [asked_for(s.adapters["v1"], 0.0, forecast=500.0)]
    placed = engines_by_version(s.plan())
    assert len(placed["v1"]) == 2
    assert len(placed["v0"]) == 1


def test_there_are_at_least_min_copies_if_there_are_engines() -> None:
    s = situation(5.0, *[5.0] * 9, engines=3)
    s.settings = PlanSettings(min_copies=2)
    assert {len(engines) for engines in engines_by_version(s.plan()).values()} == {2}
    s.settings = PlanSettings(min_copies=9)
    assert {len(engines) for engines in engines_by_version(s.plan()).values()} == {3}


def test_adapters_without_demand_have_a_copy_too() -> None:
    placed = engines_by_version(situation(5.0, 0.0, 0.0).plan())
    assert {version: len(engines) for version, engines in placed.items()} == {"v0": 1, "v1": 1, "v2": 1}


def test_the_hottest_adapters_have_the_memory_if_it_is_short() -> None:
    s = situation(*[0.0] * 4, *[10.0] * 6, engines=2, pool_bytes=4 * MIB)
    placed = engines_by_version(s.plan())
    assert set(placed) == {f"v{n}" for n in range(4, 10)}
    # Even if adapters without demand are held already.
    assert len(set(engines_by_version(s.plan((copy(0, "e0"), copy(1, "e0"), copy(2, "e1")))).keys()) & set(placed)) >= 5


def test_a_copy_without_demand_stays_where_it_is() -> None:
    s = situation(0.0, 0.0, 5.0, engines=3)
    current = (copy(0, "e2"), copy(1, "e2"))
    placed = engines_by_version(s.plan(current))
    assert (placed["v0"], placed["v1"]) == (["e2"], ["e2"])


def test_without_demand_nothing_is_loaded() -> None:
    s = situation(0.0, 0.0, engines=4)
    placed = engines_by_version(s.plan((copy(0, "e0"), copy(1, "e1"))))
    assert placed == {"v0": ["e0"], "v1": ["e1"]}


def test_an_adapter_without_demand_keeps_no_second_copy() -> None:
    s = situation(0.0, 5.0)
    assert len(engines_by_version(s.plan((copy(0, "e0", 0.5), copy(0, "e1", 0.5))))["v0"]) == 1


def test_copies_on_lost_engines_are_placed_again() -> None:
    s = situation(0.0, 5.0)
    placed = engines_by_version(s.plan((copy(0, "gone"), copy(1, "gone"))))
    assert set(placed) == {"v0", "v1"}
    assert "gone" not in [*placed["v0"], *placed["v1"]]


def test_an_adapter_that_is_no_longer_registered_leaves_the_plan() -> None:
    assert set(engines_by_version(situation(5.0).plan((copy(0, "e0"), copy(7, "e0"))))) == {"v0"}


def test_a_small_imbalance_moves_nothing() -> None:
    s = situation(10.0, 10.0, 11.0, 11.0)
    current = (copy(0, "e0"), copy(1, "e0"), copy(2, "e1"), copy(3, "e1"))
    assert s.plan(current) == current


def test_an_adapter_that_is_heavy_on_any_engine_stays() -> None:
    s = situation(14.0, 6.0)
    current = (copy(0, "e1"), copy(1, "e0"))
    assert s.plan(current) == current


def test_a_large_imbalance_moves_as_much_as_needed() -> None:
    s = situation(*[10.0] * 8)
    current = tuple(copy(n, "e0") for n in range(8))
    counts = Counter(p.engine for p in s.plan(current))
    assert counts["e0"] in (4, 5)
    assert counts["e1"] == 8 - counts["e0"]


def test_a_new_engine_takes_its_share() -> None:
    s = situation(*[10.0] * 9, engines=3)
    current = tuple(copy(n, f"e{n % 2}") for n in range(9))
    placements = s.plan(current)
    assert 2 <= count_new(current, placements) <= 3
    assert Counter(p.engine for p in placements)["e2"] == count_new(current, placements)


def test_an_adapter_with_little_demand_needs_no_second_copy() -> None:
    assert len(situation(1.0).plan()) == 1
    assert len(situation(40.0).plan()) == 2


def test_a_pin_to_a_missing_engine_is_ignored() -> None:
    s = situation(5.0, 5.0)
    s.settings = PlanSettings(pins={"adapter-0": ("nowhere",), "adapter-1": ("e1", "nowhere")})
    placed = engines_by_version(s.plan())
    assert len(placed["v0"]) == 1
    assert placed["v1"] == ["e1"]


def test_forecast_errors_reserve_room_beside_hot_adapters() -> None:
    s = situation(*[20.0] * 8, engines=2)
    s.demand[0] = msgspec.structs.replace(s.demand[0], forecast_std_tokens_per_s=60.0)
    placements = s.plan()
    beside = Counter(p.engine for p in placements if p.version != "v0")
    (engine,) = engines_by_version(placements)["v0"][:1]
    assert beside[engine] <= 3
