"""When a step may begin before the last of an adapter is there, and how long that is reckoned to take."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.cost import StepShape, mean_step
from loraserve.engine.schedule.early import MARGIN, MIN_GAIN_S, SLACK_S, min_prefill_tokens, remaining_read_s
from loraserve.engine.schedule.report import Measured, Rates

SECONDS = st.floats(MIN_GAIN_S, 10.0)


def measured(decode_s: float = 0.0, prefill_tokens: int = 0, prefill_s: float = 0.0) -> Measured:
    rates = Rates()
    if decode_s:
        rates.step_done(StepShape(decode_sequences=1), decode_s)
    if prefill_s:
        rates.step_done(StepShape(prefill_tokens=prefill_tokens), prefill_s)
    return rates.measured()


def test_a_read_takes_what_its_way_has_shown_or_goes_on_at_its_own_pace() -> None:
    assert remaining_read_s(expected_s=1.0, elapsed_s=0.2, fraction=0.9) == pytest.approx(0.8)
    assert remaining_read_s(expected_s=1.0, elapsed_s=1.5, fraction=0.5) == pytest.approx(1.5)
    assert remaining_read_s(expected_s=1.0, elapsed_s=2.0, fraction=1.0) == 0.0


@given(left_s=SECONDS)
def test_who_has_seen_no_step_begins_none_early(left_s: float) -> None:
    assert min_prefill_tokens(left_s, measured()) is None


@given(left_s=SECONDS, tokens=st.integers(1, 4096), prefill_s=st.floats(1e-4, 60.0))
def test_a_step_of_the_min_prefill_tokens_lasts_as_long_as_the_rest_by_the_pace_of_the_usual_one(
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
def test_any_step_lasts_as_long_as_one_that_decodes(left_s: float) -> None:
    assert min_prefill_tokens(left_s, measured(decode_s=MARGIN * left_s + SLACK_S)) == 1
    assert min_prefill_tokens(left_s, measured(decode_s=MARGIN * left_s)) is None


def test_what_is_there_in_a_moment_is_waited_for() -> None:
    assert min_prefill_tokens(MIN_GAIN_S / 2, measured(decode_s=10.0)) is None
    assert min_prefill_tokens(0.0, measured(decode_s=10.0)) is None


def test_a_way_that_is_not_known_to_end_is_waited_for() -> None:
    assert min_prefill_tokens(inf, measured(10.0, 100, 20.0)) is None


def test_the_pace_is_that_of_steps_with_prefill_alone() -> None:
    rates = Rates()
    rates.step_done(StepShape(prefill_tokens=16), 0.04)
    rates.step_done(StepShape(decode_sequences=4), 0.001)
    assert rates.measured().prefill_step == mean_step(StepShape(prefill_tokens=16), 0.04)
    assert min_prefill_tokens(0.011, rates.measured()) == 8
