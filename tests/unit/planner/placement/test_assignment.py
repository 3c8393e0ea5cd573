"""How much work of a bin finds no room on an engine."""

import numpy as np
import pytest

from loraserve.cost import CostModel
from loraserve.planner.placement.bins import fill_bins, overflow_bytes, tabulate_budgets
from loraserve.planner.placement.problem import POOL_FRACTION, Floats, Problem, build_problem
from loraserve.testing.plans import plan_input
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

PADDED = CostModel(lora="padded", step_base_s=0.0, padded_decode_s=2e-5, padded_prefill_s=1.6e-5)


def problem(
    ranks: list[int], rates: list[float], rooms_mib: list[float], cost: CostModel = PADDED, idle: int = 0
) -> Problem:
    """Return a problem whose slabs take a MiB per 8 ranks, with ``idle`` further adapters without demand."""
    refs = [adapter_ref(n, rank * MIB // 8, rank) for n, rank in enumerate([*ranks, *[8] * idle])]
    demand = [asked_for(ref, rate, rate) for ref, rate in zip(refs, rates, strict=False)]
    pools = [int(mib * MIB / POOL_FRACTION) + 1 for mib in rooms_mib]
    loads = [engine_capabilities(f"e{n}", pool_bytes=pool_bytes) for n, pool_bytes in enumerate(pools)]
    return build_problem(plan_input(demand, refs, loads, cost))


def overflow(p: Problem) -> Floats:
    return overflow_bytes(p, tabulate_budgets(fill_bins(p, len(p.engines))))


@pytest.mark.parametrize("room_mib", [0, 1, 12, 1000])
def test_overflow_is_equal_where_all_engines_have_the_same_room(room_mib: float) -> None:
    assert not overflow(problem([8, 128] * 6, [20.0] * 12, [room_mib] * 3)).any()


def test_nothing_overflows_where_the_smallest_engine_has_room_for_all() -> None:
    assert not overflow(problem([8, 128] * 4, [20.0] * 8, [80.0, 100.0])).any()


def test_only_a_bin_that_is_too_large_for_a_small_pool_overflows_there() -> None:
    # All 8 of rank 128 fill one engine, 128 MiB; those of rank 8 take 16.
    p = problem([128] * 8 + [8] * 16, [20.0] * 24, [32.0, 200.0])
    high, low = overflow(p)
    assert high[0] > 0
    assert high[1] == 0
    assert low == pytest.approx([0.0, 0.0])


def test_a_few_hot_adapters_suit_a_small_pool() -> None:
    """With as many bytes, less work overflows if a few adapters have most of it."""
    even = overflow(problem([8] * 20, [10.0] * 20, [4.0, 100.0], CostModel()))
    steep = overflow(problem([8] * 20, [90.0, 90.0, *[20 / 18] * 18], [4.0, 100.0], CostModel()))
    assert 0 < steep[0, 0] < even[0, 0] / 3


def test_adapters_without_demand_do_not_overflow() -> None:
    p = problem([8] * 4, [10.0] * 4, [4.0, 100.0], CostModel(), idle=50)
    assert not overflow(p).any()


def test_without_adapters_nothing_overflows() -> None:
    assert overflow(problem([], [], [4.0, 100.0])).shape == (2, 2)
    assert not np.any(overflow(problem([], [], [4.0, 100.0])))
