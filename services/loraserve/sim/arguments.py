"""The flags and the help of scripts/simulate."""

import argparse
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from loraserve.cost.profile import SHIPPED, Profile, read_profile
from loraserve.errors import ConfigError
from loraserve.sim.cluster import SimSettings
from loraserve.sim.compare import OURS
from loraserve.sim.policies import NAMES, policy_named
from loraserve.sim.report import TOPPINGS
from loraserve.sim.runs import Job, Source, TraceSource
from loraserve.sim.workload import LENGTHS, RANK_MIXES, Shape

EXAMPLES = """\
examples:
  scripts/simulate --engines 8 --rps 30                       one run of ours on a drawn workload, with its timeline
  scripts/simulate --trace T.csv.gz --policies ours,toppings --loads 10,20,30
                                                              a sweep: each policy at each load, with --out its timeline
                                                              at the highest
  scripts/simulate --compare --trace T.csv.gz --adapters 100 --engines 8 --cost padded
                                                              the largest load under the SLO of every policy, P95 TTFT
                                                              at the same loads, engines needed, adapters held
  scripts/simulate --grid --engines 4                         24 drawn workloads: ours against the best baseline in each
  scripts/simulate --sensitivity --engines 4                  each efficiency of a derived profile halved and doubled

what is simulated:
  router, planner, demand, scheduler and pool are the live cluster's own code; steps and loads take the time that the
  profile's cost model says. Profiles: a file of scripts/profile, or a shipped one by its name.

policies:
  slora-random, slora-contiguous    adapters dealt out once; a request goes where its adapter is (random: see --draws)
  toppings                          every adapter on every engine for nothing; rank-aware least finish time
  dynamo                            copies in proportion to load, rendezvous hashing, fewest requests
  loraserve                         the paper: operating points, budgets per rank, routing by shares
  ours                              this project's default

traces:
  CSV with time_s,client,prompt_tokens,output_tokens or Azure's TIMESTAMP,ContextTokens,GeneratedTokens, .gz or not.
  Clients become tenants with adapters of ranks 8 to 128; a load of R rps is the same requests sooner after each other.
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="Says what a cluster would do with a workload, under different ways to place and to route.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = top.add_mutually_exclusive_group()
    mode.add_argument("--compare", action="store_true", help="find each policy's largest load, compare at equal loads")
    mode.add_argument("--grid", action="store_true", help="compare on 24 drawn workloads")
    mode.add_argument("--sensitivity", action="store_true", help="compare with each efficiency halved and doubled")
    _workload_flags(top.add_argument_group("what is asked"))
    _cluster_flags(top.add_argument_group("who serves it"))
    out = top.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="nothing but the one line of JSON")
    out.add_argument(
        "--out",
        metavar="DIR",
        default="",
        help="folder for plots (PNG), none without it; of a sweep each policy's timeline at the highest load",
    )
    out.add_argument("--workers", type=int, default=0, help="simulations side by side; 0 is one for each core")
    return top


def _workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", metavar="FILE", default="", help="a trace; without it a workload is drawn")
    group.add_argument("--adapters", type=int, default=100, metavar="N", help="(default: 100)")
    group.add_argument("--seconds", type=float, default=300.0, metavar="S", help="of arrivals in a run (default: 300)")
    group.add_argument("--requests", type=int, default=0, metavar="N", help="in a run, in place of --seconds")
    group.add_argument(
        "--rps", type=float, default=0.0, help="load of a single run, requests/s (default: 0.7 of the guessed capacity)"
    )
    group.add_argument("--loads", default="", metavar="A,B,C", help="loads of a sweep, requests/s")
    group.add_argument("--ranks", default="uniform", help=f"of a drawn workload: {', '.join(RANK_MIXES)}")
    group.add_argument("--arrivals", choices=("poisson", "bursts"), default="poisson")
    group.add_argument("--drift", choices=("none", "ranks", "popularity"), default="none")
    group.add_argument("--lengths", choices=("prefill-heavy", "chat", "decode-heavy"), default="chat")
    group.add_argument("--seed", type=int, default=0)


def _cluster_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--engines", type=int, default=4, metavar="N", help="(default: 4)")
    group.add_argument("--policies", default="", metavar="A,B,C", help="those to simulate (default: all, or ours)")
    group.add_argument(
        "--draws",
        type=int,
        default=3,
        metavar="N",
        help="of slora-random's placement in --compare, with this seed and those after it; its row is that of the "
        "median draw by max rps, of an even number the lower one (default: 3)",
    )
    group.add_argument("--profile", default="llama-3-8b-a100", help="a shipped profile's name or a file")
    group.add_argument(
        "--cost",
        choices=("padded", "exact"),
        default="padded",
        help="what LoRA costs: tokens times the batch's largest rank, as peers' kernels, or true ranks, as ours",
    )
    group.add_argument("--slo-s", type=float, default=10.0, metavar="S", help="P95 TTFT that is promised (default: 10)")
    group.add_argument("--plan-interval-s", type=float, default=SimSettings().plan_interval_s, metavar="S")
    group.add_argument("--report-interval-s", type=float, default=SimSettings().report_interval_s, metavar="S")


# MERGED: loraserve.sim.arguments
# """What the flags of scripts/simulate ask for; wrong ones are named before anything runs."""


LEAST_RPS = 0.01
LEAST_REQUESTS = 10


def job_of(arguments: argparse.Namespace) -> Job:
    """What is asked for, at no load yet. Raises ConfigError naming the flag."""
    return Job(
        source=_source(arguments),
        policy=OURS,
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
    """Raises ConfigError naming those that there are."""
    several = arguments.compare or arguments.grid or arguments.sensitivity or arguments.loads
    names = [n for n in arguments.policies.split(",") if n] or (list(NAMES) if several else [OURS])
    return [policy_named(name).name for name in dict.fromkeys(names)]


def loads_of(arguments: argparse.Namespace) -> list[float]:
    """Raises ConfigError where one is no load."""
    try:
        loads = [float(text) for text in arguments.loads.split(",")] if arguments.loads else []
    except ValueError as error:
        raise ConfigError(f"--loads {arguments.loads}: {error}; write requests/s, such as 10,20,30") from error
    if not all(isfinite(rps) and rps >= LEAST_RPS for rps in loads):
        raise ConfigError(f"--loads {arguments.loads}: requests/s, finite and at least {LEAST_RPS}")
    return loads


def check(arguments: argparse.Namespace, names: list[str]) -> None:
    """Raises ConfigError naming the flag that cannot be, before any time is spent."""
    for flag, least in (("engines", 1), ("adapters", 1), ("draws", 1), ("workers", 0)):
        if getattr(arguments, flag) < least:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: at least {least} is needed")
    for flag in ("slo_s", "plan_interval_s", "report_interval_s", "seconds"):
        value = getattr(arguments, flag)
        if not (isfinite(value) and value > 0):
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: seconds, finite and more than 0")
    if arguments.rps and not (isfinite(arguments.rps) and arguments.rps >= LEAST_RPS):
        raise ConfigError(f"--rps {arguments.rps}: requests/s, finite and at least {LEAST_RPS}")
    if arguments.requests and arguments.requests < LEAST_REQUESTS:
        raise ConfigError(f"--requests {arguments.requests}: at least {LEAST_REQUESTS}, or none for --seconds of them")
    loads_of(arguments)
    needed = {OURS, TOPPINGS} if arguments.grid else {OURS} if arguments.sensitivity else set()
    if needed - set(names):
        raise ConfigError(f"--policies {arguments.policies}: this compares with {', '.join(sorted(needed))}; add them")
    if arguments.out:
        _make_folder(Path(arguments.out))


def _make_folder(folder: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--out draws with matplotlib, which is not installed; install the extra 'sim'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name a folder that can be written to") from error


def _profile(arguments: argparse.Namespace) -> Profile:
    """The profile with the kind of LoRA cost that was asked for. Derived ones are shipped for both."""
    name: str = arguments.profile
    padded = name.removesuffix("-padded") + "-padded"
    if arguments.cost == "padded" and (SHIPPED / f"{padded}.json").exists():
        name = padded
    profile = read_profile(name)
    if profile.cost.lora != arguments.cost:
        raise ConfigError(
            f"profile {name} has {profile.cost.lora} LoRA cost, --cost says {arguments.cost}; "
            f"take another profile, or measure one with scripts/profile --lora {arguments.cost}"
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
    return Shape(
        ranks=arguments.ranks,
        arrivals=arguments.arrivals,
        drift=arguments.drift,
        lengths=arguments.lengths,
        adapters=arguments.adapters,
        requests=arguments.requests,
        seed=arguments.seed,
    )
