"""The division of work into bins by rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.planner.placement.bins import BinFilling, fill_bins
from loraserve.planner.placement.problem import Problem, build_problem
from loraserve.planner.placement.utilisation import engine_work
from loraserve.testing.plans import plan_input
from loraserve.testing.reports import adapter_ref, asked_for, engine_capabilities

# Only tokens cost, twice as much at rank 100.
COST = CostModel(lora="padded", step_base_s=0.0, kv_token_s=0.0, sequence_s=0.01, padded_decode_s=1e-4)


def problem(ranks: list[int], rates: list[float], engines: int, cost: CostModel = COST) -> Problem:
    refs = [adapter_ref(n, rank=rank) for n, rank in enumerate(ranks)]
    demand = [asked_for(ref, rate) for ref, rate in zip(refs, rates, strict=True)]
    loads = [engine_capabilities(f"e{n}") for n in range(engines)]
    return build_problem(plan_input(demand, refs, loads, cost))


def fill(p: Problem) -> BinFilling:
    return fill_bins(p, len(p.engines))


def utilisation(p: Problem, filling: BinFilling) -> list[float]:
    """Return the utilisation of each bin as the plan's own model computes it from the shares."""
    found: list[float] = engine_work(p, filling.shares).utilisation().tolist()
    return found


def test_bins_of_equal_ranks_have_the_mean_utilisation() -> None:
    p = problem([8] * 6, [10.0] * 6, 4)
    filling = fill(p)
    assert filling.utilisation == pytest.approx(p.own_utilisation().sum() / 4, rel=1e-3)
    assert utilisation(p, filling) == pytest.approx([filling.utilisation] * 4, rel=1e-3)


def test_ranks_are_separated_except_in_one_bin() -> None:
    filling = fill(problem([100] * 3 + [1] * 3, [10.0] * 6, 4))
    assert [part.rank for part in filling.bins] == [100, 100, 100, 1]
    assert [sorted(part.budgets) for part in filling.bins] == [[100], [100], [1, 100], [1]]


def test_two_ranks_that_each_fill_whole_engines_share_no_bin() -> None:
    # At twice the cost, as much traffic of rank 100 fills twice the engines.
    p = problem([100, 1], [20.0, 39.603960396], 2)
    filling = fill(p)
    # The bisection leaves a small remainder.
    budgets = [{kind for kind, budget in part.budgets.items() if budget > 1e-3} for part in filling.bins]
    assert budgets == [{100}, {1}]
    assert filling.utilisation == pytest.approx(0.4, rel=1e-3)


def test_with_exact_cost_there_is_one_class() -> None:
    filling = fill(problem([8, 64], [10.0, 10.0], 2, CostModel()))
    assert {kind for part in filling.bins for kind in part.budgets} == {0}


def test_an_adapter_without_demand_has_no_class_and_no_budget() -> None:
    filling = fill(problem([8, 64], [10.0, 0.0], 2))
    assert filling.class_of == [8, -1]
    assert {kind for part in filling.bins for kind in part.budgets} == {8}


def test_before_the_first_request_all_adapters_count_alike() -> None:
    filling = fill(problem([8, 8, 64], [0.0, 0.0, 0.0], 3))
    assert filling.class_of == [8, 8, 64]
    assert 0 < filling.utilisation < 1e-3


@settings(max_examples=60, deadline=None)
@given(
    adapters=st.lists(st.tuples(st.sampled_from([1, 8, 64, 128]), st.floats(0.1, 100.0)), min_size=1, max_size=12),
    engines=st.integers(1, 6),
    dealt=st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
def test_no_division_of_whole_adapters_has_a_lower_utilisation(adapters, engines: int, dealt: list[int]) -> None:
    ranks, rates = [rank for rank, _ in adapters], [rate for _, rate in adapters]
    p = problem(ranks, rates, engines)
    filling = fill(p)
    base, slope, largest = np.zeros(engines), np.zeros(engines), np.zeros(engines)
    for a, to in zip(range(len(ranks)), dealt, strict=False):
        base[to % engines] += p.work.base[a]
        slope[to % engines] += p.work.slope[a]
        largest[to % engines] = max(largest[to % engines], p.ranks[a])
    assert filling.utilisation <= max(base + largest * slope) * 1.001
    assert max(utilisation(p, filling)) <= filling.utilisation * 1.001
    assert np.bincount(filling.shares.adapters, filling.shares.shares) == pytest.approx(np.ones(len(ranks)))
