"""The command scripts/simulate: runs simulations and prints tables and a final line of JSON.

Each mode is a function ``run_*``. It takes the flags, the run that the flags describe, and the names of the policies.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loraserve.errors import LoraServeError
from loraserve.sim import report
from loraserve.sim.arguments import check_arguments, loads_of, make_parser, policies_of, spec_of
from loraserve.sim.cluster import Simulation
from loraserve.sim.compare import CompareOptions, Comparison, capacity_rps, changed_profiles, compare, limit_rps
from loraserve.sim.outcome import Outcome
from loraserve.sim.parallel import parallel_runner
from loraserve.sim.policies import DEFAULT_POLICY, policy_named
from loraserve.sim.runs import RunFigures, RunSpec, make_workload, run_figures, workload_for
from loraserve.sim.workload import grid_shapes

DEFAULT_LOAD = 0.7
"""The request rate of a single run without --rps, as a fraction of the estimated capacity."""
SAMPLE_REQUESTS = 2000
"""Number of requests from which the capacity is estimated."""


class Result(NamedTuple):
    """The content of the printed line of JSON, and the text that is printed before it."""

    content: dict[str, Any]
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 for success, 1 for an error, 130 for Ctrl-C. Wrong usage raises SystemExit."""
    arguments = make_parser().parse_args(argv)
    try:
        base = spec_of(arguments)
        names = policies_of(arguments)
        check_arguments(arguments, names)
        modes = {"compare": run_compare, "grid": run_grid, "sensitivity": run_sensitivity}
        default = run_sweep if arguments.loads or len(names) > 1 else run_one
        mode = next((run for flag, run in modes.items() if getattr(arguments, flag)), default)
        result = mode(arguments, base, names)
    except LoraServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not arguments.json:
        print(result.text, end="\n\n")
    print(json.dumps(result.content, allow_nan=False))
    return 0


def run_one(arguments: argparse.Namespace, base: RunSpec, names: list[str]) -> Result:
    rps = base.rps or DEFAULT_LOAD * _guess_rps(base)
    workload = workload_for(msgspec.structs.replace(base, rps=rps))
    policy = policy_named(names[0], base.settings.seed)
    simulation = Simulation(workload, policy, base.profile, base.engines, base.settings)
    outcome = simulation.run(_progress(arguments.json))
    plots = _draw(arguments, lambda folder: [_timeline(outcome, folder)])
    figures = outcome_figures(outcome)
    title = f"{names[0]} on {base.engines} engines, {workload.name}"
    text = "\n".join([title, "", report.value_table(["", ""], list(figures.items())), *plots])
    numbers = {key: report.json_number(value) for key, value in figures.items()}
    return Result({"simulate": "run", "policy": names[0], "workload": workload.name, "figures": numbers}, text)


def outcome_figures(outcome: Outcome) -> dict[str, float]:
    """Return the figures of a single run; ``routed_*`` are numbers of requests by ``Candidate.why``."""
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


def run_sweep(arguments: argparse.Namespace, base: RunSpec, names: list[str]) -> Result:
    loads = loads_of(arguments) or [base.rps or DEFAULT_LOAD * _guess_rps(base)]
    specs = [msgspec.structs.replace(base, policy=name, rps=rps) for name in names for rps in loads]
    with parallel_runner(arguments.workers, quiet=arguments.json) as run_all:
        points = run_all(specs)
    rows = [
        [p.policy, p.rps, p.p50_ttft_s, p.p95_ttft_s, p.goodput_rps, p.busy_share, p.bytes_share, p.moves_per_interval]
        for p in points
    ]
    header = ["policy", "rps", "P50 TTFT (s)", "P95 TTFT (s)", "goodput", "busy", "bytes needed", "moves/interval"]
    highest = [max((p for p in points if p.policy == name), key=lambda p: p.rps) for name in names]
    plots = _draw(arguments, lambda folder: [_timeline(p, folder, f"timeline_{p.policy}.png") for p in highest])
    text = "\n".join([report.value_table(header, rows), *plots])
    return Result({"simulate": "sweep", "points": [_json_point(p) for p in points]}, text)


def run_compare(arguments: argparse.Namespace, base: RunSpec, names: list[str]) -> Result:
    with parallel_runner(arguments.workers, quiet=arguments.json) as run_all:
        comparison = compare(base, names, _guess_rps(base), run_all, CompareOptions(draws=arguments.draws))
    # Use the best baseline's load, because a run at a higher load uses more requests of a trace.
    at_best = msgspec.structs.replace(base, rps=comparison.best_baseline_rps)
    best = comparison.best_baseline
    limit = limit_rps(workload_for(at_best), base.profile, base.engines)
    title = (
        f"{base.source.name}, {base.engines} engines, {base.profile.model} on {base.profile.hardware}, {arguments.cost}"
    )
    length = f"{base.source.requests} requests" if base.source.requests else f"{base.duration_s:g} s"
    plots = _draw(arguments, lambda folder: _comparison_plots(comparison, title, folder, base))
    text = "\n".join(
        [
            f"{title}, SLO P95 TTFT {arguments.slo_s:g} s, {length} a run",
            "",
            report.summary_table(comparison),
            f"(engines needed: at the largest load of {best}, {comparison.best_baseline_rps:.1f} rps; "
            "P95, adapters, bytes and moves: at 80% of it)",
            *report.draws_text(comparison),
            *report.never_overloaded_text(comparison),
            f"(upper bound for every placement: {limit:.1f} rps, with full batches and no padding to higher ranks)",
            "",
            report.load_table(comparison),
            "",
            *report.missed_goals(comparison, limit),
            *plots,
        ]
    )
    content = {
        "simulate": "compare",
        "workload": base.source.name,
        "engines": base.engines,
        "cost": arguments.cost,
        "slo_s": arguments.slo_s,
        "limit_rps": report.json_number(limit),
        "policies": report.json_figures(comparison),
    }
    return Result(content, text)


def run_grid(arguments: argparse.Namespace, base: RunSpec, names: list[str]) -> Result:
    comparisons: dict[str, Comparison] = {}
    with parallel_runner(arguments.workers, quiet=arguments.json) as run_all:
        for shape in grid_shapes(arguments.requests, arguments.adapters, arguments.seed):
            spec = msgspec.structs.replace(base, source=shape)
            options = CompareOptions(count_engines=False)
            comparisons[shape.name] = compare(spec, names, _guess_rps(spec), run_all, options)
    plots = _draw(arguments, lambda folder: [_plots().plot_grid(comparisons, folder)])
    gains = report.gains(comparisons)
    text = "\n".join([report.grid_table(comparisons), "", report.gains_text(gains), *plots])
    content = {
        "simulate": "grid",
        "engines": base.engines,
        "cost": arguments.cost,
        "gains": gains,
        "workloads": {name: report.json_figures(c) for name, c in comparisons.items()},
    }
    return Result(content, text)


def run_sensitivity(arguments: argparse.Namespace, base: RunSpec, names: list[str]) -> Result:
    """Compare the policies on the profile and on its variants, each with one efficiency halved or doubled."""
    rows = []
    content: dict[str, Any] = {}
    baselines = [name for name in names if name != DEFAULT_POLICY]
    options = CompareOptions(shares=(0.8,), count_engines=False)
    with parallel_runner(arguments.workers, quiet=arguments.json) as run_all:
        for change, profile in changed_profiles(base.profile).items():
            spec = msgspec.structs.replace(base, profile=profile)
            comparison = compare(spec, names, _guess_rps(spec), run_all, options)
            ratios = {name: comparison.gain_over(result.max_rps) for name, result in comparison.results.items()}
            content[change] = {name: report.json_number(ratio) for name, ratio in ratios.items()}
            ours_rps = comparison.results[DEFAULT_POLICY].max_rps
            rows.append([change, ours_rps, *(ratios[name] for name in baselines)])
    header = ["changed", "ours, max rps", *(f"/ {name}" for name in baselines)]
    return Result({"simulate": "sensitivity", "ratios": content}, report.value_table(header, rows))


def _guess_rps(base: RunSpec) -> float:
    source = msgspec.structs.replace(base.source, requests=base.source.requests or SAMPLE_REQUESTS)
    workload = make_workload(source, base.profile.engine.slab_bytes_per_rank)
    return capacity_rps(workload, base.profile, base.engines)


def _json_point(figures: RunFigures) -> dict[str, Any]:
    values = {key: value for key, value in msgspec.structs.asdict(figures).items() if key != "intervals"}
    return {key: report.json_number(value) if isinstance(value, float) else value for key, value in values.items()}


def _draw(arguments: argparse.Namespace, draw: Callable[[Path], list[Path]]) -> list[str]:
    """Draw plots if --out is given. Return lines that name the files."""
    if not arguments.out:
        return []
    return [f"wrote {path}" for path in draw(Path(arguments.out))]


def _comparison_plots(comparison: Comparison, title: str, folder: Path, base: RunSpec) -> list[Path]:
    spec = msgspec.structs.replace(base, policy=DEFAULT_POLICY, rps=0.8 * comparison.best_baseline_rps)
    return [*_plots().plot_comparison(comparison, title, folder), _timeline(run_figures(spec), folder)]


def _timeline(run: Outcome | RunFigures, folder: Path, name: str = "timeline.png") -> Path:
    path: Path = _plots().plot_timeline(run.intervals, f"{run.policy}, {run.rps:.1f} rps", folder / name)
    return path


def _plots() -> Any:
    """Import ``plots`` on demand, so that only --out needs matplotlib."""
    from loraserve.sim import plots

    return plots


def _progress(quiet: bool) -> Callable[[float], None]:
    def show(share: float) -> None:
        if not quiet:
            print(f"\r{share:4.0%} of the requests", end="" if share < 1 else "\n", file=sys.stderr, flush=True)

    return show
