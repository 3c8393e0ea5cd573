"""scripts/simulate: from arguments to runs, tables, plots and one line of JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loraserve.cost.profile import Profile, read_profile
from loraserve.errors import ConfigError, LoraServeError
from loraserve.sim import report
from loraserve.sim.arguments import parser
from loraserve.sim.cluster import SimSettings, Simulation
from loraserve.sim.compare import LOAD_SHARES, OURS, Comparison, Run, compare
from loraserve.sim.estimate import capacity_rps
from loraserve.sim.outcome import Outcome
from loraserve.sim.points import Job, Point, Source, TraceSource, load
from loraserve.sim.policies import POLICIES, policy_named
from loraserve.sim.sensitivity import changed_profiles
from loraserve.sim.spread import spread
from loraserve.sim.synthetic import LENGTHS, RANK_MIXES, Shape, grid

REQUESTS_PER_ENGINE = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 could not be done, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        base = job_of(arguments)
        names = policies_of(arguments)
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


def job_of(arguments: argparse.Namespace) -> Job:
    """What the flags ask for, at no load yet. Raises ConfigError naming the flag."""
    for flag in ("engines", "adapters"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: at least 1 is needed")
    for flag in ("slo_s", "plan_interval_s", "report_interval_s"):
        if not getattr(arguments, flag) > 0:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: seconds, more than 0")
    if arguments.rps < 0 or arguments.requests < 0:
        raise ConfigError("--rps and --requests are not negative")
    profile = profile_of(arguments)
    return Job(
        source=_source(arguments),
        policy=OURS,
        engines=arguments.engines,
        rps=arguments.rps,
        profile=profile,
        settings=SimSettings(
            slo_ttft_s=arguments.slo_s,
            plan_interval_s=arguments.plan_interval_s,
            report_interval_s=arguments.report_interval_s,
            seed=arguments.seed,
        ),
    )


def profile_of(arguments: argparse.Namespace) -> Profile:
    """The profile with the kind of LoRA cost that was asked for. Derived ones are shipped for both."""
    name: str = arguments.profile
    if "/" not in name and not name.endswith(".json") and arguments.cost == "padded":
        name = name.removesuffix("-padded") + "-padded"
    profile = read_profile(name)
    if profile.cost.lora != arguments.cost:
        raise ConfigError(
            f"profile {name} has {profile.cost.lora} LoRA cost, --cost says {arguments.cost}; "
            f"take another profile, or measure one with scripts/profile --lora {arguments.cost}"
        )
    return profile


def policies_of(arguments: argparse.Namespace) -> list[str]:
    several = arguments.compare or arguments.grid or arguments.sensitivity or arguments.loads
    names = [n for n in arguments.policies.split(",") if n] or (list(POLICIES) if several else [OURS])
    return [policy_named(name).name for name in dict.fromkeys(names)]


def _source(arguments: argparse.Namespace) -> Source:
    requests = arguments.requests or REQUESTS_PER_ENGINE * arguments.engines
    if arguments.trace:
        return TraceSource(path=arguments.trace, adapters=arguments.adapters, requests=requests, seed=arguments.seed)
    for flag, known in (("ranks", RANK_MIXES), ("lengths", LENGTHS)):
        if getattr(arguments, flag) not in known:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: there are {', '.join(known)}")
    return Shape(
        ranks=arguments.ranks,
        arrivals=arguments.arrivals,
        drift=arguments.drift,
        lengths=arguments.lengths,
        adapters=arguments.adapters,
        requests=requests,
        seed=arguments.seed,
    )


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
    workload = load(base.source, base.profile.engine.slab_bytes_per_rank)
    rps = base.rps or 0.7 * capacity_rps(workload, base.profile, base.engines)
    simulation = Simulation(workload.at(rps), policy_named(names[0]), base.profile, base.engines, base.settings)
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
        "decode_s": outcome.tpot_s,
        "rejected": outcome.rejected,
        "busy_share": outcome.busy_share,
        "adapter_bytes_share": outcome.bytes_share,
        "held_bytes_share": outcome.held_share,
        "moves_per_interval": outcome.moves_per_interval,
        **{f"routed_{why}": float(count) for why, count in sorted(outcome.whys.items())},
    }


def run_sweep(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """Every policy at every load that was named."""
    try:
        loads = [float(text) for text in (arguments.loads or str(base.rps)).split(",")]
    except ValueError as error:
        raise ConfigError(f"--loads {arguments.loads}: {error}; write requests/s, such as 10,20,30") from error
    if min(loads) <= 0:
        raise ConfigError("--loads (or --rps): requests/s, more than 0")
    jobs = [msgspec.structs.replace(base, policy=name, rps=rps) for name in names for rps in loads]
    with spread(arguments.workers, _say(arguments.json)) as run:
        points = run(jobs)
    rows = [
        [p.policy, p.rps, p.p50_ttft_s, p.p95_ttft_s, p.goodput_rps, p.busy_share, p.bytes_share, p.moves_per_interval]
        for p in points
    ]
    header = ["policy", "rps", "P50 TTFT (s)", "P95 TTFT (s)", "goodput", "busy", "bytes needed", "moves/interval"]
    return {"simulate": "sweep", "points": [_point_json(p) for p in points]}, report.table(header, rows)


def _point_json(point: Point) -> dict[str, Any]:
    values = msgspec.structs.asdict(point)
    return {k: report.number(v) if isinstance(v, float) else v for k, v in values.items()}


def run_compare(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """The whole comparison on one workload."""
    workload = load(base.source, base.profile.engine.slab_bytes_per_rank)
    with spread(arguments.workers, _say(arguments.json)) as run:
        comparison = _compare(base, names, run, LOAD_SHARES)
    title = (
        f"{workload.name}, {base.engines} engines, {base.profile.model} on {base.profile.hardware}, {arguments.cost}"
    )
    written = _plots(arguments, lambda folder: _comparison_plots(comparison, title, folder, base))
    text = "\n".join(
        [
            f"{title}, SLO P95 TTFT {arguments.slo_s:g} s, {len(workload.requests)} requests a run",
            "",
            report.summary(comparison),
            f"(P95 and adapters at 80% of {comparison.best_baseline}'s largest load; engines needed for all of it, "
            f"{comparison.engines_rps:.1f} rps)",
            "",
            report.load_table(comparison),
            "",
            *(f"ours falls short: {text}" for text in report.shortfalls(comparison)),
            *written,
        ]
    )
    return {
        "simulate": "compare",
        "workload": workload.name,
        "engines": base.engines,
        "cost": arguments.cost,
        "slo_s": arguments.slo_s,
        "policies": report.as_json(comparison),
    }, text


def run_grid(arguments: argparse.Namespace, base: Job, names: list[str]) -> tuple[dict[str, Any], str]:
    """Ours against the baselines on drawn workloads of every kind."""
    requests = arguments.requests or REQUESTS_PER_ENGINE * arguments.engines
    shapes = grid(requests, arguments.adapters, arguments.seed)
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


def _compare(base: Job, names: list[str], run: Run, shares: Sequence[float], count_engines: bool = True) -> Comparison:
    workload = load(base.source, base.profile.engine.slab_bytes_per_rank)
    guess_rps = capacity_rps(workload, base.profile, base.engines)
    return compare(base, names, guess_rps, run, shares, count_engines)


def _plots(arguments: argparse.Namespace, draw: Callable[[Path], list[Path]]) -> list[str]:
    """Lines that name what was written."""
    if not arguments.out:
        return []
    folder = Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [f"wrote {path}" for path in draw(folder)]
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name a folder that can be written to") from error


def _comparison_plots(comparison: Comparison, title: str, folder: Path, base: Job) -> list[Path]:
    from loraserve.sim.plots import plot_comparison
    from loraserve.sim.points import simulate

    rps = 0.8 * comparison.best_baseline_rps
    outcome = simulate(msgspec.structs.replace(base, policy=OURS, rps=rps))
    return [*plot_comparison(comparison, title, folder), _timeline(outcome, folder)]


def _timeline(outcome: Outcome, folder: Path) -> Path:
    # Imported where it is needed: without --out the simulator works without matplotlib.
    from loraserve.sim.plots import plot_timeline

    return plot_timeline(outcome, f"{outcome.policy}, {outcome.rps:.1f} rps", folder / "timeline.png")


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
