"""Formats comparisons as tables and sentences, and as the content of the final line of JSON."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import median
from typing import Any

from loraserve.sim.compare import OURS, Comparison
from loraserve.text import table

RANDOM, TOPPINGS = "slora-random", "toppings"
MAX_BYTES_SHARE = 0.25
"""Goal: an engine needs to hold at most this share of all adapter bytes."""
EQUAL_P95_FACTOR = 1.02
"""P95s within this factor count as equal."""


def value_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table(header, [[cell(value) for value in row] for row in rows])


def cell(value: Any) -> str:
    """Return a value as text with three digits, or "-" if it is None or not finite."""
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def summary_table(comparison: Comparison) -> str:
    """Return a table of the results with one row for each policy."""
    rows = [
        [
            name,
            result.max_rps,
            result.max_rps / comparison.best_baseline_rps if comparison.best_baseline_rps else None,
            result.at_80pct.p95_ttft_s,
            result.engines_needed,
            result.at_80pct.adapters_per_engine,
            result.at_80pct.bytes_share,
            result.at_80pct.held_share,
            result.at_80pct.moves_per_interval,
        ]
        for name, result in comparison.results.items()
    ]
    header = [
        "policy",
        "max rps",
        "of best",
        "P95 at 80% (s)",
        "engines needed",
        "adapters/engine",
        "bytes needed",
        "bytes held",
        "moves/interval",
    ]
    return value_table(header, rows)


def draws_text(comparison: Comparison) -> list[str]:
    """Return one line for each policy whose placement was drawn several times: the range of its largest loads."""
    return [
        f"({name}: the median of {len(draws)} draws, whose max rps are {cell(draws[0])} to {cell(draws[-1])})"
        for name, result in comparison.results.items()
        if len(draws := result.max_rps_draws) > 1
    ]


def too_short_text(comparison: Comparison) -> list[str]:
    """Return one line that names the policies that met the SLO at every load; no line if there are none.

    The largest load of such a policy is only the load at which the search ended.
    """
    names = [
        name
        for name, result in comparison.results.items()
        if all(point.p95_ttft_s <= comparison.slo_ttft_s for point in result.curve)
    ]
    if not names:
        return []
    text = "no load was too much for such a short run, so that max rps means nothing; make runs longer"
    return [f"({', '.join(names)}: {text})"]


def load_table(comparison: Comparison) -> str:
    """Return a table of each policy's P95 TTFT at each share of the best baseline's largest load."""
    rows = [[name, *(comparison.p95_at(name, share) for share in comparison.shares)] for name in comparison.results]
    return value_table(["P95 TTFT (s) at load", *(f"{share:.0%}" for share in comparison.shares)], rows)


def shortfalls(comparison: Comparison, limit_rps: float) -> list[str]:
    """Return a sentence for each goal that policy ``ours`` misses; ``limit_rps`` bounds every policy."""
    results = comparison.results
    if OURS not in results:
        return []
    ours = results[OURS]
    missed = []
    if RANDOM in results and ours.max_rps < 2 * results[RANDOM].max_rps:
        goal_rps = 2 * results[RANDOM].max_rps
        text = f"max rps is {2 * ours.max_rps / (goal_rps or 1e-9):.2f}x of {RANDOM}'s, not 2x"
        if goal_rps > limit_rps:
            text += f" (that is {goal_rps:.3g} rps, and no placement serves {limit_rps:.3g})"
        missed.append(text)
    if TOPPINGS in results and ours.max_rps < results[TOPPINGS].max_rps:
        missed.append(f"max rps is {ours.max_rps / results[TOPPINGS].max_rps:.3f}x of {TOPPINGS}'s")
    for name in results:
        for share in comparison.shares:
            mine, theirs = comparison.p95_at(OURS, share), comparison.p95_at(name, share)
            if mine > EQUAL_P95_FACTOR * theirs:
                missed.append(f"P95 TTFT at {share:.0%} load is {mine:.3g} s, {name}'s is {theirs:.3g} s")
    if ours.at_80pct.bytes_share > MAX_BYTES_SHARE:
        text = f"holds {ours.at_80pct.bytes_share:.1%} of all adapter bytes per engine, not a quarter"
        if comparison.engines <= 4:
            text += f" (one copy of each on {comparison.engines} engines is {1 / comparison.engines:.0%} already)"
        missed.append(text)
    return missed


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
    """Return a value rounded to four digits, or None if it is not finite."""
    return float(f"{value:.4g}") if value is not None and isfinite(value) else None


def grid_table(comparisons: Mapping[str, Comparison]) -> str:
    """Return a table that compares ``ours`` with the best baseline and ``toppings``, one row for each workload."""
    rows = []
    for name, c in comparisons.items():
        ours, toppings = c.results[OURS], c.results[TOPPINGS]
        rows.append(
            [
                name,
                ours.max_rps,
                c.best_baseline,
                c.best_baseline_rps,
                ours.max_rps / c.best_baseline_rps,
                ours.max_rps / toppings.max_rps if toppings.max_rps else None,
                *(_p95_pair(c, share) for share in c.shares),
            ]
        )
    first = next(iter(comparisons.values()))
    header = ["workload", "max rps", "best baseline", "its", "of best", "of toppings"]
    return value_table([*header, *(f"P95 at {share:.0%}" for share in first.shares)], rows)


def _p95_pair(comparison: Comparison, share: float) -> str:
    """Return the P95 TTFT of ``ours`` and the lowest P95 TTFT of the other policies, as text."""
    others = min(comparison.p95_at(name, share) for name in comparison.results if name != OURS)
    return f"{cell(comparison.p95_at(OURS, share))}/{cell(others)}"


def gains(comparisons: Mapping[str, Comparison]) -> dict[str, float | None]:
    """Summarize the ratios of the largest load of ``ours`` to that of ``toppings`` and of the best baseline."""
    toppings = sorted(c.results[OURS].max_rps / (c.results[TOPPINGS].max_rps or 1e-9) for c in comparisons.values())
    best = sorted(c.results[OURS].max_rps / (c.best_baseline_rps or 1e-9) for c in comparisons.values())
    return {
        "vs_toppings_best": json_number(toppings[-1]),
        "vs_toppings_median": json_number(median(toppings)),
        "vs_toppings_worst": json_number(toppings[0]),
        "vs_best_baseline_median": json_number(median(best)),
        "vs_best_baseline_worst": json_number(best[0]),
    }


def gains_text(ratios: Mapping[str, float | None]) -> str:
    return (
        f"max rps of ours / toppings: best {cell(ratios['vs_toppings_best'])}, median "
        f"{cell(ratios['vs_toppings_median'])}, worst {cell(ratios['vs_toppings_worst'])}; / best baseline: median "
        f"{cell(ratios['vs_best_baseline_median'])}, worst {cell(ratios['vs_best_baseline_worst'])}"
    )
