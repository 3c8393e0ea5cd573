"""Formats comparisons as tables and sentences, and as the content of the final line of JSON."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import median
from typing import Any

from loraserve.sim.compare import Comparison
from loraserve.sim.policies import DEFAULT_POLICY, RANDOM, TOPPINGS
from loraserve.text import table

MAX_BYTES_SHARE = 0.25
"""Goal: an engine needs to hold at most this fraction of all adapter bytes."""
EQUAL_P95_FACTOR = 1.02
"""P95s within this factor count as equal."""


def value_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table(header, [[cell(value) for value in row] for row in rows])


def cell(value: Any) -> str:
    """Return a value as text; "-" if None or not finite. Floats from 100 have no decimals, others three digits."""
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def summary_table(comparison: Comparison) -> str:
    """Return a table of the results with one row for each policy."""
    results, best_rps = comparison.results.values(), comparison.best_baseline_rps
    columns = {
        "policy": list(comparison.results),
        "max rps": [r.max_rps for r in results],
        "of best": [r.max_rps / best_rps if best_rps else None for r in results],
        "P95 at 80% (s)": [r.at_80pct.p95_ttft_s for r in results],
        "engines needed": [r.engines_needed for r in results],
        "adapters/engine": [r.at_80pct.adapters_per_engine for r in results],
        "bytes needed": [r.at_80pct.bytes_share for r in results],
        "bytes held": [r.at_80pct.held_share for r in results],
        "moves/interval": [r.at_80pct.moves_per_interval for r in results],
    }
    return value_table(list(columns), list(zip(*columns.values(), strict=True)))


def draws_text(comparison: Comparison) -> list[str]:
    """Return one line for each policy with several draws of its placement: the range of their highest request rates."""
    return [
        f"({name}: the median of {len(draws)} draws with max rps from {cell(draws[0])} to {cell(draws[-1])})"
        for name, result in comparison.results.items()
        if len(draws := result.max_rps_draws) > 1
    ]


def never_overloaded_text(comparison: Comparison) -> list[str]:
    """Return one line that names the policies that met the SLO at every simulated rate; no line if there are none."""
    names = [
        name
        for name, result in comparison.results.items()
        if all(point.p95_ttft_s <= comparison.slo_ttft_s for point in result.curve)
    ]
    if not names:
        return []
    text = "met the SLO at every simulated load, so the largest load is unknown; make runs longer with --seconds"
    return [f"({', '.join(names)}: {text})"]


def load_table(comparison: Comparison) -> str:
    """Return a table of each policy's P95 TTFT at each fraction of the best baseline's highest request rate."""
    rows = [[name, *(comparison.p95_at(name, share) for share in comparison.shares)] for name in comparison.results]
    return value_table(["P95 TTFT (s) at load", *(f"{share:.0%}" for share in comparison.shares)], rows)


def missed_goals(comparison: Comparison, limit_rps: float) -> list[str]:
    """Return a line for each goal that the default policy misses; ``limit_rps`` is an upper bound for every policy."""
    results = comparison.results
    if DEFAULT_POLICY not in results:
        return []
    ours = results[DEFAULT_POLICY]
    missed = []
    if RANDOM in results and ours.max_rps < 2 * results[RANDOM].max_rps:
        goal_rps = 2 * results[RANDOM].max_rps
        text = f"max rps is {2 * ours.max_rps / (goal_rps or 1e-9):.2f} times that of {RANDOM}; the goal is 2 times"
        if goal_rps > limit_rps:
            text += f" ({goal_rps:.3g} rps, above the upper bound of {limit_rps:.3g} rps for every placement)"
        missed.append(text)
    if TOPPINGS in results and ours.max_rps < results[TOPPINGS].max_rps:
        missed.append(f"max rps is {ours.max_rps / results[TOPPINGS].max_rps:.3f} times that of {TOPPINGS}")
    for name in results:
        for share in comparison.shares:
            ours_s, other_s = comparison.p95_at(DEFAULT_POLICY, share), comparison.p95_at(name, share)
            if ours_s > EQUAL_P95_FACTOR * other_s:
                missed.append(f"P95 TTFT at {share:.0%} load is {ours_s:.3g} s, that of {name} is {other_s:.3g} s")
    if ours.at_80pct.bytes_share > MAX_BYTES_SHARE:
        text = (
            f"an engine needs {ours.at_80pct.bytes_share:.1%} of all adapter bytes; the goal is {MAX_BYTES_SHARE:.0%}"
        )
        if comparison.engines <= 4:
            text += (
                f" (one copy of each adapter on {comparison.engines} engines is {1 / comparison.engines:.0%} already)"
            )
        missed.append(text)
    return [f"{DEFAULT_POLICY} misses a goal: {text}" for text in missed]


def json_figures(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return the figures of each policy for the line of JSON. Infinite figures become null."""
    return {
        name: {
            "max_rps": json_number(result.max_rps),
            "max_rps_draws": [json_number(rps) for rps in result.max_rps_draws],
            "p95_at_80pct_s": json_number(result.at_80pct.p95_ttft_s),
            "engines_needed": result.engines_needed,
            "adapter_bytes_share": json_number(result.at_80pct.bytes_share),
            "moves_per_interval": json_number(result.at_80pct.moves_per_interval),
        }
        for name, result in comparison.results.items()
    }


def json_number(value: float | None) -> float | None:
    """Return a value rounded to four significant digits, or None if it is None or not finite."""
    return float(f"{value:.4g}") if value is not None and isfinite(value) else None


def grid_table(comparisons: Mapping[str, Comparison]) -> str:
    """Return a table of the default policy, the best baseline and policy ``toppings``, one row for each workload."""
    rows = []
    for name, c in comparisons.items():
        ours_rps, toppings_rps = c.results[DEFAULT_POLICY].max_rps, c.results[TOPPINGS].max_rps
        ratios = [ours_rps / c.best_baseline_rps, ours_rps / toppings_rps if toppings_rps else None]
        p95s = [_p95_pair(c, share) for share in c.shares]
        rows.append([name, ours_rps, c.best_baseline, c.best_baseline_rps, *ratios, *p95s])
    shares = next(iter(comparisons.values())).shares
    header = ["workload", "max rps", "best baseline", "its max rps", "of best", "of toppings"]
    return value_table([*header, *(f"P95 at {share:.0%}" for share in shares)], rows)


def _p95_pair(comparison: Comparison, share: float) -> str:
    """Return the P95 TTFT of the default policy and the lowest one of the other policies, in seconds, as text."""
    others = min(comparison.p95_at(name, share) for name in comparison.results if name != DEFAULT_POLICY)
    return f"{cell(comparison.p95_at(DEFAULT_POLICY, share))}/{cell(others)}"


def gains(comparisons: Mapping[str, Comparison]) -> dict[str, float | None]:
    """Return summary ratios: the default policy's highest request rate to that of ``toppings`` or the best baseline."""
    toppings = sorted(c.gain_over(c.results[TOPPINGS].max_rps) for c in comparisons.values())
    best = sorted(c.gain_over(c.best_baseline_rps) for c in comparisons.values())
    return {
        "vs_toppings_best": json_number(toppings[-1]),
        "vs_toppings_median": json_number(median(toppings)),
        "vs_toppings_worst": json_number(toppings[0]),
        "vs_best_baseline_median": json_number(median(best)),
        "vs_best_baseline_worst": json_number(best[0]),
    }


def gains_text(ratios: Mapping[str, float | None]) -> str:
    text = {name: cell(ratio) for name, ratio in ratios.items()}
    return (
        f"max rps of ours / toppings: best {text['vs_toppings_best']}, median {text['vs_toppings_median']}, "
        f"worst {text['vs_toppings_worst']}\nmax rps of ours / best baseline: median "
        f"{text['vs_best_baseline_median']}, worst {text['vs_best_baseline_worst']}"
    )
