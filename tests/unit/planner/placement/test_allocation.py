"""Copies on engines with limited room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.planner.placement.allocation import Allocation
from loraserve.planner.placement.problem import Problem, build_problem
from loraserve.testing.plans import Situation, copy, plan_input
from loraserve.testing.reports import adapter_ref, asked_for, engine_capabilities

PADDED = CostModel(lora="padded", step_base_s=0.0, padded_decode_s=2e-5, padded_prefill_s=1.6e-5)


def problem(ranks: list[int], rates: list[float], engines: int) -> Problem:
    refs = [adapter_ref(n, rank=rank) for n, rank in enumerate(ranks)]
    demand = [asked_for(ref, rate, rate) for ref, rate in zip(refs, rates, strict=True)]
    return build_problem(plan_input(demand, refs, [engine_capabilities(f"e{n}") for n in range(engines)], PADDED))


@settings(max_examples=60, deadline=None)
@given(
    adapters=st.lists(
        st.tuples(
            st.sampled_from([8, 32, 128]),
            st.sampled_from([0.0, 1.0, 20.0, 100.0]),
            st.sets(st.integers(0, 2), min_size=1),
        ),
        min_size=1,
        max_size=8,
    ),
    utilisation=st.sampled_from([0.05, 0.2, 1.0]),
)
def test_dropped_copies_take_their_load_and_rank_with_them(adapters, utilisation: float) -> None:
    p = problem([rank for rank, _, _ in adapters], [rate for _, rate, _ in adapters], 3)
    allocation = Allocation(p)
    allocation.keep([tuple(sorted(held)) for _, _, held in adapters])
    allocation.drop_surplus(utilisation)
    expected = Allocation(p)
    expected.keep(allocation.copies)
    assert allocation.max_rank == expected.max_rank
    assert allocation.room == expected.room
    assert np.array(allocation.load) == pytest.approx(np.array(expected.load))


def test_a_dropped_copy_no_longer_keeps_others_off_its_engine() -> None:
    """Adapter 2 gives up one of its copies; where the load of that copy still counts, adapter 0 shares its engine."""
    refs = [adapter_ref(n, rank=rank) for n, rank in enumerate([8, 128, 8])]
    demand = [asked_for(ref, rate, rate) for ref, rate in zip(refs, [20.0, 1.0, 5.0], strict=True)]
    engines = [engine_capabilities("e0"), engine_capabilities("e1")]
    s = Situation(demand, {ref.version: ref for ref in refs}, engines, cost=PADDED)
    s.current = (copy(1, "e1"), copy(2, "e0", 0.5), copy(2, "e1", 0.5))
    with_stale_load = (copy(0, "e0"), copy(1, "e1"), copy(2, "e0"))
    assert s.ttft_s(s.plan()) < 0.9 * s.ttft_s(with_stale_load)
