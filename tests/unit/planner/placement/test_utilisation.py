"""The predicted utilisation of engines and TTFT of requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.planner.placement.problem import CopyShares, Problem, build_problem
from loraserve.planner.placement.utilisation import engine_work, mean_ttft_s, placed_fraction, predict_ttft_s
from loraserve.testing.plans import plan_input
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_capabilities

PADDED = CostModel(lora="padded", step_base_s=0.0, kv_token_s=0.0, prefill_token_s=0.001, sequence_s=0.01)


def problem(*ranks: int, cost: CostModel = PADDED, rate: float = 10.0) -> Problem:
    refs = [adapter_ref(n, rank=rank) for n, rank in enumerate(ranks)]
    demand = [asked_for(ref, rate, rate) for ref in refs]
    loads = [engine_capabilities(f"e{n}") for n in range(2)]
    return build_problem(plan_input(demand, refs, loads, cost))


def on(*engines: int, share: float = 1.0) -> CopyShares:
    """Place adapter i on the i-th of these engines."""
    count = len(engines)
    return CopyShares(np.arange(count), np.array(engines), np.full(count, share))


def test_padded_tokens_pay_for_the_largest_rank_of_their_engine() -> None:
    p = problem(8, 100)
    apart, together = engine_work(p, on(0, 1)), engine_work(p, on(0, 0))
    base = 10 * 0.001 + 10 * 0.01
    assert apart.utilisation() == pytest.approx([base + 8 * 1e-4, base + 100 * 1e-4])
    assert together.utilisation() == pytest.approx([2 * (base + 100 * 1e-4), 0.0])


def test_exact_tokens_pay_for_their_own_rank() -> None:
    cost = CostModel(step_base_s=0.0, kv_token_s=0.0, slab_byte_s=0.0, rank_token_s=1e-5)
    p = problem(8, 100, cost=cost)
    apart, together = engine_work(p, on(0, 1)).utilisation(), engine_work(p, on(0, 0)).utilisation()
    assert together[0] == pytest.approx(apart.sum())


def test_the_slab_of_an_adapter_with_split_traffic_is_read_more_often() -> None:
    cost = CostModel(lora="exact", slab_byte_s=1e-9)
    p = problem(8, cost=cost, rate=200.0)
    whole = engine_work(p, on(0)).utilisation().sum()
    halves = CopyShares(np.array([0, 0]), np.array([0, 1]), np.array([0.5, 0.5]))
    assert engine_work(p, halves).utilisation().sum() > whole
    # At most once per step of each engine.
    assert engine_work(p, halves).utilisation().sum() < whole + p.steps_per_s * MIB * 1e-9


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 3), st.floats(0, 3), st.floats(1e-4, 2))
def test_fuller_engines_start_requests_later(one: float, other: float, prefill_s: float) -> None:
    p = problem(8)
    low, high = sorted((one, other))
    early, late = predict_ttft_s(p, np.array([low, high]), np.array([prefill_s] * 2))
    assert prefill_s <= early <= late
    if low > 0.06 and high > low * 1.001:
        assert early < late


def test_waiting_time_is_that_of_an_mm1_queue() -> None:
    p = problem(8, cost=CostModel(step_base_s=0.0, sequence_s=0.0))
    # M/M/1 at half load: P(wait > t) = 0.5 exp(-t / 2), which is 0.05 at 2 ln 10.
    assert predict_ttft_s(p, np.array([0.5]), np.array([1.0]))[0] == pytest.approx(1 + 2 * np.log(10))


def test_an_adapter_without_a_copy_is_loaded_for_each_request() -> None:
    p = problem(8, 8)
    everywhere, half = mean_ttft_s(p, on(0, 1)), mean_ttft_s(p, on(0))
    load_s = p.cost.load_base_s + MIB * p.cost.load_byte_s
    assert half == pytest.approx(everywhere + load_s / 2)
    assert placed_fraction(p, on(0)) == pytest.approx(0.5)


def test_without_demand_nothing_waits() -> None:
    p = problem(8, rate=0.0)
    assert p.no_demand
    assert mean_ttft_s(p, on(0)) == pytest.approx(engine_work(p, on(0)).prefill_s()[0], rel=1e-3)
    assert placed_fraction(p, on(0)) == 1.0
