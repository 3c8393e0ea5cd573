"""The flags and the help of scripts/simulate."""

import argparse

from loraserve.sim.cluster import SimSettings
from loraserve.sim.synthetic import RANK_MIXES

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
