"""When a step may start before its adapter has been read, and the estimate of the remaining read."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.cost import StepShape, mean_step
from loraserve.engine.schedule.early import MARGIN, MIN_GAIN_S, SLACK_S, min_prefill_tokens, remaining_read_s
from loraserve.engine.schedule.report import SpeedMeter
from loraserve.messages import MeasuredSpeed

SECONDS = st.floats(MIN_GAIN_S, 10.0)


def measured(decode_s: float = 0.0, prefill_tokens: int = 0, prefill_s: float = 0.0) -> MeasuredSpeed:
    rates = SpeedMeter()
    if decode_s:
        rates.record_step(StepShape(decode_sequences=1), decode_s)
    if prefill_s:
        rates.record_step(StepShape(prefill_tokens=prefill_tokens), prefill_s)
    return rates.measured()


def test_the_remaining_read_follows_the_expectation_or_the_reads_own_pace() -> None:
    assert remaining_read_s(expected_s=1.0, elapsed_s=0.2, fraction=0.9) == pytest.approx(0.8)
    assert remaining_read_s(expected_s=1.0, elapsed_s=1.5, fraction=0.5) == pytest.approx(1.5)
    assert remaining_read_s(expected_s=1.0, elapsed_s=2.0, fraction=1.0) == 0.0


@given(left_s=SECONDS)
def test_no_step_starts_early_before_one_was_measured(left_s: float) -> None:
    assert min_prefill_tokens(left_s, measured()) is None


@given(left_s=SECONDS, tokens=st.integers(1, 4096), prefill_s=st.floats(1e-4, 60.0))
def test_a_step_of_the_least_tokens_lasts_as_long_as_the_remaining_read(
    left_s: float, tokens: int, prefill_s: float
) -> None:
    least = min_prefill_tokens(left_s, measured(prefill_tokens=tokens, prefill_s=prefill_s))
    needed_s = MARGIN * left_s + SLACK_S
    if least is None:
        assert prefill_s < needed_s
    else:
        assert 1 <= least <= tokens
        assert least * prefill_s / tokens >= needed_s * 0.999
        assert least == 1 or (least - 1) * prefill_s / tokens < needed_s * 1.001


@given(left_s=SECONDS)
def test_any_step_lasts_at_least_as_long_as_a_decode_step(left_s: float) -> None:
    assert min_prefill_tokens(left_s, measured(decode_s=MARGIN * left_s + SLACK_S)) == 1
    assert min_prefill_tokens(left_s, measured(decode_s=MARGIN * left_s)) is None


def test_a_short_remaining_read_is_waited_for() -> None:
    assert min_prefill_tokens(MIN_GAIN_S / 2, measured(decode_s=10.0)) is None
    assert min_prefill_tokens(0.0, measured(decode_s=10.0)) is None


def test_a_read_of_unknown_duration_is_waited_for() -> None:
    assert min_prefill_tokens(inf, measured(10.0, 100, 20.0)) is None


def test_only_steps_with_prefill_give_the_prefill_pace() -> None:
    rates = SpeedMeter()
    rates.record_step(StepShape(prefill_tokens=16), 0.04)
    rates.record_step(StepShape(decode_sequences=4), 0.001)
    assert rates.measured().prefill_step == mean_step(StepShape(prefill_tokens=16), 0.04)
    assert min_prefill_tokens(0.011, rates.measured()) == 8
