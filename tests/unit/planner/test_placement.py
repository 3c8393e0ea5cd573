"""Where copies go: what always holds, and what the planner is for."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement
from loraserve.planner.placement import POOL_FRACTION, plan
from loraserve.planner.settings import PlanSettings
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_load

COST = CostModel()


class Situation(msgspec.Struct):
    """All that a plan is made from."""

    demand: list[AdapterDemand]
    adapters: dict[str, AdapterRef]
    engines: list[EngineLoad]
    current: tuple[Placement, ...] = ()
    min_copies: int = 1

    def plan(self, current: tuple[Placement, ...] | None = None) -> tuple[Placement, ...]:
        current = self.current if current is None else current
        return plan(self.demand, self.adapters, self.engines, current, COST, PlanSettings(min_copies=self.min_copies))


def situation(*rates: float, engines: int = 2, pool_bytes: int = 64 * MIB, slab_bytes: int = MIB) -> Situation:
    """One adapter a rate of decode tokens, all of one size."""
    refs = [adapter_ref(n, slab_bytes) for n in range(len(rates))]
    demand = [asked_for(ref, rate) for ref, rate in zip(refs, rates, strict=True) if rate]
    loads = [engine_load(f"e{n}", pool_total_bytes=pool_bytes) for n in range(engines)]
    return Situation(demand, {ref.version: ref for ref in refs}, loads)


def copy(number: int, engine: str, share: float = 1.0) -> Placement:
    return Placement(version=f"v{number}", name=f"adapter-{number}", engine=engine, share=share)


def where(placements: tuple[Placement, ...]) -> dict[str, list[str]]:
    engines: dict[str, list[str]] = {}
    for p in placements:
        engines.setdefault(p.version, []).append(p.engine)
    return engines


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    sizes = draw(st.lists(st.sampled_from([1, 4096, MIB - 1, MIB, 3 * MIB, 9 * MIB]), min_size=1, max_size=10))
    ranks = st.sampled_from([1, 8, 64])
    refs = [adapter_ref(n, size, draw(ranks)) for n, size in enumerate(sizes)]
    rates = st.sampled_from([0.0, 0.01, 1.0, 7.0, 30.0, 333.3])
    demand = [asked_for(ref, draw(rates), draw(rates), draw(st.none() | rates)) for ref in refs if draw(st.booleans())]
    pools = draw(st.lists(st.sampled_from([0, 2 * MIB, 6 * MIB, 16 * MIB, 64 * MIB]), min_size=1, max_size=5))
    engines = [engine_load(f"e{n}", pool_total_bytes=pool) for n, pool in enumerate(pools)]
    places = st.tuples(st.integers(0, len(refs) + 1), st.sampled_from(["e0", "e1", "e2", "gone"]))
    current = tuple(copy(n, engine) for n, engine in sorted(draw(st.sets(places, max_size=8))))
    return Situation(demand, {r.version: r for r in refs}, engines, current, draw(st.integers(1, 3)))


any_situation = settings(max_examples=120, deadline=None)


@any_situation
@given(situations())
def test_no_pool_is_overfull(s: Situation) -> None:
    used: Counter[str] = Counter()
    for p in s.plan():
        used[p.engine] += extent_bytes(s.adapters[p.version].slab_bytes)
    pools = {e.engine: e.pool_total_bytes for e in s.engines}
    assert all(used[engine] <= pools[engine] * POOL_FRACTION for engine in used)


@any_situation
@given(situations())
def test_no_engine_has_two_copies_of_an_adapter(s: Situation) -> None:
    assert max(Counter((p.version, p.engine) for p in s.plan()).values(), default=1) == 1


@any_situation
@given(situations())
def test_shares_of_an_adapter_sum_to_one(s: Situation) -> None:
    shares: dict[str, float] = {}
    for p in s.plan():
        assert p.share > 0
        shares[p.version] = shares.get(p.version, 0.0) + p.share
    assert all(total == pytest.approx(1.0) for total in shares.values())


@any_situation
@given(situations())
def test_only_registered_adapters_that_are_asked_for_or_planned_are_placed_under_their_name(s: Situation) -> None:
    known = {d.version for d in s.demand} | {p.version for p in s.current}
    for p in s.plan():
        assert p.version in known
        assert p.name == s.adapters[p.version].name


@any_situation
@given(situations(), st.randoms(use_true_random=False))
def test_the_order_of_what_it_is_told_does_not_matter(s: Situation, random) -> None:
    expected = s.plan()
    for told in (s.demand, s.engines):
        random.shuffle(told)
    current = list(s.current)
    random.shuffle(current)
    assert s.plan(tuple(current)) == expected


@any_situation
@given(situations())
def test_planning_again_from_its_own_plan_moves_nothing(s: Situation) -> None:
    first = s.plan()
    assert s.plan(first) == first


@any_situation
@given(situations())
def test_an_adapter_is_left_out_only_where_no_engine_has_room(s: Situation) -> None:
    placements = s.plan()
    room = {e.engine: int(e.pool_total_bytes * POOL_FRACTION) for e in s.engines}
    for p in placements:
        room[p.engine] -= extent_bytes(s.adapters[p.version].slab_bytes)
    wanted = {d.version for d in s.demand if d.prefill_tokens_per_s + d.decode_tokens_per_s > 0}
    wanted |= {p.version for p in s.current}
    for version in wanted & s.adapters.keys() - where(placements).keys():
        assert extent_bytes(s.adapters[version].slab_bytes) > max(room.values())


@any_situation
@given(rates=st.lists(st.sampled_from([0.5, 1.0, 5.0, 20.0, 80.0]), min_size=2, max_size=12), engines=st.integers(1, 6))
def test_the_more_it_is_asked_for_the_more_copies_and_no_engine_carries_too_much(rates, engines) -> None:
    s = situation(*rates, engines=engines)
    placements = s.plan()
    copies = Counter(p.version for p in placements)
    for (i, one), (j, other) in ((a, b) for a in enumerate(rates) for b in enumerate(rates)):
        assert copies[f"v{i}"] >= copies[f"v{j}"] or one < other
    weights = {d.version: COST.busy_share(0.0, d.decode_tokens_per_s, d.rank, MIB) for d in s.demand}
    carried: Counter[str] = Counter()
    for p in placements:
        carried[p.engine] += p.share * weights[p.version]
    largest_piece = max(p.share * weights[p.version] for p in placements)
    assert max(carried.values()) <= sum(weights.values()) / engines + largest_piece + 1e-9


def test_without_engines_there_is_no_plan() -> None:
    assert situation(1.0, engines=0).plan() == ()


def test_a_hot_adapter_gets_several_copies_and_a_cold_one_one() -> None:
    placed = where(situation(100.0, *[10.0] * 10, engines=4).plan())
    assert len(placed["v0"]) == 2
    assert all(len(placed[f"v{n}"]) == 1 for n in range(1, 11))


def test_the_light_fill_the_gaps_that_the_copies_of_the_heavy_leave() -> None:
    placements = situation(20.0, *[1.0] * 16, engines=3).plan()
    light = Counter(p.engine for p in placements if p.version != "v0")
    assert len(where(placements)["v0"]) == 2
    assert sorted(light.values()) == [2, 2, 12]


def test_equal_adapters_are_spread_evenly() -> None:
    placements = situation(*[5.0] * 12, engines=4).plan()
    assert sorted(Counter(p.engine for p in placements).values()) == [3, 3, 3, 3]


def test_a_higher_rank_weighs_more_than_the_same_traffic_at_a_lower() -> None:
    s = situation(10.0, 10.0, 10.0)
    s.adapters["v0"] = adapter_ref(0, rank=1024)
    placed = where(s.plan())
    assert placed["v1"] == placed["v2"] != placed["v0"]


def test_what_the_forecast_expects_counts_before_it_is_seen() -> None:
    s = situation(5.0, 5.0, 5.0, 5.0)
    s.demand[0] = asked_for(s.adapters["v0"], 5.0, forecast=500.0)
    placed = where(s.plan())
    assert len(placed["v0"]) == 2
    s.demand = [asked_for(s.adapters["v1"], 0.0, forecast=3.0)]
    assert set(where(s.plan())) == {"v1"}


def test_at_least_the_asked_number_of_copies_where_there_are_engines() -> None:
    s = situation(5.0, *[5.0] * 9, engines=3)
    s.min_copies = 2
    assert {len(engines) for engines in where(s.plan()).values()} == {2}
    s.min_copies = 9
    assert {len(engines) for engines in where(s.plan()).values()} == {3}


def test_nobody_asks_for_it_and_it_is_planned_nowhere() -> None:
    assert set(where(situation(5.0, 0.0).plan())) == {"v0"}


def test_an_idle_copy_stays_where_it_is() -> None:
    s = situation(0.0, 0.0, 5.0, engines=3)
    current = (copy(0, "e2"), copy(1, "e2"))
    placed = where(s.plan(current))
    assert (placed["v0"], placed["v1"]) == (["e2"], ["e2"])


def test_in_a_quiet_cluster_nothing_is_copied_anew() -> None:
    s = situation(0.0, 0.0, engines=4)
    placed = where(s.plan((copy(0, "e0"), copy(1, "e1"))))
    assert placed == {"v0": ["e0"], "v1": ["e1"]}


def test_an_idle_adapter_needs_no_second_copy() -> None:
    s = situation(0.0, 5.0)
    assert len(where(s.plan((copy(0, "e0", 0.5), copy(0, "e1", 0.5))))["v0"]) == 1


def test_what_an_engine_that_is_gone_held_is_placed_again() -> None:
    s = situation(0.0, 5.0)
    placed = where(s.plan((copy(0, "gone"), copy(1, "gone"))))
    assert set(placed) == {"v0", "v1"}
    assert "gone" not in [*placed["v0"], *placed["v1"]]


def test_an_adapter_that_is_no_longer_registered_leaves_the_plan() -> None:
    assert set(where(situation(5.0).plan((copy(0, "e0"), copy(7, "e0"))))) == {"v0"}


def test_a_small_imbalance_moves_nothing() -> None:
    s = situation(10.0, 10.0, 11.0, 11.0)
    current = (copy(0, "e0"), copy(1, "e0"), copy(2, "e1"), copy(3, "e1"))
    assert s.plan(current) == current


def test_a_copy_that_is_heavy_anywhere_stays_where_it_is() -> None:
    s = situation(14.0, 6.0)
    current = (copy(0, "e1"), copy(1, "e0"))
    assert s.plan(current) == current


def test_a_large_imbalance_moves_something_and_not_everything() -> None:
    s = situation(*[10.0] * 8)
    current = tuple(copy(n, "e0") for n in range(8))
    counts = Counter(p.engine for p in s.plan(current))
    assert counts["e0"] in (4, 5)
    assert counts["e1"] == 8 - counts["e0"]


def test_a_new_engine_takes_its_part() -> None:
    s = situation(*[10.0] * 9, engines=3)
    current = tuple(copy(n, f"e{n % 2}") for n in range(9))
    placements = s.plan(current)
    moved = sum(p not in current for p in placements)
    assert 2 <= moved <= 3
    assert Counter(p.engine for p in placements)["e2"] == moved


def test_a_trickle_needs_no_second_copy_however_quiet_the_others() -> None:
    assert len(situation(1.0).plan()) == 1
    assert len(situation(40.0).plan()) == 2
