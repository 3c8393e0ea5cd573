"""Measured rates: the first observation counts whole, later ones move the picture slowly."""

import pytest

from loraserve.engine.batch import SequenceStep, StepBatch
from loraserve.engine.rates import Rates
from loraserve.messages import SamplingParams


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


def batch(*parts: SequenceStep) -> StepBatch:
    return StepBatch(step_id=1, sequences=parts)


DECODE = part(1, output_index=3)


def test_nothing_measured_is_zero() -> None:
    rates = Rates()
    assert (rates.decode_step_s, rates.prefill_tokens_per_s, rates.load_bytes_per_s) == (0.0, 0.0, 0.0)


def test_the_first_observation_is_taken_as_it_is() -> None:
    rates = Rates()
    rates.step_done(batch(DECODE).prefill_tokens, 0.02)
    rates.step_done(batch(DECODE, part(100, 0)).prefill_tokens, 0.5)
    rates.load_done(1e6)
    assert (rates.decode_step_s, rates.prefill_tokens_per_s, rates.load_bytes_per_s) == (0.02, 200.0, 1e6)


def test_steps_with_prefill_say_nothing_about_decoding() -> None:
    rates = Rates()
    rates.step_done(batch(DECODE).prefill_tokens, 0.02)
    rates.step_done(batch(DECODE, part(512, 0)).prefill_tokens, 3.0)
    rates.step_done(batch(part(1, 0)).prefill_tokens, 3.0)
    assert rates.decode_step_s == 0.02


def test_computing_again_what_was_preempted_is_prefill() -> None:
    rates = Rates()
    rates.step_done(batch(DECODE, part(40, 5)).prefill_tokens, 0.5)
    assert (rates.decode_step_s, rates.prefill_tokens_per_s) == (0.0, 80.0)


def test_one_slow_step_changes_little_and_many_change_all() -> None:
    rates = Rates()
    rates.step_done(batch(DECODE).prefill_tokens, 0.01)
    rates.step_done(batch(DECODE).prefill_tokens, 1.0)
    assert 0.01 < rates.decode_step_s < 0.2
    for _ in range(100):
        rates.step_done(batch(DECODE).prefill_tokens, 1.0)
    assert rates.decode_step_s == pytest.approx(1.0, rel=0.01)


def test_a_step_that_took_no_time_is_not_counted() -> None:
    rates = Rates()
    rates.step_done(batch(part(10, 0)).prefill_tokens, 0.0)
    rates.step_done(batch(DECODE).prefill_tokens, -1.0)
    assert (rates.decode_step_s, rates.prefill_tokens_per_s) == (0.0, 0.0)
