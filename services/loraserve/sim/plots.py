"""Plots comparisons and runs as PNG files in a folder."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

from loraserve.sim.compare import Comparison
from loraserve.sim.outcome import Interval
from loraserve.sim.policies import DEFAULT_POLICY, TOPPINGS

matplotlib.use("Agg")
from matplotlib import pyplot

SIZE_INCHES = (7.0, 4.5)
DPI = 120
COLOURS = {
    "ours": "#d62728",
    "loraserve": "#ff7f0e",
    "toppings": "#1f77b4",
    "dynamo": "#2ca02c",
    "slora-random": "#7f7f7f",
    "slora-contiguous": "#bcbd22",
}


def plot_comparison(comparison: Comparison, title: str, folder: Path) -> list[Path]:
    """Plot P95 TTFT and goodput against request rate. Plot engines needed, adapters per engine and moves by policy."""
    results = comparison.results
    bars: dict[str, dict[str, float]] = {
        "engines needed": {n: r.engines_needed or 0 for n, r in results.items()},
        "adapters per engine": {n: r.at_80pct.adapters_per_engine for n, r in results.items()},
        "moves per interval": {n: r.at_80pct.moves_per_interval for n, r in results.items()},
    }
    return [
        _curves(comparison, "p95_ttft_s", "P95 TTFT (s)", title, folder / "p95_ttft.png"),
        _curves(comparison, "goodput_rps", "goodput (requests/s within the SLO)", title, folder / "goodput.png"),
        *(_bars(values, what, title, folder / f"{what.replace(' ', '_')}.png") for what, values in bars.items()),
    ]


def plot_timeline(intervals: Sequence[Interval], title: str, path: Path) -> Path:
    """Plot over time the fraction of each rank in the computed tokens of each engine, for at most 12 engines."""
    engines = min(len(intervals[0].rank_tokens), 12)
    figure, axes = pyplot.subplots(engines, 1, figsize=(7.0, 1.1 * engines + 1), sharex=True, squeeze=False)
    ranks = sorted({rank for i in intervals for tokens in i.rank_tokens for rank in tokens})
    times = [i.time_s for i in intervals[1:]]
    colours = pyplot.get_cmap("viridis")
    for engine, axis in enumerate(axes[:, 0]):
        mixes = [i.rank_tokens[engine] for i in intervals[1:]]
        shares = [[mix.get(rank, 0) / (sum(mix.values()) or 1) for mix in mixes] for rank in ranks]
        axis.stackplot(times, shares, colors=[colours(k / max(1, len(ranks) - 1)) for k in range(len(ranks))])
        axis.set_ylim(0, 1)
        axis.set_ylabel(str(engine), rotation=0, labelpad=12)
        axis.set_yticks([])
    axes[0, 0].set_title(f"{title}: tokens by rank on each engine")
    axes[-1, 0].set_xlabel("time (s)")
    figure.legend([f"rank {rank}" for rank in ranks], loc="lower right", ncols=len(ranks), fontsize="small")
    return _save(figure, path)


def plot_grid(comparisons: Mapping[str, Comparison], folder: Path) -> Path:
    """Plot for each workload the default policy's highest request rate divided by that of ``toppings``."""
    names = list(comparisons)
    figure, axis = pyplot.subplots(figsize=(8.0, 0.28 * len(names) + 1.5))
    places = range(len(names))
    ours = [c.results[DEFAULT_POLICY].max_rps for c in comparisons.values()]
    toppings = [c.results[TOPPINGS].max_rps for c in comparisons.values()]
    axis.barh(places, [a / b for a, b in zip(ours, toppings, strict=True)], color=COLOURS[DEFAULT_POLICY])
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(places, names, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("max rps under the SLO, ours / toppings")
    return _save(figure, folder / "grid.png")


def _curves(comparison: Comparison, field: str, label: str, title: str, path: Path) -> Path:
    figure, axis = pyplot.subplots(figsize=SIZE_INCHES)
    for name, result in comparison.results.items():
        points = [(p.rps, getattr(p, field)) for p in result.curve if isfinite(getattr(p, field)) and not p.hopeless]
        axis.plot(*zip(*points, strict=True) if points else ([], []), "o-", ms=3, label=name, color=COLOURS.get(name))
    if field == "p95_ttft_s":
        axis.set_yscale("log")
        axis.axhline(comparison.slo_ttft_s, color="black", linewidth=0.8, linestyle="--")
    axis.set_xlabel("load (requests/s)")
    axis.legend(fontsize="small")
    return _label_and_save(figure, axis, label, title, path)


def _bars(values: Mapping[str, float], label: str, title: str, path: Path) -> Path:
    figure, axis = pyplot.subplots(figsize=SIZE_INCHES)
    axis.bar(list(values), list(values.values()), color=[COLOURS.get(name, "#888888") for name in values])
    axis.tick_params(axis="x", labelrotation=20)
    return _label_and_save(figure, axis, label, title, path)


def _label_and_save(figure: Any, axis: Any, label: str, title: str, path: Path) -> Path:
    axis.set_ylabel(label)
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
