"""Compares forecasts of demand per adapter on a trace: the error of each forecaster over the next interval."""

import argparse
import sys
from collections.abc import Sequence
from random import Random

from harness.report import Number, last_line, ratio, say, table
from peers.forecasters import FORECASTERS, OURS

from loraserve.errors import ConfigError
from loraserve.monitor.forecast import TrackedForecast
from loraserve.sim.traces import TraceRequest, read_trace

STEP_S = 5.0
"""A bucket of the monitor's window of a minute."""
INTERVALS_S = (30, 60, 300)
NEEDS = "TRACE"
"""The required arguments, shown by ``scripts/bench --help``."""
FIRST_COUNTED = 2
"""The first counted interval, when each forecaster has seen two."""
QUICK_S = 3600.0


class Score:
    """Totals over all series and intervals: error, demand, and how often forecast plus one std covered the demand."""

    def __init__(self) -> None:
        self.error = self.actual = 0.0
        self.covered = self.forecasts = 0

    def add(self, forecast: float, std: float, actual: float) -> None:
        self.error += abs(forecast - actual)
        self.actual += actual
        self.covered += actual <= forecast + std + 1e-9
        self.forecasts += 1

    @property
    def relative_error(self) -> float:
        """Return the mean absolute error divided by the mean demand."""
        return self.error / self.actual

    @property
    def coverage(self) -> float:
        return self.covered / self.forecasts


def main(arguments: Sequence[str]) -> int:
    """Return 0 on success, 1 if the trace cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        requests = read_trace(options.trace)
        _check_length(requests, options.trace)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.quick:
        requests = [request for request in requests if request.time_s <= requests[0].time_s + QUICK_S]
    figures, ratios = compare(requests, options.adapters, options.seed)
    print(last_line("forecast", ratios, figures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("scripts/bench forecast", description=__doc__)
    parser.add_argument("trace", metavar=NEEDS, help="CSV of requests, plain or .gz (see loraserve/sim/traces.py)")
    parser.add_argument(
        "--adapters", type=_positive, default=200, help="split the clients into this many adapters (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="use only the first hour of the trace")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _check_length(requests: Sequence[TraceRequest], name: str) -> None:
    covers_s, needed_s = requests[-1].time_s - requests[0].time_s, FIRST_COUNTED * max(INTERVALS_S) + max(INTERVALS_S)
    if covers_s < needed_s:
        raise ConfigError(f"{name}: time_s covers {covers_s:.0f} s; forecasts are compared on at least {needed_s} s")


def compare(requests: Sequence[TraceRequest], adapters: int, seed: int) -> tuple[dict[str, Number], dict[str, Number]]:
    """Print a table for the clients as adapters and one for the split clients. Returns figures and ratios."""
    figures: dict[str, Number] = {}
    ratios: dict[str, Number] = {}
    split_requests = split(requests, adapters, Random(seed))
    for kind, chosen in (("clients", requests), ("split", split_requests)):
        series = demand_series(chosen, STEP_S)
        scores = {}
        for interval_s in INTERVALS_S:
            say(f"{len(series)} series, intervals of {interval_s} s")
            scores[interval_s] = score(series, STEP_S, round(interval_s / STEP_S))
        print(_table(f"{kind}: {len(series)} adapters", scores))
        for interval_s, by_name in scores.items():
            errors = {name: found.relative_error for name, found in by_name.items()}
            others = min(error for name, error in errors.items() if name != OURS)
            key = f"{kind}_{interval_s}s"
            ratios[f"vs_last_{key}"] = ratio(errors[OURS], errors["last interval"])
            ratios[f"vs_best_other_{key}"] = ratio(errors[OURS], others)
            figures[f"error_{key}"] = errors[OURS]
            figures[f"coverage_{key}"] = by_name[OURS].coverage
    return figures, ratios


def _table(title: str, scores: dict[int, dict[str, Score]]) -> str:
    header = ["forecaster"]
    for interval_s in scores:
        header += [f"error {interval_s} s", "covered"]
    rows = []
    for name in FORECASTERS:
        found = [by_name[name] for by_name in scores.values()]
        rows.append([name, *(f"{value:.3f}" for one in found for value in (one.relative_error, one.coverage))])
    return table(f"{title}; error over mean demand, share of intervals within forecast + 1 std", header, rows)


def split(requests: Sequence[TraceRequest], adapters: int, rng: Random) -> list[TraceRequest]:
    """Distribute each client's requests over several adapters; the k-th gets 1/k of the first one's share."""
    clients = len({request.client for request in requests})
    ranks = range(max(1, round(adapters / clients)))
    drawn = rng.choices(ranks, [1 / (rank + 1) for rank in ranks], k=len(requests))
    return [
        TraceRequest(request.time_s, f"{request.client}/{rank}", request.prompt_tokens, request.output_tokens)
        for request, rank in zip(requests, drawn, strict=True)
    ]


def demand_series(requests: Sequence[TraceRequest], step_s: float) -> list[list[float]]:
    """Return tokens/s in each whole step for every client. All tokens of a request count when it arrives."""
    began_s = requests[0].time_s
    steps = int((requests[-1].time_s - began_s) / step_s)
    series: dict[str, list[float]] = {}
    for request in requests:
        step = int((request.time_s - began_s) / step_s)
        if step < steps:
            tokens = request.prompt_tokens + request.output_tokens
            series.setdefault(request.client, [0.0] * steps)[step] += tokens / step_s
    return list(series.values())


def score(series: Sequence[Sequence[float]], step_s: float, horizon_steps: int) -> dict[str, Score]:
    """Score every forecaster on every series."""
    scores = {name: Score() for name in FORECASTERS}
    for name, make in FORECASTERS.items():
        for values in series:
            _score_one(
                values, TrackedForecast(make(step_s, horizon_steps), step_s, horizon_steps), horizon_steps, scores[name]
            )
    return scores


def _score_one(values: Sequence[float], tracked: TrackedForecast, horizon_steps: int, into: Score) -> None:
    """Score one series. As in the monitor, the forecast is 0 until the first request."""
    begun = False
    for start in range(0, len(values) - horizon_steps + 1, horizon_steps):
        interval = values[start : start + horizon_steps]
        if start >= FIRST_COUNTED * horizon_steps:
            into.add(tracked.forecaster.forecast(), tracked.std_tokens_per_s, sum(interval) / horizon_steps)
        for value in interval:
            begun = begun or value > 0
            if begun:
                tracked.observe(value)
