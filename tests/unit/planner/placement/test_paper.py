"""The steps of the placement that the paper describes."""

from collections import Counter

import numpy as np
import pytest

from loraserve.cost import CostModel
from loraserve.messages import Placement
from loraserve.planner.placement.paper import operating_points, plan
from loraserve.planner.placement.problem import PlanSettings, build_problem
from loraserve.planner.placement.utilisation import predict_ttft_s
from loraserve.testing.plans import plan_input
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

# Rank 100 costs a token twice what rank 0 would.
PADDED = CostModel(
    lora="padded", step_base_s=0.0, kv_token_s=0.0, prefill_token_s=0.01, sequence_s=0.01,
    padded_prefill_s=1e-4, padded_decode_s=1e-4,
)  # fmt: skip


def placed(
    ranks: list[int], rates: list[float], engines: int, current: tuple[Placement, ...] = ()
) -> tuple[Placement, ...]:
    refs = [adapter_ref(n, rank=rank) for n, rank in enumerate(ranks)]
    demand = [asked_for(ref, rate / 2, rate / 2) for ref, rate in zip(refs, rates, strict=True)]
    loads = [engine_capabilities(f"e{n}", pool_bytes=256 * MIB) for n in range(engines)]
    return plan(plan_input(demand, refs, loads, PADDED, current))


def where(placements: tuple[Placement, ...]) -> dict[str, dict[str, float]]:
    engines: dict[str, dict[str, float]] = {}
    for p in placements:
        engines.setdefault(p.version, {})[p.engine] = p.share
    return engines


def test_an_operating_point_just_meets_the_slo_and_falls_with_rank() -> None:
    refs = [adapter_ref(0, rank=8), adapter_ref(1, rank=100)]
    demand = [asked_for(ref, 10.0, 10.0) for ref in refs]
    settings = PlanSettings(slo_ttft_s=5.0)
    problem = build_problem(plan_input(demand, refs, [engine_capabilities()], PADDED, settings=settings))
    points = operating_points(problem, (8, 100))
    assert points[8] > points[100] > 0
    for rank, tokens_per_s in points.items():
        token_s = 0.01 + rank * 1e-4
        # A request has 50 prefill tokens.
        waits = predict_ttft_s(problem, np.array([tokens_per_s * token_s]), np.array([50 * token_s]))
        assert waits[0] == pytest.approx(5.0, rel=0.01)


def test_a_tighter_slo_lowers_operating_points_to_a_floor() -> None:
    ref = adapter_ref()
    demand = [asked_for(ref, 10.0, 10.0)]
    found = []
    for slo_s in (0.001, 3.0, 6.0):
        settings = PlanSettings(slo_ttft_s=slo_s)
        problem = build_problem(plan_input(demand, [ref], [engine_capabilities()], PADDED, settings=settings))
        found.append(operating_points(problem, (8,))[8])
    assert 0 < found[0] < found[1] < found[2]


def test_ranks_get_servers_in_proportion_to_their_demand() -> None:
    engines: dict[str, set[int]] = {}
    ranks = [100] * 4 + [1] * 8
    for p in placed(ranks, [10.0] * 12, 4):
        engines.setdefault(p.engine, set()).add(ranks[int(p.version[1:])])
    # Rank 100 needs almost 1.5 times the tokens, so it gets two servers of four, without other ranks.
    assert Counter(tuple(sorted(held)) for held in engines.values())[(100,)] >= 1
    assert sum(len(held) == 2 for held in engines.values()) <= 1


def test_adapters_of_one_rank_are_split_when_servers_are_full() -> None:
    shares = where(placed([8, 8, 8], [10.0] * 3, 2))
    assert sorted(len(held) for held in shares.values()) == [1, 1, 2]
    split = next(held for held in shares.values() if len(held) == 2)
    assert sorted(split.values()) == pytest.approx([0.5, 0.5], abs=0.01)


def test_the_remainder_goes_to_a_server_of_a_higher_rank() -> None:
    shares = where(placed([100, 1], [10.0, 10.0], 2))
    high = set(shares["v0"])
    assert high & set(shares["v1"])


def test_servers_are_permuted_for_the_fewest_moves() -> None:
    ranks, rates = [100] * 4 + [1] * 8, [10.0] * 12
    first = placed(ranks, rates, 4)
    rename = {f"e{n}": f"e{(n + 1) % 4}" for n in range(4)}
    turned = tuple(Placement(version=p.version, name=p.name, engine=rename[p.engine], share=p.share) for p in first)
    assert set(placed(ranks, rates, 4, turned)) == set(turned)
