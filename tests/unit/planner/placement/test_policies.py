"""Properties of every placement policy, for any demand and any cluster."""

from collections import Counter
from math import inf, nan
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterDemand, AdapterRef, Placement
from loraserve.planner.placement import PLACEMENT_POLICIES
from loraserve.planner.placement.problem import POOL_FRACTION, PlanSettings
from loraserve.testing.plans import Situation
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

COSTS = (CostModel(), CostModel(lora="padded"), CostModel(lora="padded", step_base_s=0.0, load_byte_s=0.0))
SECONDS = [name for name in CostModel.__struct_fields__ if name.endswith("_s")]
RATES = st.sampled_from([0.0, 0.01, 1.0, 7.0, 30.0, 333.3])


@st.composite
def situations(draw: st.DrawFn, pools: tuple[int, ...] = (0, 2, 6, 16, 64), most: int = 5) -> Situation:
    sizes = draw(st.lists(st.sampled_from([1, 4096, MIB - 1, MIB, 3 * MIB, 9 * MIB]), min_size=1, max_size=10))
    refs = [adapter_ref(n, size, draw(st.sampled_from([1, 8, 64]))) for n, size in enumerate(sizes)]
    demand = [_demand(draw, ref) for ref in refs if draw(st.booleans())]
    sizes = draw(st.lists(st.sampled_from(pools), min_size=1, max_size=most))
    engines = [engine_capabilities(f"e{n}", pool_bytes=mib * MIB) for n, mib in enumerate(sizes)]
    names = st.sampled_from(["e0", "e1", "e2", "gone"])
    places = draw(st.sets(st.tuples(st.integers(0, len(refs) + 1), names), max_size=8))
    pins = draw(st.dictionaries(st.sampled_from([ref.name for ref in refs]), st.tuples(names), max_size=2))
    planned = PlanSettings(
        min_copies=draw(st.integers(1, 3)), pins=pins, drained=frozenset(draw(st.sets(names, max_size=1)))
    )
    current = tuple(
        Placement(version=f"v{n}", name=f"adapter-{n}", engine=engine, share=1.0) for n, engine in sorted(places)
    )
    adapters = {r.version: r for r in refs}
    return Situation(demand, adapters, engines, current, draw(st.sampled_from(COSTS)), planned)


def _demand(draw: st.DrawFn, ref: AdapterRef) -> AdapterDemand:
    demand = asked_for(ref, draw(RATES), draw(RATES), draw(st.none() | RATES))
    return msgspec.structs.replace(demand, forecast_std_tokens_per_s=draw(RATES))


def versions(placements: tuple[Placement, ...]) -> set[str]:
    return {p.version for p in placements}


any_situation = settings(max_examples=80, deadline=None)
each_policy = pytest.mark.parametrize("policy", sorted(PLACEMENT_POLICIES))


@each_policy
@any_situation
@given(s=situations())
def test_no_pool_is_overfull_and_drained_engines_are_empty(policy: str, s: Situation) -> None:
    placements = s.plan(policy=policy)
    assert all(left >= 0 for left in s.room(placements).values())
    assert not {p.engine for p in placements} & s.settings.drained


@each_policy
@any_situation
@given(s=situations())
def test_copies_are_of_registered_adapters_and_no_engine_has_two_of_one(policy: str, s: Situation) -> None:
    placements = s.plan(policy=policy)
    assert all(p.name == s.adapters[p.version].name for p in placements)
    assert max(Counter((p.version, p.engine) for p in placements).values(), default=1) == 1


@each_policy
@any_situation
@given(s=situations())
def test_shares_of_an_adapter_sum_to_one(policy: str, s: Situation) -> None:
    shares: dict[str, float] = {}
    for p in s.plan(policy=policy):
        assert p.share > 0
        shares[p.version] = shares.get(p.version, 0.0) + p.share
    assert all(total == pytest.approx(1.0) for total in shares.values())


@each_policy
@any_situation
@given(s=situations())
def test_an_adapter_is_left_out_only_if_no_engine_has_room(policy: str, s: Situation) -> None:
    placements = s.plan(policy=policy)
    most = max(s.room(placements).values(), default=-1)
    for version in s.adapters.keys() - versions(placements):
        assert extent_bytes(s.adapters[version].slab_bytes) > most


@each_policy
@any_situation
@given(s=situations())
def test_there_are_at_least_min_copies_if_there_is_room(policy: str, s: Situation) -> None:
    placements = s.plan(policy=policy)
    room = s.room(placements)
    for version, ref in s.adapters.items():
        held = {p.engine for p in placements if p.version == version}
        if ref.name not in s.settings.pins and len(held) < s.settings.min_copies:
            assert all(room[e] < extent_bytes(ref.slab_bytes) for e in room if e not in held)


@each_policy
@any_situation
@given(s=situations())
def test_planning_again_from_its_own_plan_changes_nothing(policy: str, s: Situation) -> None:
    first = s.plan(policy=policy)
    assert s.plan(first, policy) == first


def crowded(seed: int) -> Situation:
    """Adapters at random places, in pools that hold little more than one copy each, so that one round is not enough."""
    rng = Random(seed)
    refs = [adapter_ref(n, rank * MIB // 8, rank) for n, rank in enumerate(rng.choices([8, 16, 32, 64, 128], k=30))]
    demand = [asked_for(ref, 30 * rng.random() / (n + 1), 100 * rng.random() / (n + 1)) for n, ref in enumerate(refs)]
    pool_bytes = int(sum(ref.slab_bytes for ref in refs) / 4 * 1.2 / POOL_FRACTION)
    engines = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n in range(4)]
    current = tuple(Placement(version=r.version, name=r.name, engine=f"e{rng.randrange(4)}", share=1.0) for r in refs)
    return Situation(demand, {ref.version: ref for ref in refs}, engines, current, CostModel(lora="padded"))


@pytest.mark.parametrize("seed", [5, 26, 30, 55])
def test_ours_planned_again_with_short_memory_changes_nothing(seed: int) -> None:
    s = crowded(seed)
    first = s.plan(policy="ours")
    assert s.plan(first, "ours") == first


def alternating(seed: int) -> Situation:
    """Many resident adapters have no demand and take the room of adapters with demand."""
    rng = Random(seed)
    engines, count = rng.randrange(3, 9), rng.randrange(8, 40)
    refs = [adapter_ref(n, rank * MIB // 8, rank) for n, rank in enumerate(rng.choices([8, 16, 32, 64, 128], k=count))]
    demand = [
        asked_for(ref, 30 * rng.random() / (n + 1), 100 * rng.random() / (n + 1))
        for n, ref in enumerate(refs)
        if rng.random() < 0.7
    ]
    spare = rng.choice([1.0, 1.2, 1.5, 2, 3])
    pool_bytes = int(sum(ref.slab_bytes for ref in refs) / engines * spare / POOL_FRACTION)
    loads = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n in range(engines)]
    held = [(ref, f"e{e}") for ref in refs for e in rng.sample(range(engines), rng.randrange(3))]
    current = tuple(Placement(version=r.version, name=r.name, engine=e, share=1.0) for r, e in held)
    planned = PlanSettings(min_copies=rng.choice([1, 1, 2]))
    return Situation(demand, {r.version: r for r in refs}, loads, current, CostModel(lora="padded"), planned)


@pytest.mark.parametrize("seed", [1476, 3271])
def test_the_papers_planned_again_where_three_plans_alternate_changes_nothing(seed: int) -> None:
    s = alternating(seed)
    first = s.plan(policy="loraserve")
    assert s.plan(first, "loraserve") == first


@any_situation
@given(seed=st.integers(0, 1 << 32))
def test_the_papers_planned_again_with_short_memory_changes_nothing(seed: int) -> None:
    for s in (alternating(seed), crowded(seed)):
        first = s.plan(policy="loraserve")
        assert s.plan(first, "loraserve") == first


@each_policy
@any_situation
@given(s=situations(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(policy: str, s: Situation, random) -> None:
    expected = s.plan(policy=policy)
    for told in (s.demand, s.engines):
        random.shuffle(told)
    current = list(s.current)
    random.shuffle(current)
    assert s.plan(tuple(current), policy) == expected


RATE_FIELDS = [name for name in AdapterDemand.__struct_fields__ if name.endswith("_per_s")]
ODD = [nan, inf, -inf, -1.0, 1e308, 1e30, 1e-300, 5.0]


@each_policy
@any_situation
@given(s=situations(), random=st.randoms(use_true_random=False))
def test_invalid_rates_do_not_prevent_a_plan(policy: str, s: Situation, random: Random) -> None:
    s.demand = [msgspec.structs.replace(d, **{random.choice(RATE_FIELDS): random.choice(ODD)}) for d in s.demand]
    placements = s.plan(policy=policy)
    assert all(0 < p.share <= 1 for p in placements)
    assert s.plan(placements, policy) == placements


@each_policy
@pytest.mark.parametrize("rate", [nan, inf, -inf, -1.0])
def test_invalid_rates_count_as_no_demand(policy: str, rate: float) -> None:
    s = crowded(5)
    told, (first, *others) = s.demand, s.demand
    s.demand = [msgspec.structs.replace(first, **dict.fromkeys(RATE_FIELDS, rate)), *others]
    odd, s.demand = s.plan(policy=policy), others
    assert odd == s.plan(policy=policy)
    s.demand = told
    assert odd != s.plan(policy=policy)


@each_policy
@any_situation
@given(s=situations(), zeros=st.sets(st.sampled_from(SECONDS)), lora=st.sampled_from(["padded", "exact"]))
def test_a_cost_model_may_contain_zeros(policy: str, s: Situation, zeros: set[str], lora: Any) -> None:
    for free in (zeros, SECONDS):
        s.cost = CostModel(lora=lora, **dict.fromkeys(free, 0.0))
        placements = s.plan(policy=policy)
        assert max(Counter((p.version, p.engine) for p in placements).values(), default=1) == 1
        assert s.plan(placements, policy) == placements


@each_policy
@any_situation
@given(s=situations(pools=(64, 256)))
def test_pinned_adapters_are_exactly_where_they_are_pinned(policy: str, s: Situation) -> None:
    placements = s.plan(policy=policy)
    alive = {e.engine for e in s.engines} - s.settings.drained
    for version, ref in s.adapters.items():
        pinned = set(s.settings.pins.get(ref.name, ())) & alive
        if pinned:
            assert {p.engine for p in placements if p.version == version} == pinned


@each_policy
@any_situation
@given(s=situations(pools=(256,)), lost=st.integers(0, 4))
def test_no_adapter_loses_its_place_with_a_lost_engine(policy: str, s: Situation, lost: int) -> None:
    before = s.plan(policy=policy)
    s.engines = [e for e in s.engines if e.engine != f"e{lost}"]
    left = {e.engine for e in s.engines} - s.settings.drained
    assert versions(s.plan(before, policy)) == (versions(before) if left else set())


@each_policy
def test_without_engines_there_is_no_plan(policy: str) -> None:
    ref = adapter_ref()
    assert Situation([asked_for(ref, 5.0)], {ref.version: ref}, []).plan(policy=policy) == ()
