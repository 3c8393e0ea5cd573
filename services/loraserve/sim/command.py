"""scripts/simulate: from arguments to runs, tables, plots and one line of JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loraserve.errors import LoraServeError
from loraserve.sim import report
from loraserve.sim.arguments import check, job_of, loads_of, parser, policies_of
from loraserve.sim.cluster import Simulation
from loraserve.sim.compare import LOAD_SHARES, OURS, Comparison, Run, changed_profiles, compare
from loraserve.sim.estimate import capacity_rps, limit_rps
from loraserve.sim.outcome import Outcome
from loraserve.sim.parallel import spread
from loraserve.sim.policies import policy_named
from loraserve.sim.runs import Job, Point, load, workload_of
from loraserve.sim.workload import grid

USUAL_LOAD = 0.7
"""Of the guessed capacity: where a single run is that names no load."""
SAMPLE = 2000
"""Requests that a first guess of the capacity is made from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 could not be done, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        base = job_of(arguments)
        names = policies_of(arguments)
        check(arguments, names)
        content, text = _mode(arguments)(arguments, base, names)
    except LoraServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not arguments.json:
        print(text, end="\n\n")
    print(json.dumps(content, allow_nan=False))
    return 0


Mode = Callable[[argparse.Namespace, Job, list[str]], tuple[dict[str, Any], str]]


def _mode(arguments: argparse.Namespace) -> Mode:
    if arguments.compare:
        return run_compare
    if arguments.grid:
        return run_grid
    if arguments.sensitivity:
        return run_sensitivity
    return run_sweep if arguments.loads or len(policies_of(arguments)) > 1 else run_one


def run_one(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """One policy at one load, with its timeline."""
    rps = base.rps or USUAL_LOAD * _guess_rps(base)
    workload = workload_of(msgspec.structs.replace(base, rps=rps))
    policy = policy_named(names[0], base.settings.seed)
    simulation = Simulation(workload, policy, base.profile, base.engines, base.settings)
    outcome = simulation.run(_progress(arguments.json))
    written = _plots(arguments, lambda folder: [_timeline(outcome, folder)])
    rows = [[name, value] for name, value in run_figures(outcome).items()]
    title = f"{names[0]} on {base.engines} engines, {workload.name}"
    text = "\n".join([title, "", report.table(["", ""], rows), *written])
    figures = {key: report.number(value) for key, value in run_figures(outcome).items()}
    return {"simulate": "run", "policy": names[0], "workload": workload.name, "figures": figures}, text


def run_figures(outcome: Outcome) -> dict[str, float]:
    return {
        "rps": outcome.rps,
        "p50_ttft_s": outcome.p50_ttft_s,
        "p95_ttft_s": outcome.p95_ttft_s,
        "goodput_rps": outcome.goodput_rps,
        "decode_s": outcome.decode_s,
        "rejected": outcome.rejected,
        "busy_share": outcome.busy_share,
        "adapter_bytes_share": outcome.bytes_share,
        "held_bytes_share": outcome.held_share,
        "moves_per_interval": outcome.moves_per_interval,
        **{f"routed_{why}": float(count) for why, count in sorted(outcome.whys.items())},
    }


def run_sweep(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """Every policy at every load that was named."""
    loads = loads_of(arguments) or [base.rps or USUAL_LOAD * _guess_rps(base)]
    jobs = [msgspec.structs.replace(base, policy=name, rps=rps) for name in names for rps in loads]
    with spread(arguments.workers, _say(arguments.json)) as run:
        points = run(jobs)
    rows = [
        [p.policy, p.rps, p.p50_ttft_s, p.p95_ttft_s, p.goodput_rps, p.busy_share, p.bytes_share, p.moves_per_interval]
        for p in points
    ]
    header = ["policy", "rps", "P50 TTFT (s)", "P95 TTFT (s)", "goodput", "busy", "bytes needed", "moves/interval"]
    highest = [max((p for p in points if p.policy == name), key=lambda p: p.rps) for name in names]
    written = _plots(arguments, lambda folder: [_timeline(p, folder, f"timeline_{p.policy}.png") for p in highest])
    text = "\n".join([report.table(header, rows), *written])
    return {"simulate": "sweep", "points": [_point_json(p) for p in points]}, text


def _point_json(point: Point) -> dict[str, Any]:
    """Its figures; what happened when is drawn."""
    values = msgspec.structs.asdict(point)
    del values["intervals"]
    return {k: report.number(v) if isinstance(v, float) else v for k, v in values.items()}


def run_compare(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """The whole comparison on one workload."""
    with spread(arguments.workers, _say(arguments.json)) as run:
        comparison = _compare(base, names, run, LOAD_SHARES, draws=arguments.draws)
    limit = _limit_rps(msgspec.structs.replace(base, rps=comparison.best_baseline_rps))
    title = (
        f"{base.source.name}, {base.engines} engines, {base.profile.model} on {base.profile.hardware}, {arguments.cost}"
    )
    written = _plots(arguments, lambda folder: _comparison_plots(comparison, title, folder, base))
    text = "\n".join(
        [
            f"{title}, SLO P95 TTFT {arguments.slo_s:g} s, {_length(base)} a run",
            "",
            report.summary(comparison),
            f"(P95 and adapters at 80% of {comparison.best_baseline}'s largest load; engines needed for all of it, "
            f"{comparison.engines_rps:.1f} rps)",
            *report.draws(comparison),
            *report.too_short(comparison),
            f"(no placement serves more than {limit:.1f} rps for good: full batches, and each token pays its own rank)",
            "",
            report.load_table(comparison),
            "",
            *(f"ours falls short: {text}" for text in report.shortfalls(comparison, limit)),
            *written,
        ]
    )
    return {
        "simulate": "compare",
        "workload": base.source.name,
        "engines": base.engines,
        "cost": arguments.cost,
        "slo_s": arguments.slo_s,
        "limit_rps": report.number(limit),
        "policies": report.as_json(comparison),
    }, text


def run_grid(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """Ours against the baselines on drawn workloads of every kind."""
    shapes = grid(arguments.requests, arguments.adapters, arguments.seed)
    comparisons: dict[str, Comparison] = {}
    with spread(arguments.workers, _say(arguments.json)) as run:
        for shape in shapes:
            comparisons[shape.name] = _compare(
                msgspec.structs.replace(base, source=shape), names, run, LOAD_SHARES, count_engines=False
            )
    written = _plots(arguments, lambda folder: _grid_plots(comparisons, folder))
    gains = report.gains(comparisons)
    text = "\n".join([report.grid_table(comparisons), "", report.gains_text(gains), *written])
    return {
        "simulate": "grid",
        "engines": base.engines,
        "cost": arguments.cost,
        "gains": gains,
        "workloads": {name: report.as_json(c) for name, c in comparisons.items()},
    }, text


def run_sensitivity(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """What the gains hang on: the profile derived anew with one efficiency changed."""
    rows = []
    content: dict[str, Any] = {}
    with spread(arguments.workers, _say(arguments.json)) as run:
        for change, profile in changed_profiles(base.profile).items():
            c = _compare(msgspec.structs.replace(base, profile=profile), names, run, (0.8,), count_engines=False)
            ratios = {name: c.results[OURS].max_rps / (r.max_rps or 1e-9) for name, r in c.results.items()}
            content[change] = {name: report.number(ratio) for name, ratio in ratios.items()}
            rows.append([change, c.results[OURS].max_rps, *(ratios[name] for name in names if name != OURS)])
    header = ["changed", "ours, max rps", *(f"/ {name}" for name in names if name != OURS)]
    return {"simulate": "sensitivity", "ratios": content}, report.table(header, rows)


def _compare(
    base: Job, names: list[str], run: Run, shares: Sequence[float], count_engines: bool = True, draws: int = 1
) -> Comparison:
    return compare(base, names, _guess_rps(base), run, shares, count_engines, draws)


def _guess_rps(base: Job) -> float:
    source = msgspec.structs.replace(base.source, requests=base.source.requests or SAMPLE)
    return capacity_rps(load(source, base.profile.engine.slab_bytes_per_rank), base.profile, base.engines)


def _limit_rps(base: Job) -> float:
    """Of the workload at the job's load: the longer a run is, the more of a trace it is."""
    return limit_rps(workload_of(base), base.profile, base.engines)


def _length(base: Job) -> str:
    return f"{base.source.requests} requests" if base.source.requests else f"{base.duration_s:g} s"


def _plots(arguments: argparse.Namespace, draw: Callable[[Path], list[Path]]) -> list[str]:
    """Lines that name what was written."""
    if not arguments.out:
        return []
    return [f"wrote {path}" for path in draw(Path(arguments.out))]


def _comparison_plots(comparison: Comparison, title: str, folder: Path, base: Job) -> list[Path]:
    from loraserve.sim.plots import plot_comparison
    from loraserve.sim.runs import simulate

    rps = 0.8 * comparison.best_baseline_rps
    outcome = simulate(msgspec.structs.replace(base, policy=OURS, rps=rps))
    return [*plot_comparison(comparison, title, folder), _timeline(outcome, folder)]


def _timeline(ran: Outcome | Point, folder: Path, name: str = "timeline.png") -> Path:
    # Imported where it is needed: without --out the simulator works without matplotlib.
    from loraserve.sim.plots import plot_timeline

    return plot_timeline(ran.intervals, f"{ran.policy}, {ran.rps:.1f} rps", folder / name)


def _grid_plots(comparisons: Mapping[str, Comparison], folder: Path) -> list[Path]:
    from loraserve.sim.plots import plot_grid

    return [plot_grid(comparisons, folder)]


def _say(quiet: bool) -> Callable[[str], None] | None:
    return (lambda text: None) if quiet else None


def _progress(quiet: bool) -> Callable[[float], None]:
    def show(share: float) -> None:
        if not quiet:
            print(f"\r{share:4.0%} of the requests", end="" if share < 1 else "\n", file=sys.stderr, flush=True)

    return show
