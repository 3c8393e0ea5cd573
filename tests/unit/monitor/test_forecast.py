"""Forecasters find level and trend, know their errors, and are weighted by how close they were."""

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.monitor.forecast import Forecaster, Holt, Mixture, Smoothed, TrackedForecast

STEP_S, HORIZON_STEPS = 5.0, 6

MAKERS: dict[str, Callable[[], Forecaster]] = {
    "smoothed": lambda: Smoothed(STEP_S, 120.0),
    "holt": lambda: Holt(STEP_S, HORIZON_STEPS),
    "damped": lambda: Holt(STEP_S, HORIZON_STEPS, damping=0.9),
    "mixture": lambda: Mixture(STEP_S, HORIZON_STEPS),
}
every_forecaster = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tracked(forecaster: Forecaster, values: list[float]) -> TrackedForecast:
    """Return the forecaster after these steps."""
    found = TrackedForecast(forecaster, STEP_S, HORIZON_STEPS)
    for value in values:
        found.observe(value)
    return found


@every_forecaster
def test_the_forecast_is_zero_before_the_first_step(make: Callable[[], Forecaster]) -> None:
    assert make().forecast() == 0.0
    assert tracked(make(), []).std_tokens_per_s == 0.0


@every_forecaster
@given(values=st.lists(st.floats(0.0, 1e9), max_size=60))
def test_a_forecast_is_finite_and_not_negative(make: Callable[[], Forecaster], values: list[float]) -> None:
    found = TrackedForecast(make(), STEP_S, HORIZON_STEPS)
    for value in values:
        found.observe(value)
        assert 0.0 <= found.forecaster.forecast() < math.inf
        assert found.tokens_per_s == found.forecaster.forecast()
        assert 0.0 <= found.std_tokens_per_s < math.inf


@every_forecaster
@given(value=st.floats(0.0, 1e6), steps=st.integers(1, 60))
def test_constant_demand_is_forecast_exactly(make: Callable[[], Forecaster], value: float, steps: int) -> None:
    found = tracked(make(), [value] * steps)
    assert found.forecaster.forecast() == pytest.approx(value)
    assert found.std_tokens_per_s == pytest.approx(0.0, abs=1e-6 * (value + 1))


def test_errors_fade_once_demand_is_constant() -> None:
    rng = Random(1)
    found = tracked(Mixture(STEP_S, HORIZON_STEPS), [rng.uniform(0, 200) for _ in range(600)])
    before = found.std_tokens_per_s
    assert before > 10
    for _ in range(3 * 3600 // int(STEP_S)):
        found.observe(100.0)
    assert found.std_tokens_per_s < before / 10


@given(start=st.floats(0.0, 1e4), slope=st.floats(0.1, 100.0), steps=st.integers(4 * HORIZON_STEPS, 120))
def test_a_straight_line_is_extrapolated(start: float, slope: float, steps: int) -> None:
    line = [start + slope * step for step in range(steps + HORIZON_STEPS)]
    ahead = sum(line[steps:]) / HORIZON_STEPS
    assert tracked(Holt(STEP_S, HORIZON_STEPS), line[:steps]).forecaster.forecast() == pytest.approx(ahead)
    mixed = tracked(Mixture(STEP_S, HORIZON_STEPS), line[:steps])
    assert mixed.forecaster.forecast() == pytest.approx(ahead, rel=1e-3)
    assert mixed.std_tokens_per_s < 20 * HORIZON_STEPS * slope


def test_a_damped_trend_extrapolates_less() -> None:
    line = [10.0 * step for step in range(40)]
    straight, fading = Holt(STEP_S, HORIZON_STEPS), Holt(STEP_S, HORIZON_STEPS, damping=0.8)
    for value in line:
        straight.observe(value)
        fading.observe(value)
    assert fading.forecast() < straight.forecast() == pytest.approx(390 + 10 * (HORIZON_STEPS + 1) / 2)


def test_the_mixture_weights_the_forecasters_that_were_closer() -> None:
    rng = Random(2)
    noise = [rng.expovariate(1 / 100) for _ in range(1200)]
    steady = tracked(Mixture(STEP_S, HORIZON_STEPS), noise).forecaster.forecast()
    slow, quick = (tracked(Smoothed(STEP_S, over_s), noise).forecaster.forecast() for over_s in (480.0, 30.0))
    assert abs(steady - slow) < abs(steady - quick), "noise around a level: long means were closer"
    steps = [100.0 * (1 + position // 60 % 2) for position in range(1200)] + [100.0] * 20
    jumping = tracked(Mixture(STEP_S, HORIZON_STEPS), steps).forecaster.forecast()
    assert jumping == pytest.approx(100.0, rel=0.1), "levels that jump: short means were closer"


def test_the_trend_has_no_weight_before_a_horizon_was_checked() -> None:
    mixture = Mixture(STEP_S, HORIZON_STEPS)
    for value in (0.0, 1000.0):
        mixture.observe(value)
    assert mixture.forecast() == pytest.approx(500.0)


def test_the_std_is_the_root_mean_square_error() -> None:
    # The forecast is always 100, so the errors for 130 and 60 are 30 and 40.
    class Always(Forecaster):
        def observe(self, tokens_per_s: float) -> None:
            del tokens_per_s

        def forecast(self) -> float:
            return 100.0

    found = tracked(Always(), [100.0] * HORIZON_STEPS)
    assert found.std_tokens_per_s == 0.0, "there was no forecast of the first interval"
    for value in [130.0] * HORIZON_STEPS + [60.0] * HORIZON_STEPS:
        found.observe(value)
    assert found.std_tokens_per_s == pytest.approx(math.sqrt((30**2 + 40**2) / 2))


def test_the_forecast_of_ended_demand_falls_to_zero() -> None:
    found = tracked(Mixture(STEP_S, HORIZON_STEPS), [100.0] * 120)
    expected = []
    for _ in range(2 * 3600 // int(STEP_S)):
        found.observe(0.0)
        expected.append(found.forecaster.forecast())
    assert expected[6 * HORIZON_STEPS] < 5.0
    assert expected[-1] < 1e-3
