"""The flags of scripts/simulate, their checks, and the runs that they describe.

Invalid flags are found before any simulation runs. They raise ConfigError, or SystemExit if argparse finds them.
"""

import argparse
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import get_args

from loraserve.cost.profile import SHIPPED, Profile, read_profile
from loraserve.errors import ConfigError
from loraserve.sim.outcome import SimSettings
from loraserve.sim.policies import DEFAULT_POLICY, POLICY_NAMES, TOPPINGS, policy_named
from loraserve.sim.runs import RunSpec, Source
from loraserve.sim.workload import LENGTHS, RANK_MIXES, Arrivals, Drift, TraceSource, WorkloadShape

MIN_RPS = 0.01
MIN_REQUESTS = 10

EXAMPLES = """\
examples:
  scripts/simulate --engines 8 --rps 30
      one run of the policy ours on a drawn workload
  scripts/simulate --trace T.csv.gz --policies ours,toppings --loads 10,20,30
      a sweep: each policy at each load; with --out, a timeline of each policy at the highest load
  scripts/simulate --compare --trace T.csv.gz --adapters 100 --engines 8 --cost padded
      for each policy: the largest load under the SLO, P95 TTFT at the same loads, engines needed, adapters held
  scripts/simulate --grid --engines 4
      the policy ours against the best baseline on 24 drawn workloads
  scripts/simulate --sensitivity --engines 4
      the comparison with each efficiency of a derived profile halved and doubled

what is simulated:
  Router, planner, demand windows, scheduler and adapter pool are the production code. Steps and adapter loads take
  the time that the profile's cost model predicts. A profile is a file written by scripts/profile or the name of a
  shipped one.

policies:
  slora-random, slora-contiguous    each adapter is assigned to one engine once; a request goes to that engine
                                    (slora-random is drawn --draws times)
  toppings                          every adapter is on every engine at no cost; rank-aware least finish time
  dynamo                            copies in proportion to load, rendezvous hashing, fewest requests
  loraserve                         the LoRAServe paper: operating points, budgets for each rank, routing by shares
  ours                              this project's default: placement by rank and demand, routing by prediction

traces:
  CSV files with the columns time_s,client,prompt_tokens,output_tokens, or those of Azure's traces,
  TIMESTAMP,ContextTokens,GeneratedTokens; compressed if the name ends in .gz. Clients become tenants with adapters of
  ranks 8 to 128. For another load, the gaps between requests are scaled.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="Simulate a cluster that serves a workload under different placement and routing policies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compare", action="store_true", help="find each policy's largest load, compare at equal loads")
    mode.add_argument("--grid", action="store_true", help="compare on 24 drawn workloads")
    mode.add_argument("--sensitivity", action="store_true", help="compare with each efficiency halved and doubled")
    _add_workload_flags(parser.add_argument_group("workload"))
    _add_cluster_flags(parser.add_argument_group("cluster"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print only the line of JSON")
    output.add_argument("--out", metavar="DIR", default="", help="folder for plots as PNG files (default: no plots)")
    output.add_argument("--workers", type=int, default=0, help="parallel simulations (default: one for each core)")
    return parser


def _add_workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", metavar="FILE", default="", help="a trace (default: draw a workload)")
    group.add_argument("--adapters", type=int, default=100, metavar="N", help="number of adapters (default: 100)")
    group.add_argument("--seconds", type=float, default=300.0, metavar="S", help="duration of arrivals (default: 300)")
    group.add_argument("--requests", type=int, default=0, metavar="N", help="requests in a run, instead of --seconds")
    group.add_argument("--rps", type=float, default=0.0, help="requests/s of a single run (default: 0.7 of capacity)")
    group.add_argument("--loads", default="", metavar="A,B,C", help="loads of a sweep in requests/s")
    group.add_argument("--ranks", default="uniform", help=f"ranks of a drawn workload: {', '.join(RANK_MIXES)}")
    group.add_argument(
        "--arrivals",
        choices=get_args(Arrivals),
        default="poisson",
        help="arrivals of a drawn workload (default: poisson)",
    )
    group.add_argument(
        "--drift", choices=get_args(Drift), default="none", help="drift of a drawn workload (default: none)"
    )
    group.add_argument(
        "--lengths", choices=tuple(LENGTHS), default="chat", help="lengths of a drawn workload (default: chat)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")


def _add_cluster_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--engines", type=int, default=4, metavar="N", help="number of engines (default: 4)")
    group.add_argument("--policies", default="", metavar="A,B,C", help="default: ours, or all policies in a comparison")
    group.add_argument(
        "--draws",
        type=int,
        default=3,
        metavar="N",
        help="number of random placements of slora-random in --compare, drawn with --seed and the following seeds; "
        "the table shows the median draw by max rps, or the lower median of an even number (default: 3)",
    )
    group.add_argument("--profile", default="llama-3-8b-a100", help="name of a shipped profile or a file")
    group.add_argument(
        "--cost",
        choices=("padded", "exact"),
        default="padded",
        help="LoRA cost of a token: its own rank (exact, this project's kernels), or the largest rank of the batch "
        "(padded, the kernels of other systems; default)",
    )
    group.add_argument("--slo-s", type=float, default=10.0, metavar="S", help="the SLO: target P95 TTFT (default: 10)")
    for name, what in (("plan", "plans"), ("report", "reports of the engines")):
        default = getattr(SimSettings(), f"{name}_interval_s")
        text = f"time between {what} (default: {default:g})"
        group.add_argument(f"--{name}-interval-s", type=float, default=default, metavar="S", help=text)


def spec_of(arguments: argparse.Namespace) -> RunSpec:
    """Return the run that the flags describe, at the request rate of --rps."""
    return RunSpec(
        source=_source(arguments),
        policy=DEFAULT_POLICY,
        engines=arguments.engines,
        rps=arguments.rps,
        profile=_profile(arguments),
        settings=SimSettings(
            slo_ttft_s=arguments.slo_s,
            plan_interval_s=arguments.plan_interval_s,
            report_interval_s=arguments.report_interval_s,
            seed=arguments.seed,
        ),
        duration_s=arguments.seconds,
    )


def policies_of(arguments: argparse.Namespace) -> list[str]:
    compares = arguments.compare or arguments.grid or arguments.sensitivity or arguments.loads
    names = [n for n in arguments.policies.split(",") if n] or (POLICY_NAMES if compares else [DEFAULT_POLICY])
    return [policy_named(name).name for name in dict.fromkeys(names)]


def loads_of(arguments: argparse.Namespace) -> list[float]:
    try:
        loads = [float(text) for text in arguments.loads.split(",")] if arguments.loads else []
    except ValueError as error:
        raise ConfigError(f"--loads {arguments.loads}: {error}; write requests/s, such as 10,20,30") from error
    if not all(isfinite(rps) and rps >= MIN_RPS for rps in loads):
        raise ConfigError(f"--loads {arguments.loads}: requests/s must be finite and at least {MIN_RPS}")
    return loads


def check_arguments(arguments: argparse.Namespace, names: list[str]) -> None:
    """Check the flags that the other functions do not check, and create the folder for plots."""
    for flag, minimum in (("engines", 1), ("adapters", 1), ("draws", 1), ("workers", 0)):
        if getattr(arguments, flag) < minimum:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: must be at least {minimum}")
    for flag in ("slo_s", "plan_interval_s", "report_interval_s", "seconds"):
        value = getattr(arguments, flag)
        if not (isfinite(value) and value > 0):
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: seconds must be finite and more than 0")
    if arguments.rps and not (isfinite(arguments.rps) and arguments.rps >= MIN_RPS):
        raise ConfigError(f"--rps {arguments.rps}: requests/s must be finite and at least {MIN_RPS}")
    if arguments.requests and arguments.requests < MIN_REQUESTS:
        raise ConfigError(f"--requests {arguments.requests}: must be at least {MIN_REQUESTS}; or use --seconds instead")
    loads_of(arguments)
    needed = {DEFAULT_POLICY, TOPPINGS} if arguments.grid else {DEFAULT_POLICY} if arguments.sensitivity else set()
    if needed - set(names):
        raise ConfigError(f"--policies {arguments.policies}: this mode needs {', '.join(sorted(needed))}; add them")
    if arguments.out:
        _make_folder(Path(arguments.out))


def _make_folder(folder: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--out needs matplotlib, which is not installed; install the extra 'sim'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name a folder that can be written to") from error


def _profile(arguments: argparse.Namespace) -> Profile:
    """Return the profile named by --profile with the LoRA cost of --cost. Raises ConfigError if there is none."""
    name: str = arguments.profile
    padded = name.removesuffix("-padded") + "-padded"
    if arguments.cost == "padded" and (SHIPPED / f"{padded}.json").exists():
        name = padded
    profile = read_profile(name)
    if profile.cost.lora != arguments.cost:
        raise ConfigError(
            f"profile {name} has {profile.cost.lora} LoRA cost, --cost says {arguments.cost}; "
            f"use another profile, or measure one with scripts/profile --lora {arguments.cost}"
        )
    return profile


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.trace:
        return TraceSource(
            path=arguments.trace, adapters=arguments.adapters, requests=arguments.requests, seed=arguments.seed
        )
    for flag, known in (("ranks", RANK_MIXES), ("lengths", LENGTHS)):
        if getattr(arguments, flag) not in known:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: there are {', '.join(known)}")
    return WorkloadShape(
        ranks=arguments.ranks,
        arrivals=arguments.arrivals,
        drift=arguments.drift,
        lengths=arguments.lengths,
        adapters=arguments.adapters,
        requests=arguments.requests,
        seed=arguments.seed,
    )
