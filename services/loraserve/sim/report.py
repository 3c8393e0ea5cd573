"""What a comparison says, for people and as the one line of JSON. Pure."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import median
from typing import Any

from loraserve import text
from loraserve.sim.compare import OURS, Comparison

RANDOM, TOPPINGS = "slora-random", "toppings"
LARGEST_BYTES_SHARE = 0.25
SAME_P95 = 1.02
"""P95s within this factor count as equal."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, figures on the right."""
    return text.table(header, [[cell(value) for value in row] for row in rows])


def cell(value: Any) -> str:
    """None and infinity are "-"."""
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def summary(comparison: Comparison) -> str:
    """One row for each policy."""
    rows = [
        [
            name,
            result.max_rps,
            result.max_rps / comparison.best_baseline_rps if comparison.best_baseline_rps else None,
            result.p95_at_80pct_s,
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
    return table(header, rows)


def draws(comparison: Comparison) -> list[str]:
    """Of each policy that was drawn several times, how far its draws are apart."""
    return [
        f"({name}: the median of {len(found)} draws, whose max rps are {cell(found[0])} to {cell(found[-1])})"
        for name, result in comparison.results.items()
        if len(found := result.max_rps_draws) > 1
    ]


def too_short(comparison: Comparison) -> list[str]:
    """Of each policy for which no load was too much: its largest load is the end of the search, no limit of its own."""
    names = [
        name
        for name, result in comparison.results.items()
        if all(point.p95_ttft_s <= comparison.slo_ttft_s for point in result.curve)
    ]
    if not names:
        return []
    return [f"({', '.join(names)}: no load was too much for so short a run, max rps says nothing; make runs longer)"]


def load_table(comparison: Comparison) -> str:
    """P95 TTFT of each policy at each share of the best baseline's largest load."""
    rows = [[name, *(comparison.p95_at(name, share) for share in comparison.shares)] for name in comparison.results]
    return table(["P95 TTFT (s) at load", *(f"{share:.0%}" for share in comparison.shares)], rows)


def shortfalls(comparison: Comparison, limit_rps: float) -> list[str]:
    """Where ours does not reach what it is to reach, in words with the figures; ``limit_rps``: what nobody can."""
    results = comparison.results
    if OURS not in results:
        return []
    ours = results[OURS]
    found = []
    if RANDOM in results and ours.max_rps < 2 * results[RANDOM].max_rps:
        ratio = ours.max_rps / (results[RANDOM].max_rps or 1e-9)
        found.append(f"max rps is {ratio:.2f}x of {RANDOM}'s, not 2x" + _beyond(2 * results[RANDOM].max_rps, limit_rps))
    if TOPPINGS in results and ours.max_rps < results[TOPPINGS].max_rps:
        found.append(f"max rps is {ours.max_rps / results[TOPPINGS].max_rps:.3f}x of {TOPPINGS}'s")
    for name in results:
        for share in comparison.shares:
            mine, theirs = comparison.p95_at(OURS, share), comparison.p95_at(name, share)
            if mine > SAME_P95 * theirs:
                found.append(f"P95 TTFT at {share:.0%} load is {mine:.3g} s, {name}'s is {theirs:.3g} s")
    if ours.at_80pct.bytes_share > LARGEST_BYTES_SHARE:
        found.append(_bytes_reason(comparison))
    return found


def _beyond(wanted_rps: float, limit_rps: float) -> str:
    return f" (that is {wanted_rps:.3g} rps, and no placement serves {limit_rps:.3g})" if wanted_rps > limit_rps else ""


def _bytes_reason(comparison: Comparison) -> str:
    share = comparison.results[OURS].at_80pct.bytes_share
    said = f"holds {share:.1%} of all adapter bytes per engine, not a quarter"
    if comparison.engines <= 4:
        said += f" (one copy of each on {comparison.engines} engines is {1 / comparison.engines:.0%} already)"
    return said


def as_json(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """By policy, the keys that the project's benches agree on; what is infinite is null."""
    return {
        name: {
            "max_rps": number(result.max_rps),
            "max_rps_draws": [number(rps) for rps in result.max_rps_draws],
            "p95_at_80pct_s": number(result.p95_at_80pct_s),
            "engines_needed": result.engines_needed,
            "adapter_bytes_share": number(result.at_80pct.bytes_share),
            "moves_per_interval": number(result.at_80pct.moves_per_interval),
        }
        for name, result in comparison.results.items()
    }


def number(value: float | None) -> float | None:
    """Four digits; null where there is no finite number."""
    return float(f"{value:.4g}") if value is not None and isfinite(value) else None


def grid_table(comparisons: Mapping[str, Comparison]) -> str:
    """One row for each workload: ours against the best baseline and against toppings."""
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
    return table([*header, *(f"P95 at {share:.0%}" for share in first.shares)], rows)


def _p95_pair(comparison: Comparison, share: float) -> str:
    """Ours / the lowest of any baseline."""
    others = min(comparison.p95_at(name, share) for name in comparison.results if name != OURS)
    return f"{cell(comparison.p95_at(OURS, share))}/{cell(others)}"


def gains(comparisons: Mapping[str, Comparison]) -> dict[str, float | None]:
    """Ours against toppings and the best baseline in largest load, over all workloads."""
    toppings = sorted(c.results[OURS].max_rps / (c.results[TOPPINGS].max_rps or 1e-9) for c in comparisons.values())
    best = sorted(c.results[OURS].max_rps / (c.best_baseline_rps or 1e-9) for c in comparisons.values())
    return {
        "vs_toppings_best": number(toppings[-1]),
        "vs_toppings_median": number(median(toppings)),
        "vs_toppings_worst": number(toppings[0]),
        "vs_best_baseline_median": number(median(best)),
        "vs_best_baseline_worst": number(best[0]),
    }


def gains_text(found: Mapping[str, float | None]) -> str:
    return (
        f"max rps of ours / toppings: best {cell(found['vs_toppings_best'])}, median "
        f"{cell(found['vs_toppings_median'])}, worst {cell(found['vs_toppings_worst'])}; / best baseline: median "
        f"{cell(found['vs_best_baseline_median'])}, worst {cell(found['vs_best_baseline_worst'])}"
    )
