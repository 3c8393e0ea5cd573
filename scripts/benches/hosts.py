"""Cuts and spoils the network between the hosts of a cluster, and checks every text that clients receive.

The hosts are network namespaces of this machine: the gateway and the router on one, the monitor and the planner on
another, the store on a third and one engine on each of two others. All messages cross a switch that loses and delays
packets. Four clients send streams of known greedy text. Each cell disturbs the network or a host for a while.

Table: "failed" are streams that ended with an error or not at all, "corrupted" those with wrong text, "refused" those
answered with 503 and Retry-After. "longest gap" is the longest time in which a stream got no text. "recovery" is the
time from the end of the fault until the gateway reached every process again. The exit status is 1 if any stream was
corrupted, or failed or was refused while an engine was reachable. It needs root; it changes nothing of the machine's
own network.

    scripts/bench hosts                            all cells, about eight minutes
    scripts/bench hosts --cell "5% loss"           the cells whose names contain this text
    scripts/bench hosts --quick                    three cells
    scripts/bench hosts --list                     the cells
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.report import last_line, say

from loraserve.benchmarks.hosts.cells import CELLS, CellResult, run_cells
from loraserve.benchmarks.hosts.network import unusable_reason
from loraserve.benchmarks.hosts.report import as_figures, as_table

QUICK = ("undisturbed", "engine host cut off, 3 s", "engine host with 5% loss")


def main(arguments: Sequence[str]) -> int:
    """Return 1 if any cell has a fault, 2 if the machine cannot run virtual hosts or no cell has the given name."""
    options = _parse(arguments)
    names = [name for name in CELLS if any(part in name for part in options.cell or [""])]
    if options.quick:
        names = list(QUICK)
    if options.list:
        print("\n".join(names))
        return 0
    reason = unusable_reason()
    if not names or reason:
        print(f"error: {reason or 'no cell has this name; see --list'}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ls-hosts-") as made:
        folder = options.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        results = asyncio.run(_run(folder, names, options.seed))
    print(as_table(results))
    if options.json:
        options.json.write_text(json.dumps({result.cell: as_figures(result) for result in results}, indent=2) + "\n")
    print(last_line("hosts", {}, _totals(results)))
    return 1 if any(result.faults() for result in results) else 0


async def _run(folder: Path, names: Sequence[str], seed: int) -> list[CellResult]:
    say(f"starting a cluster on five virtual hosts for {len(names)} cells")
    results = []
    async for result in run_cells(folder, names, seed):
        figures = ", ".join(f"{value} {name}" for name, value in as_figures(result).items())
        say(f"{result.cell}: {figures}")
        results.append(result)
    return results


def _totals(results: Sequence[CellResult]) -> dict[str, float | int | None]:
    counts = [result.counts for result in results]
    return {
        "cells": len(results),
        "sent": sum(each.sent for each in counts),
        "failed": sum(each.failed for each in counts),
        "corrupted": sum(each.corrupted for each in counts),
        "refused": sum(each.refused for each in counts),
        "longest_gap_s": max(each.longest_gap_s for each in counts),
        "cells_with_faults": sum(1 for result in results if result.faults()),
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run three cells")
    parser.add_argument("--cell", action="append", metavar="TEXT", help="run the cells whose names contain this text")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lost packets (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON to this file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and adapters in this folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
