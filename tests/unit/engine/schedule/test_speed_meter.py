"""Measured speed: the first observation is the mean, later ones change it slowly."""

import pytest

from loraserve.cost import StepShape
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.engine.schedule.report import SpeedMeter, step_shape
from loraserve.messages import MeanLoad, SamplingParams


def part(tokens: int, output_index: int) -> SequenceStep:
    return SequenceStep(
        request_id=f"r{tokens}",
        tokens=(1,) * tokens,
        start=0,
        blocks=(0,),
        sampling=SamplingParams(max_tokens=9),
        prompt_length=1,
        output_index=output_index,
    )


def step(*parts: SequenceStep) -> StepShape:
    return step_shape(StepBatch(step_id=1, sequences=parts), {})[0]


DECODE = part(1, output_index=3)


def test_the_rates_before_any_measurement() -> None:
    meter = SpeedMeter()
    seen = meter.measured()
    assert (seen.decode_step_s, seen.prefill_tokens_per_s) == (0.0, 0.0)
    assert (seen.prefill_step, seen.load) == (None, None)


def test_the_first_observation_is_the_mean() -> None:
    meter = SpeedMeter()
    meter.record_step(step(DECODE), 0.02)
    meter.record_step(step(DECODE, part(100, 0)), 0.5)
    meter.record_load(1_000_000, 0.5)
    seen = meter.measured()
    assert (seen.decode_step_s, seen.prefill_tokens_per_s) == (0.02, 200.0)
    assert seen.load == MeanLoad(slab_bytes=1e6, bytes_per_s=2e6)


def test_steps_with_prefill_do_not_count_as_decode_steps() -> None:
    meter = SpeedMeter()
    meter.record_step(step(DECODE), 0.02)
    meter.record_step(step(DECODE, part(512, 0)), 3.0)
    meter.record_step(step(part(1, 0)), 3.0)
    assert meter.measured().decode_step_s == 0.02


def test_recomputing_a_preempted_request_is_prefill() -> None:
    meter = SpeedMeter()
    meter.record_step(step(DECODE, part(40, 5)), 0.5)
    seen = meter.measured()
    assert (seen.decode_step_s, seen.prefill_tokens_per_s) == (0.0, 80.0)


def test_one_slow_step_changes_the_mean_little_and_many_replace_it() -> None:
    meter = SpeedMeter()
    meter.record_step(step(DECODE), 0.01)
    meter.record_step(step(DECODE), 1.0)
    assert 0.01 < meter.measured().decode_step_s < 0.2
    for _ in range(100):
        meter.record_step(step(DECODE), 1.0)
    assert meter.measured().decode_step_s == pytest.approx(1.0, rel=0.01)


def test_steps_and_loads_are_counted() -> None:
    meter = SpeedMeter()
    meter.record_step(step(DECODE), 0.02)
    meter.record_step(step(DECODE), 0.02, times=6)
    meter.record_step(step(DECODE, part(40, 5)), 0.5, times=2)
    meter.record_load(1000, 0.1)
    seen = meter.measured()
    assert (seen.decode_steps, seen.prefill_steps, seen.loads) == (7, 2, 1)


@pytest.mark.parametrize("taken_s", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_durations_are_ignored(taken_s: float) -> None:
    meter = SpeedMeter()
    meter.record_step(step(part(10, 0)), taken_s)
    meter.record_step(step(DECODE), taken_s)
    meter.record_load(1000, taken_s)
    assert meter.measured() == SpeedMeter().measured()


def test_reported_means_are_of_the_same_steps_and_loads() -> None:
    meter = SpeedMeter()
    contents = [(part(100, 0),), (DECODE, part(5, 0)), (DECODE, DECODE, part(700, 0)), (part(1, 0),)]
    for parts in contents:
        shape = step(*parts)
        meter.record_step(shape, 0.01 + 0.002 * shape.decode_sequences + 0.001 * shape.prefill_tokens)
        meter.record_load(len(parts) << 20, 0.005 + 1e-9 * (len(parts) << 20))
    seen = meter.measured()
    mean = seen.prefill_step
    assert mean is not None
    assert mean.duration_s == pytest.approx(0.01 + 0.002 * mean.decode_sequences + 0.001 * mean.prefill_tokens)
    assert seen.prefill_tokens_per_s == pytest.approx(mean.prefill_tokens / mean.duration_s)
    assert seen.load is not None
    assert seen.load.slab_bytes / seen.load.bytes_per_s == pytest.approx(0.005 + 1e-9 * seen.load.slab_bytes)
    assert 1 << 20 < seen.load.slab_bytes < 3 << 20


def test_a_steps_shape_has_its_largest_rank() -> None:
    meter = SpeedMeter()
    meter.record_step(StepShape(decode_sequences=3, prefill_tokens=10, max_rank=8), 0.1)
    meter.record_step(StepShape(decode_sequences=3, prefill_tokens=10, max_rank=64), 0.1)
    mean = meter.measured().prefill_step
    assert mean is not None
    rank = 0.9 * 8 + 0.1 * 64
    assert (mean.padded_decode_tokens, mean.padded_prefill_tokens) == pytest.approx((3 * rank, 10 * rank))
