"""What an adapter's demand will be over the next interval, from what it was in equal steps before. Pure.

No single forecaster is best: single adapters are noise around a level that seldom moves, many together drift within a
minute (FORECASTS.md has the comparison). ``Mixture`` therefore asks several and trusts each by how near it has been.
"""

import math
from functools import lru_cache
from typing import Protocol

ERROR_MEMORY_S = 1800.0
"""Past errors fade with this time constant: long enough to tell forecasters apart, short enough to turn to another."""
SMOOTHED_OVER_S = (120.0, 30.0, 480.0)
"""Time constants of the mixture's smoothed levels. Until errors are known the first one speaks for all."""
TRUST_POWER = 8
"""A forecaster's weight is one over this power of its mean squared error: the best counts nearly alone."""


@lru_cache
def gain(step_s: float, time_constant_s: float) -> float:
    """Weight of a new step where old ones fade with the time constant."""
    return 1.0 - math.exp(-step_s / time_constant_s)


class Forecaster(Protocol):
    """One series of tokens/s, told step by step, and its mean over the next ``horizon_steps`` steps."""

    __slots__ = ()

    def observe(self, tokens_per_s: float) -> None:
        """One more step is over."""

    def ahead(self) -> float:
        """Mean tokens/s expected over the horizon: finite, never negative; 0 before the first step."""

    def settle(self, tokens_per_s: float) -> None:
        """A whole horizon is over, with this mean; the next one begins now. Who learns from its errors does it here."""
        return


class Smoothed(Forecaster):
    """A level: old steps fade exponentially (Brown 1956). While there are few steps it is their plain mean."""

    __slots__ = ("_gain", "_level", "_steps")

    def __init__(self, step_s: float, time_constant_s: float) -> None:
        self._gain = gain(step_s, time_constant_s)
        self._level, self._steps = 0.0, 0

    def observe(self, tokens_per_s: float) -> None:
        self._steps += 1
        self._level += max(self._gain, 1 / self._steps) * (tokens_per_s - self._level)

    def ahead(self) -> float:
        return self._level


class Holt(Forecaster):
    """Level and trend (Holt 1957); with ``damping`` < 1 a trend fades by it every step (Gardner and McKenzie 1985).

    While there are few steps its gains are those at which it is the straight line of least squares.
    """

    __slots__ = ("_damping", "_level", "_level_gain", "_reach_steps", "_steps", "_trend", "_trend_gain")

    def __init__(
        self, step_s: float, horizon_steps: int, level_s: float = 60.0, trend_s: float = 120.0, damping: float = 1.0
    ) -> None:
        self._level_gain = gain(step_s, level_s)
        self._trend_gain = self._level_gain * gain(step_s, trend_s)
        self._damping = damping
        self._reach_steps = _reach_steps(horizon_steps, damping)
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

    def ahead(self) -> float:
        return max(0.0, self._level + self._reach_steps * self._trend)


@lru_cache
def _reach_steps(horizon_steps: int, damping: float) -> float:
    """The mean over the horizon of what the trend has added up to: (h + 1) / 2 where it does not fade."""
    sums = [sum(damping**step for step in range(1, steps + 1)) for steps in range(1, horizon_steps + 1)]
    return sum(sums) / horizon_steps


class Mixture(Forecaster):
    """Three smoothed levels and a trend, each weighted by how near its forecasts of whole horizons have been."""

    __slots__ = ("_error_gain", "_errors", "_members", "_promised", "_settled", "_weights")

    def __init__(self, step_s: float, horizon_steps: int) -> None:
        self._members: list[Forecaster] = [Smoothed(step_s, seconds) for seconds in SMOOTHED_OVER_S]
        self._members.append(Holt(step_s, horizon_steps))
        self._error_gain = error_gain(step_s, horizon_steps)
        self._errors = [0.0] * len(self._members)
        self._promised: list[float] = []
        self._settled = 0
        self._weights = [1.0] + [0.0] * (len(self._members) - 1)

    def observe(self, tokens_per_s: float) -> None:
        for member in self._members:
            member.observe(tokens_per_s)

    def ahead(self) -> float:
        return sum(
            weight * member.ahead() for weight, member in zip(self._weights, self._members, strict=True) if weight
        )

    def settle(self, tokens_per_s: float) -> None:
        if self._promised:
            self._settled += 1
            faded = max(self._error_gain, 1 / self._settled)
            for index, promised in enumerate(self._promised):
                self._errors[index] += faded * ((tokens_per_s - promised) ** 2 - self._errors[index])
            self._weights = _weights(self._errors)
        self._promised = [member.ahead() for member in self._members]


def _weights(squared_errors: list[float]) -> list[float]:
    """Sum to 1. Differences far below a token/s say nothing about who is better."""
    least = min(squared_errors) + 1e-6
    trust = [(least / (error + 1e-6)) ** TRUST_POWER for error in squared_errors]
    whole = sum(trust)
    return [part / whole for part in trust]


@lru_cache
def error_gain(step_s: float, horizon_steps: int) -> float:
    """Weight of a new error at the horizon; at long horizons errors are few and each has to last."""
    horizon_s = step_s * horizon_steps
    return gain(horizon_s, max(ERROR_MEMORY_S, 4 * horizon_s))


class Tracked:
    """A forecaster with the errors that it has shown over whole horizons, one after another since the first step."""

    __slots__ = (
        "_error_gain",
        "_horizon_steps",
        "_promised",
        "_settled",
        "_steps",
        "_sum",
        "_variance",
        "ahead",
        "forecaster",
    )

    def __init__(self, forecaster: Forecaster, step_s: float, horizon_steps: int) -> None:
        self.forecaster = forecaster
        self._horizon_steps = horizon_steps
        self._error_gain = error_gain(step_s, horizon_steps)
        self._promised: float | None = None
        self._variance, self._settled = 0.0, 0
        self._sum, self._steps = 0.0, 0
        self.ahead = forecaster.ahead()
        """What it expects now, asked for more often than it changes."""

    def observe(self, tokens_per_s: float) -> None:
        """One more step is over."""
        self.forecaster.observe(tokens_per_s)
        self._sum += tokens_per_s
        self._steps += 1
        if self._steps == self._horizon_steps:
            self._settle(self._sum / self._steps)
        self.ahead = self.forecaster.ahead()

    def _settle(self, tokens_per_s: float) -> None:
        if self._promised is not None:
            self._settled += 1
            squared = (tokens_per_s - self._promised) ** 2
            self._variance += max(self._error_gain, 1 / self._settled) * (squared - self._variance)
        self.forecaster.settle(tokens_per_s)
        self._promised = self.forecaster.ahead()
        self._sum, self._steps = 0.0, 0

    @property
    def std_tokens_per_s(self) -> float:
        """How far forecasts of whole horizons have been off (root mean square); 0 until there was one to check."""
        return math.sqrt(self._variance)
