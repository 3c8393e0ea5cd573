"""Examples of our placement: separation of ranks, balance of engines and gains of requests."""

from typing import Literal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.messages import Placement
from loraserve.planner.placement.bins import fill_bins
from loraserve.planner.placement.problem import POOL_FRACTION, PlanSettings
from loraserve.testing.plans import Situation, copy, count_new, engines_by_version
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

COST = CostModel()
# A token at rank 128 costs almost twice what it costs at rank 8.
PADDED = CostModel(lora="padded", step_base_s=0.0, padded_decode_s=2e-5, padded_prefill_s=1.6e-5)


def ranked(
    ranks: list[int], rate: float, engines: int, lora: Literal["exact", "padded"], pool_bytes: int = 1024 * MIB
) -> Situation:
    """Return a situation with equal demand for adapters of these ranks, a MiB each; half of the tokens are prefill."""
    refs = [adapter_ref(n, rank=rank) for n, rank in enumerate(ranks)]
    loads = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n in range(engines)]
    demand = [asked_for(ref, rate / 2, rate / 2) for ref in refs]
    return Situation(demand, {ref.version: ref for ref in refs}, loads, cost=PADDED if lora == "padded" else COST)


def ranks_by_engine(s: Situation, placements: tuple[Placement, ...]) -> dict[str, set[int]]:
    ranks: dict[str, set[int]] = {}
    for p in placements:
        ranks.setdefault(p.engine, set()).add(s.adapters[p.version].rank)
    return ranks


def test_light_adapters_fill_the_gaps_beside_copies_of_heavy_ones() -> None:
    s = ranked([8] * 17, 1.0, 3, "exact")
    s.demand[0] = asked_for(s.adapters["v0"], 20.0)
    placements = s.plan()
    assert len(engines_by_version(placements)["v0"]) == 2
    utilisation = s.utilisation(placements)
    assert max(utilisation) <= 1.1 * min(utilisation)


def test_room_that_balancing_frees_is_used() -> None:
    """A copy moves off the fullest engine, and an adapter that found no room before takes its place."""
    ranks = [128, 128, 64, 32, 64, 32, 32, 32]
    rates = [50.0, 50.0, 5.0, 1.0, 1.0, 1.0, 20.0, 20.0]
    refs = [adapter_ref(n, rank * MIB // 8, rank) for n, rank in enumerate(ranks)]
    demand = [asked_for(ref, rate) for ref, rate in zip(refs, rates, strict=True)]
    pools = [int(mib * MIB / POOL_FRACTION) + 1 for mib in (30, 20, 2, 16)]
    engines = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n, pool_bytes in enumerate(pools)]
    s = Situation(demand, {ref.version: ref for ref in refs}, engines, cost=CostModel(lora="padded"))
    placements = s.plan()
    room = {e.engine: int(e.pool_bytes * POOL_FRACTION) for e in engines}
    for p in placements:
        room[p.engine] -= s.adapters[p.version].slab_bytes
    left_out = s.adapters.keys() - engines_by_version(placements).keys()
    assert all(s.adapters[version].slab_bytes > max(room.values()) for version in left_out)


def test_with_padded_cost_all_engines_but_one_serve_a_single_rank() -> None:
    s = ranked([8, 128] * 12, 20.0, 4, "padded")
    ranks = ranks_by_engine(s, s.plan())
    assert sorted(len(held) for held in ranks.values())[:3] == [1, 1, 1]
    assert {rank for held in ranks.values() for rank in held} == {8, 128}


def test_separating_ranks_is_worth_its_moves() -> None:
    s = ranked([8, 128] * 12, 20.0, 4, "padded")
    mixed = tuple(copy(n, f"e{n // 2 % 4}") for n in range(24))
    placements = s.plan(mixed)
    assert s.ttft_s(placements) < 0.9 * s.ttft_s(mixed)
    assert max(s.utilisation(placements)) < 0.85 * max(s.utilisation(mixed))


def test_with_exact_cost_balanced_mixed_ranks_stay() -> None:
    s = ranked([8, 128] * 12, 20.0, 4, "exact")
    mixed = tuple(copy(n, f"e{n // 2 % 4}") for n in range(24))
    assert s.plan(mixed) == tuple(sorted(mixed, key=lambda p: (p.name, p.engine)))


def test_with_exact_cost_engines_are_balanced() -> None:
    s = ranked([8, 16, 32, 64, 128] * 8, 12.0, 4, "exact")
    utilisation = s.utilisation(s.plan())
    assert max(utilisation) <= 1.03 * min(utilisation)


def test_with_padded_cost_engines_have_the_utilisation_of_their_bins() -> None:
    s = ranked([8, 16, 32, 64, 128] * 8, 12.0, 4, "padded")
    placements = s.plan()
    # Each adapter takes a tenth of an engine, and none is split to avoid a tenth too much.
    assert max(s.utilisation(placements)) <= 1.1 * fill_bins(s.problem(placements), len(s.engines)).utilisation


@pytest.mark.parametrize("lora", ["padded", "exact"])
def test_an_adapter_that_needs_several_engines_is_split_over_as_many(lora: Literal["padded", "exact"]) -> None:
    s = ranked([16] * 9, 20.0, 4, lora)
    s.demand[0] = asked_for(s.adapters["v0"], 140.0, 140.0)
    placements = s.plan()
    hot = [p for p in placements if p.version == "v0"]
    assert len(hot) in (3, 4)
    utilisation = s.utilisation(placements)
    assert max(utilisation) <= 1.1 * sum(utilisation) / 4


def test_second_copies_of_hot_adapters_are_where_their_rank_slows_no_others() -> None:
    s = ranked([8] * 24 + [64] * 24 + [128] * 24, 8.0, 8, "padded")
    s.demand[0] = asked_for(s.adapters["v0"], 20.0, 20.0)
    s.demand[30] = asked_for(s.adapters["v30"], 20.0, 20.0)
    placements = s.plan()
    placed = engines_by_version(placements)
    assert len(placed["v0"]) == 2
    assert len(placed["v30"]) == 2
    others = ranks_by_engine(s, tuple(p for p in placements if p.version not in ("v0", "v30")))
    assert all(max(others[e]) >= 64 for e in placed["v30"])


def test_second_copies_are_limited_on_few_and_on_many_engines() -> None:
    for engines, most in ((4, 1.03), (12, 1.3)):
        s = ranked([8, 16, 32, 64, 128] * 12, 2.0 * engines, engines, "padded")
        assert len(s.plan()) <= most * 60


def test_adapters_without_demand_go_to_engines_of_their_rank() -> None:
    s = ranked([8] * 10 + [128] * 10 + [128, 64], 20.0, 2, "padded")
    s.demand = s.demand[:20]
    placements = s.plan()
    ranks = ranks_by_engine(s, tuple(p for p in placements if p.version not in ("v20", "v21")))
    assert all(max(ranks[engines_by_version(placements)[version][0]]) == 128 for version in ("v20", "v21"))


@settings(max_examples=20, deadline=None)
@given(noise=st.lists(st.floats(0.95, 1.05), min_size=40, max_size=40), lora=st.sampled_from(["padded", "exact"]))
def test_small_changes_of_demand_cause_few_moves(noise: list[float], lora: Literal["padded", "exact"]) -> None:
    s = ranked([8, 16, 32, 64, 128] * 8, 12.0, 4, lora)
    before = s.plan()
    s.demand = [
        asked_for(s.adapters[d.version], d.decode_tokens_per_s * n, d.prefill_tokens_per_s * n)
        for d, n in zip(s.demand, noise, strict=True)
    ]
    assert count_new(before, s.plan(before)) <= 4


@settings(max_examples=40, deadline=None)
@given(
    rates=st.lists(st.sampled_from([1.0, 5.0, 20.0, 60.0]), min_size=4, max_size=20),
    ranks=st.lists(st.sampled_from([8, 32, 128]), min_size=20, max_size=20),
    engines=st.integers(1, 6),
    lora=st.sampled_from(["padded", "exact"]),
)
@example(rates=[5.0, 5.0, 1.0, 5.0], ranks=[8, 32, 128, 128], engines=2, lora="padded")
@example(
    rates=[1.0, 5.0, 5.0, 60.0, 60.0, 60.0, 1.0, 20.0, 20.0],
    ranks=[8, 8, 32, 32, 32, 32, 128, 128, 128],
    engines=5,
    lora="padded",
)
def test_one_engine_more_is_never_worse(rates, ranks, engines, lora) -> None:
    predicted = []
    for count in (engines, engines + 1):
        s = ranked(ranks[: len(rates)], 1.0, count, lora)
        s.demand = [asked_for(s.adapters[f"v{n}"], rate, rate) for n, rate in enumerate(rates)]
        predicted.append(s.ttft_s(s.plan()))
    assert predicted[1] <= predicted[0] * 1.02


def test_a_better_plan_is_not_taken_if_its_loads_cost_more_than_it_saves() -> None:
    s = ranked([8, 128] * 12, 20.0, 4, "padded")
    mixed = tuple(copy(n, f"e{n // 2 % 4}") for n in range(24))
    s.cost = msgspec.structs.replace(s.cost, load_byte_s=1e-3)
    assert count_new(mixed, s.plan(mixed)) == 0
    s.settings = PlanSettings(interval_s=1e7)
    assert count_new(mixed, s.plan(mixed)) > 0


@pytest.mark.parametrize("lora", ["padded", "exact"])
def test_an_adapter_that_needs_many_engines_gets_them_again_after_losses(lora: Literal["padded", "exact"]) -> None:
    s = ranked([8, 16] * 100, 12.0, 40, lora)
    s.demand[0] = asked_for(s.adapters["v0"], 2400.0, 2400.0)
    placements = s.plan()
    assert max(s.utilisation(placements)) <= 1.2 * fill_bins(s.problem(placements), len(s.engines)).utilisation
    hot = sorted(engines_by_version(placements)["v0"])
    s.engines = [e for e in s.engines if e.engine not in hot[: len(hot) // 2]]
    after = s.plan(placements)
    assert max(s.utilisation(after)) <= 1.25 * fill_bins(s.problem(after), len(s.engines)).utilisation


def test_a_night_without_requests_moves_nothing() -> None:
    s = ranked([8, 128] * 12, 20.0, 4, "padded")
    s.demand[1] = asked_for(s.adapters["v1"], 100.0, 100.0)
    day = s.plan()
    s.demand = []
    assert count_new(day, s.plan(day)) == 0


def test_ranks_are_separated_before_the_first_request() -> None:
    s = ranked([8, 128] * 12, 20.0, 4, "padded")
    s.demand = []
    assert sum(len(ranks) > 1 for ranks in ranks_by_engine(s, s.plan()).values()) <= 1
