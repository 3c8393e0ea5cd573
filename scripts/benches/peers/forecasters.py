"""Forecasters to compare with the monitor's, with the interface of loraserve/monitor/forecast.py."""

from collections import deque
from collections.abc import Callable
from statistics import fmean, median

from loraserve.monitor.forecast import Forecaster, Holt, Mixture, Smoothed


class LastInterval(Forecaster):
    """Predicts the mean of the last interval."""

    def __init__(self, horizon_steps: int) -> None:
        self._steps: deque[float] = deque(maxlen=horizon_steps)

    def observe(self, tokens_per_s: float) -> None:
        self._steps.append(tokens_per_s)

    def forecast(self) -> float:
        return fmean(self._steps) if self._steps else 0.0


class MedianOfIntervals(Forecaster):
    """Predicts the median of the last intervals, which a single burst does not change."""

    def __init__(self, horizon_steps: int, intervals: int = 5) -> None:
        self._last = LastInterval(horizon_steps)
        self._means: deque[float] = deque(maxlen=intervals)

    def observe(self, tokens_per_s: float) -> None:
        self._last.observe(tokens_per_s)

    def learn(self, tokens_per_s: float) -> None:
        self._means.append(tokens_per_s)

    def forecast(self) -> float:
        return median(self._means) if self._means else self._last.forecast()


class BackToMean(Forecaster):
    """An autoregression of order one: predicts that a share of the distance from the long-term mean remains."""

    def __init__(self, step_s: float, kept: float = 0.3) -> None:
        self._short, self._long = Smoothed(step_s, 60.0), Smoothed(step_s, 600.0)
        self._kept = kept

    def observe(self, tokens_per_s: float) -> None:
        self._short.observe(tokens_per_s)
        self._long.observe(tokens_per_s)

    def forecast(self) -> float:
        long = self._long.forecast()
        return long + self._kept * (self._short.forecast() - long)


OURS = "mixture"

FORECASTERS: dict[str, Callable[[float, int], Forecaster]] = {
    "last interval": lambda step_s, steps: LastInterval(steps),
    "median of 5": lambda step_s, steps: MedianOfIntervals(steps),
    "smoothed 30 s": lambda step_s, steps: Smoothed(step_s, 30.0),
    "smoothed 120 s": lambda step_s, steps: Smoothed(step_s, 120.0),
    "smoothed 480 s": lambda step_s, steps: Smoothed(step_s, 480.0),
    "back to mean": lambda step_s, steps: BackToMean(step_s),
    "Holt 10 s, 1 step": lambda step_s, steps: Holt(step_s, 1, 10.0, 22.0),
    "Holt 10 s": lambda step_s, steps: Holt(step_s, steps, 10.0, 22.0),
    "Holt 60 s": lambda step_s, steps: Holt(step_s, steps),
    "damped Holt 60 s": lambda step_s, steps: Holt(step_s, steps, damping=0.9),
    OURS: Mixture,
}
"""By name, functions that create a forecaster from the step in seconds and the horizon in steps."""
