"""The cost model assigns measured times to the terms that caused them, for prefill steps, decode steps and loads."""

from math import inf, nan
from random import Random

import msgspec
import pytest

from loraserve.cost import LEARNING_RATE, CostModel, StepShape, mean_step
from loraserve.messages import MeasuredSpeed
from loraserve.testing.reports import MIB, measured_speed

EXACT = CostModel(prefill_kv_token_s=1e-7)
PADDED = msgspec.structs.replace(EXACT, lora="padded")
OF_PREFILL = ("prefill_token_s", "prefill_kv_token_s", "padded_prefill_s")
OF_LOADS = ("load_base_s", "load_byte_s")
BLOCK_TOKENS = 16

either = pytest.mark.parametrize("cost", [EXACT, PADDED], ids=["exact", "padded"])


def times(cost: CostModel, factor: float, *names: str) -> CostModel:
    return msgspec.structs.replace(cost, **{name: factor * getattr(cost, name) for name in names})


def everything(cost: CostModel) -> tuple[str, ...]:
    return tuple(name for name in cost.__struct_fields__ if name != "lora")


def shapes(rng: Random) -> tuple[StepShape, StepShape]:
    """Return a decode step and a step that adds prefill to it. All sequences use one adapter."""
    sequences, blocks, rank = rng.randint(1, 40), rng.randint(10, 500), rng.choice((8, 16, 64))
    decode = StepShape(
        decode_sequences=sequences,
        kv_tokens=blocks * BLOCK_TOKENS,
        slab_bytes=rank * MIB,
        rank_tokens=sequences * rank,
        max_rank=rank,
    )
    tokens = rng.randint(10, 500)
    prefill = msgspec.structs.replace(
        decode,
        prefill_tokens=tokens,
        prefill_kv_tokens=tokens * tokens / 2,
        rank_tokens=(sequences + tokens) * rank,
    )
    return decode, prefill


def report(hardware: CostModel, rng: Random) -> MeasuredSpeed:
    """Return the report of an engine whose times are exactly those of ``hardware``."""
    decode, prefill = shapes(rng)
    load_bytes = rng.choice((1, 20, 400)) * MIB
    return measured_speed(
        decode_step=mean_step(decode, hardware.step_s(decode)),
        prefill_step=mean_step(prefill, hardware.step_s(prefill)),
        load_bytes=float(load_bytes),
        load_bytes_per_s=load_bytes / hardware.load_s(load_bytes),
    )


def learned(cost: CostModel, hardware: CostModel, reports: int = 1000) -> CostModel:
    rng = Random(0)
    for _ in range(reports):
        cost = cost.observe(report(hardware, rng))
    return cost


@either
def test_exact_predictions_change_no_coefficient(cost: CostModel) -> None:
    after = learned(cost, hardware=cost, reports=300)
    for name in everything(cost):
        assert getattr(after, name) == pytest.approx(getattr(cost, name), rel=1e-9), name


@either
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_model_converges_to_hardware_of_another_speed(cost: CostModel, factor: float) -> None:
    hardware = times(cost, factor, *everything(cost))
    after = learned(cost, hardware)
    for name in ("prefill_token_s", "sequence_s", "step_base_s", *OF_LOADS):
        assert getattr(after, name) == pytest.approx(getattr(hardware, name), rel=0.1), name
    rng = Random(1)
    for shape in (shape for _ in range(100) for shape in shapes(rng)):
        assert after.step_s(shape) == pytest.approx(hardware.step_s(shape), rel=0.1)
    assert after.load_s(100 * MIB) == pytest.approx(hardware.load_s(100 * MIB), rel=0.05)


@either
def test_slow_prefill_does_not_raise_the_decode_terms(cost: CostModel) -> None:
    hardware = times(cost, 2.0, *OF_PREFILL)
    after = learned(cost, hardware)
    assert after.prefill_token_s == pytest.approx(hardware.prefill_token_s, rel=0.1)
    for name in ("step_base_s", "sequence_s"):
        assert getattr(after, name) == pytest.approx(getattr(cost, name), rel=0.1), name
    assert all(getattr(after, name) == getattr(cost, name) for name in OF_LOADS)


def test_decoding_in_a_prefill_step_does_not_raise_the_prefill_term() -> None:
    shape = StepShape(decode_sequences=40, kv_tokens=50_000, prefill_tokens=10)
    assert 10 / EXACT.step_s(shape) < 0.2 / EXACT.prefill_token_s, (
        "prefill tokens per second alone suggest slow prefill"
    )
    load = measured_speed(prefill_step=mean_step(shape, EXACT.step_s(shape)), load_bytes_per_s=0.0)
    assert EXACT.observe(load).prefill_token_s == pytest.approx(EXACT.prefill_token_s)


def test_the_base_time_of_small_loads_does_not_raise_the_byte_term() -> None:
    small = measured_speed(load_bytes=1000.0, load_bytes_per_s=1000 / EXACT.load_s(1000))
    assert EXACT.observe(small).load_byte_s == pytest.approx(EXACT.load_byte_s)


def test_a_load_without_a_size_is_ignored() -> None:
    assert EXACT.observe(measured_speed(load_bytes_per_s=1.0, load_bytes=0.0)) == EXACT


def test_prefill_terms_of_zero_are_learned_without_changing_decode_terms() -> None:
    free = times(EXACT, 0.0, *OF_PREFILL)
    decode = StepShape(decode_sequences=4)
    step = msgspec.structs.replace(decode, prefill_tokens=100)
    reported = measured_speed(
        decode_step=mean_step(decode, free.step_s(decode)),
        prefill_step=mean_step(step, free.step_s(decode) + 0.2),
    )
    cost = free
    for _ in range(1000):
        cost = cost.observe(reported)
    assert cost.prefill_token_s == pytest.approx(0.002, rel=0.02)
    assert cost.step_s(decode) == pytest.approx(free.step_s(decode), rel=0.02)


def test_the_first_prefill_measurement_excludes_the_predicted_decode_time() -> None:
    free = times(EXACT, 0.0, *OF_PREFILL)
    step = StepShape(decode_sequences=40, kv_tokens=50_000, prefill_tokens=100)
    cost = free.observe(measured_speed(prefill_step=mean_step(step, free.step_s(step) + 0.2)))
    assert cost.prefill_token_s == pytest.approx(LEARNING_RATE * 0.2 / 100)


@either
@pytest.mark.parametrize("measured_s", [nan, inf, -inf, -1.0])
def test_impossible_durations_are_ignored(cost: CostModel, measured_s: float) -> None:
    decode, prefill = shapes(Random(0))
    steps = {"decode_step": mean_step(decode, measured_s), "prefill_step": mean_step(prefill, measured_s)}
    for current in (cost, times(cost, 0.0, *OF_PREFILL), times(cost, 0.0, *everything(cost))):
        assert current.observe(measured_speed(load_bytes_per_s=0.0, **steps)) == current
        assert current.observe(measured_speed(load_bytes=1e6, load_bytes_per_s=1e6 / measured_s)) == current
        assert current.observe(measured_speed(load_bytes=measured_s)) == current


def test_a_measured_step_is_compared_with_its_own_contents() -> None:
    small = StepShape(decode_sequences=1)
    load = measured_speed(decode_step=mean_step(small, EXACT.step_s(small)))
    assert EXACT.observe(load).sequence_s == pytest.approx(EXACT.sequence_s)
