"""The cost model: predictions, corrections by measurements, storage, and sizes of extents."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import (
    LARGEST_SURPRISE,
    LEARNING_RATE,
    CostModel,
    StepShape,
    extent_bytes,
    largest_extent_bytes,
    mean_step,
)
from loraserve.engine.adapters.pool import ExtentAllocator
from loraserve.messages import MeanStep
from loraserve.testing.reports import MIB, measured_speed

COST = CostModel()
PADDED = CostModel(lora="padded")
COEFFICIENTS = [name for name in CostModel.__struct_fields__ if name != "lora"]
CONTENTS = dict.fromkeys(MeanStep.__struct_fields__, st.floats(0.0, 1e9))
MEAN_STEPS = st.builds(MeanStep, **{**CONTENTS, "duration_s": st.floats()})
LOADED = ("decode_sequences", "kv_tokens", "prefill_tokens", "slab_bytes", "rank_tokens")


def learned(cost: CostModel, reports: int = 1, **changes: Any) -> CostModel:
    for _ in range(reports):
        cost = cost.observe(measured_speed(**changes))
    return cost


def test_an_empty_step_costs_its_base() -> None:
    assert COST.step_s(StepShape()) == COST.step_base_s


@pytest.mark.parametrize("term", LOADED)
def test_a_step_costs_more_for_everything_in_it_and_in_proportion(term: str) -> None:
    def extra_s(amount: int) -> float:
        return COST.step_s(StepShape(**{term: amount})) - COST.step_base_s

    assert extra_s(1000) > 0
    assert extra_s(3000) == pytest.approx(3 * extra_s(1000))


def test_a_load_costs_its_base_and_its_bytes() -> None:
    assert COST.load_s(0) == COST.load_base_s
    assert COST.load_s(2 * MIB) - COST.load_s(MIB) == pytest.approx(MIB * COST.load_byte_s)


def step_of_rank(rank: int) -> StepShape:
    return StepShape(
        decode_sequences=50,
        prefill_tokens=100,
        slab_bytes=MIB if rank else 0,
        rank_tokens=150 * rank,
        max_rank=rank,
    )


def test_a_step_of_a_higher_rank_takes_longer() -> None:
    ranks = [COST.step_s(step_of_rank(rank)) for rank in (0, 8, 64, 256)]
    assert ranks == sorted(set(ranks))


def test_slab_bytes_weigh_more_on_each_sequence_the_fewer_there_are() -> None:
    def slab_s(sequences: int) -> float:
        with_slab = COST.step_s(StepShape(decode_sequences=sequences, slab_bytes=64 * MIB))
        return (with_slab - COST.step_s(StepShape(decode_sequences=sequences))) / sequences

    assert slab_s(1) == pytest.approx(64 * MIB * COST.slab_byte_s)
    assert slab_s(100) < slab_s(1) / 10


def test_an_idle_engine_that_measured_nothing_teaches_nothing() -> None:
    assert learned(COST) == COST
    assert learned(COST, load_bytes_per_s=5.0) == COST, "nor one that does not say what it loaded"


@pytest.mark.parametrize("duration_s", [1e-9, 1e6])
def test_one_odd_report_moves_it_only_a_little(duration_s: float) -> None:
    cost = learned(COST, prefill_step=mean_step(StepShape(prefill_tokens=1000), duration_s))
    change = cost.prefill_token_s / COST.prefill_token_s
    assert 1 - LEARNING_RATE < change <= 1 + LEARNING_RATE * (LARGEST_SURPRISE - 1)
    assert change != 1


@pytest.mark.parametrize("step_s", [0.004, 0.1, 0.4])
def test_decode_steps_are_predicted_as_they_are_measured(step_s: float) -> None:
    shape = StepShape(decode_sequences=8, kv_tokens=100 * 16, slab_bytes=20 * MIB, rank_tokens=6 * 64)
    cost = learned(COST, reports=300, decode_step=mean_step(shape, step_s))
    predicted = cost.step_s(shape)
    assert predicted == pytest.approx(step_s, rel=0.05)
    assert cost.prefill_token_s == COST.prefill_token_s


def test_the_largest_term_of_a_step_is_corrected_most() -> None:
    cost = learned(COST, decode_step=mean_step(StepShape(decode_sequences=1), 0.1))
    assert cost.step_base_s / COST.step_base_s > cost.sequence_s / COST.sequence_s > 1
    assert cost.slab_byte_s == COST.slab_byte_s, "no adapter ran"


@pytest.mark.parametrize("step_s", [0.004, 0.1])
def test_padded_steps_are_learned_at_the_largest_rank_that_runs(step_s: float) -> None:
    shape = StepShape(decode_sequences=8, slab_bytes=20 * MIB, rank_tokens=6 * 64 + 2 * 8, max_rank=64)
    cost = learned(PADDED, reports=300, decode_step=mean_step(shape, step_s))
    assert cost.step_s(shape) == pytest.approx(step_s, rel=0.05)
    assert cost.padded_decode_s != PADDED.padded_decode_s
    assert (cost.slab_byte_s, cost.rank_token_s) == (PADDED.slab_byte_s, PADDED.rank_token_s), "not its terms"


def test_a_padded_step_of_a_higher_rank_takes_longer() -> None:
    ranks = [PADDED.step_s(step_of_rank(rank)) for rank in (0, 8, 64, 256)]
    assert ranks == sorted(set(ranks))
    assert ranks[1] - ranks[0] == pytest.approx(8 * (100 * PADDED.padded_prefill_s + 50 * PADDED.padded_decode_s))


def test_a_coefficient_of_zero_can_be_learned_again() -> None:
    shape = StepShape(decode_sequences=8, kv_tokens=1000)
    without = msgspec.structs.replace(COST, kv_token_s=0.0)
    cost = learned(without, reports=300, decode_step=mean_step(shape, 0.1))
    assert cost.kv_token_s == 0.0
    assert cost.step_s(shape) == pytest.approx(0.1, rel=0.05)


def test_a_model_of_nothing_but_zeros_learns() -> None:
    nothing = CostModel(**dict.fromkeys(COEFFICIENTS, 0.0))
    assert nothing.step_s(step_of_rank(8)) == 0.0
    decode = StepShape(decode_sequences=4)
    prefill = msgspec.structs.replace(decode, prefill_tokens=500)
    steps = {"decode_step": mean_step(decode, 0.05), "prefill_step": mean_step(prefill, 1.05)}
    cost = learned(nothing, reports=200, load_bytes=1e7, load_bytes_per_s=1e9, **steps)
    assert cost.step_s(decode) == pytest.approx(0.05, rel=0.01)
    assert cost.prefill_token_s == pytest.approx(1 / 500, rel=0.01)
    assert cost.load_byte_s == pytest.approx(1e-9, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(
    lora=st.sampled_from(["exact", "padded"]),
    zeros=st.sets(st.sampled_from(COEFFICIENTS)),
    reports=st.lists(
        st.fixed_dictionaries(
            {
                "load_bytes_per_s": st.floats(),
                "load_bytes": st.floats(),
                "decode_step": st.none() | MEAN_STEPS,
                "prefill_step": st.none() | MEAN_STEPS,
            }
        ),
        max_size=30,
    ),
)
def test_whatever_is_measured_every_coefficient_stays_finite_and_not_negative(
    lora: str, zeros: set[str], reports: list[dict[str, Any]]
) -> None:
    cost = msgspec.structs.replace(COST, lora=lora, **dict.fromkeys(zeros, 0.0))
    for report in reports:
        cost = cost.observe(measured_speed(**report))
    values = [v for v in msgspec.structs.astuple(cost) if not isinstance(v, str)]
    assert min(values) >= 0
    assert all(math.isfinite(value) for value in values)


@settings(max_examples=200, deadline=None)
@given(pool_bytes=st.integers(0, 1 << 30), slab_bytes=st.integers(0, 1 << 28))
def test_memory_is_priced_as_the_engine_gives_it_out(pool_bytes: int, slab_bytes: int) -> None:
    pool = ExtentAllocator(pool_bytes)
    assert largest_extent_bytes(pool_bytes) == pool.largest_bytes
    assert extent_bytes(slab_bytes) == pool.extent_bytes(slab_bytes)
    fits = extent_bytes(slab_bytes) <= largest_extent_bytes(pool_bytes)
    assert (pool.allocate(slab_bytes) is not None) == fits
    taken_bytes = largest_extent_bytes(pool_bytes) - pool.free_bytes
    assert taken_bytes == (extent_bytes(slab_bytes) if fits else 0)
