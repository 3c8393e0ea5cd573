"""Forecasts an adapter's demand over the next planning interval from its demand in past steps of equal length.

No forecaster is best for all demand. A single adapter's demand is noise around a level that seldom changes, while the
sum of many adapters drifts within a minute (FORECASTS.md has the comparison). ``Mixture`` therefore weights several
forecasters by their past errors.
"""

import math
from functools import lru_cache
from typing import Protocol

ERROR_TIME_CONSTANT_S = 1800.0
"""Decay time of past errors: long enough to distinguish forecasters, short enough to follow changes."""
SMOOTHING_TIME_CONSTANTS_S = (120.0, 30.0, 480.0)
"""Time constants of the mixture's smoothed levels. The first has all the weight until errors are known."""
WEIGHT_POWER = 8
"""Weights are proportional to 1 / error**WEIGHT_POWER of mean squared errors, so the best forecaster dominates."""


@lru_cache
def gain(step_s: float, time_constant_s: float) -> float:
    """Return the weight of a new step in exponential smoothing with this time constant."""
    return 1.0 - math.exp(-step_s / time_constant_s)


class Forecaster(Protocol):
    """Forecasts one series of tokens/s over a horizon, which is a fixed number of future steps."""

    __slots__ = ()

    def observe(self, tokens_per_s: float) -> None:
        """Add the demand of the next step."""

    def forecast(self) -> float:
        """Return the expected mean tokens/s over the horizon: finite, at least 0, and 0 before the first step."""

    def learn(self, tokens_per_s: float) -> None:
        """Learn from the mean demand of the horizon that ends now. The next horizon starts now."""
        return


class Smoothed(Forecaster):
    """Exponential smoothing (Brown 1956). The first steps are averaged with equal weights."""

    __slots__ = ("_gain", "_level", "_steps")

    def __init__(self, step_s: float, time_constant_s: float) -> None:
        self._gain = gain(step_s, time_constant_s)
        self._level, self._steps = 0.0, 0

    def observe(self, tokens_per_s: float) -> None:
        self._steps += 1
        self._level += max(self._gain, 1 / self._steps) * (tokens_per_s - self._level)

    def forecast(self) -> float:
        return self._level


class Holt(Forecaster):
    """Exponential smoothing of level and trend (Holt 1957).

    Each step multiplies the trend by ``damping`` (Gardner and McKenzie 1985). The first steps fit a least-squares line.
    """

    __slots__ = ("_damping", "_level", "_level_gain", "_steps", "_trend", "_trend_gain", "_trend_steps")

    def __init__(
        self, step_s: float, horizon_steps: int, level_s: float = 60.0, trend_s: float = 120.0, damping: float = 1.0
    ) -> None:
        self._level_gain = gain(step_s, level_s)
        self._trend_gain = self._level_gain * gain(step_s, trend_s)
        self._damping = damping
        self._trend_steps = _mean_trend_steps(horizon_steps, damping)
        self._level = self._trend = 0.0
        self._steps = 0

    def observe(self, tokens_per_s: float) -> None:
        self._steps = steps = self._steps + 1
        if steps == 1:
            self._level = tokens_per_s
            return
        trend = self._damping * self._trend
        error = tokens_per_s - self._level - trend
        line = steps * (steps + 1)
        self._level += trend + max(self._level_gain, (4 * steps - 2) / line) * error
        self._trend = trend + max(self._trend_gain, 6 / line) * error

    def forecast(self) -> float:
        return max(0.0, self._level + self._trend_steps * self._trend)


@lru_cache
def _mean_trend_steps(horizon_steps: int, damping: float) -> float:
    """Return the mean of damping + ... + damping**k over all steps k of the horizon: the trend's factor."""
    sums = [sum(damping**step for step in range(1, steps + 1)) for steps in range(1, horizon_steps + 1)]
    return sum(sums) / horizon_steps


class Mixture(Forecaster):
    """Weighted mean of three ``Smoothed`` and one ``Holt``. Weights depend on past errors over whole horizons."""

    __slots__ = ("_error_gain", "_forecasts", "_learned", "_members", "_squared_errors", "_weights")

    def __init__(self, step_s: float, horizon_steps: int) -> None:
        self._members: list[Forecaster] = [Smoothed(step_s, seconds) for seconds in SMOOTHING_TIME_CONSTANTS_S]
        self._members.append(Holt(step_s, horizon_steps))
        self._error_gain = error_gain(step_s, horizon_steps)
        self._squared_errors = [0.0] * len(self._members)
        self._forecasts: list[float] = []
        self._learned = 0
        self._weights = [1.0] + [0.0] * (len(self._members) - 1)

    def observe(self, tokens_per_s: float) -> None:
        for member in self._members:
            member.observe(tokens_per_s)

    def forecast(self) -> float:
        return sum(
            weight * member.forecast() for weight, member in zip(self._weights, self._members, strict=True) if weight
        )

    def learn(self, tokens_per_s: float) -> None:
        if self._forecasts:
            self._learned += 1
            new = max(self._error_gain, 1 / self._learned)
            for index, forecast in enumerate(self._forecasts):
                self._squared_errors[index] += new * ((tokens_per_s - forecast) ** 2 - self._squared_errors[index])
            self._weights = _weights(self._squared_errors)
        self._forecasts = [member.forecast() for member in self._members]


def _weights(squared_errors: list[float]) -> list[float]:
    """Return weights that sum to 1, larger for smaller errors. Errors far below one token/s count as equal."""
    least = min(squared_errors) + 1e-6
    weights = [(least / (error + 1e-6)) ** WEIGHT_POWER for error in squared_errors]
    total = sum(weights)
    return [weight / total for weight in weights]


@lru_cache
def error_gain(step_s: float, horizon_steps: int) -> float:
    """Return a new error's weight in the smoothed error. Long horizons give few errors, so each decays more slowly."""
    horizon_s = step_s * horizon_steps
    return gain(horizon_s, max(ERROR_TIME_CONSTANT_S, 4 * horizon_s))


class TrackedForecast:
    """Runs a forecaster and measures its errors over consecutive horizons. ``tokens_per_s`` is the current forecast."""

    __slots__ = (
        "_error_gain",
        "_forecast",
        "_horizon_steps",
        "_learned",
        "_steps",
        "_sum",
        "_variance",
        "forecaster",
        "tokens_per_s",
    )

    def __init__(self, forecaster: Forecaster, step_s: float, horizon_steps: int) -> None:
        self.forecaster = forecaster
        self._horizon_steps = horizon_steps
        self._error_gain = error_gain(step_s, horizon_steps)
        self._forecast: float | None = None
        self._variance, self._learned = 0.0, 0
        self._sum, self._steps = 0.0, 0
        self.tokens_per_s = forecaster.forecast()

    def observe(self, tokens_per_s: float) -> None:
        """Add the demand of the next step and update the forecast."""
        self.forecaster.observe(tokens_per_s)
        self._sum += tokens_per_s
        self._steps += 1
        if self._steps == self._horizon_steps:
            self._end_horizon(self._sum / self._steps)
        self.tokens_per_s = self.forecaster.forecast()

    def _end_horizon(self, tokens_per_s: float) -> None:
        if self._forecast is not None:
            self._learned += 1
            squared = (tokens_per_s - self._forecast) ** 2
            self._variance += max(self._error_gain, 1 / self._learned) * (squared - self._variance)
        self.forecaster.learn(tokens_per_s)
        self._forecast = self.forecaster.forecast()
        self._sum, self._steps = 0.0, 0

    @property
    def std_tokens_per_s(self) -> float:
        """Return the root mean square error of past forecasts, or 0 before the first forecast is checked."""
        return math.sqrt(self._variance)
