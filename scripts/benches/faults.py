"""Disturbs every process of a cluster under load in every way, and checks that clients notice at most a delay.

One cluster of two gateways and two engines serves eight greedy streams and two whole answers at all times. Their texts
are known: each question was first asked on the undisturbed cluster. Each row of the table is one fault of one process:
it is killed, asked to stop, or suspended; its disk is slow, stuck or full; its wall clock steps; its messages are lost,
doubled or overtaken; or it is cut off from another. The processes run with a library that is preloaded and a bus that
injects faults (loraserve.testing.faults); the machine's clock and disk are not touched.

"failed" must be 0 in every row in which an engine is undisturbed, "corrupted" in every row. "refused" are answers 503
with Retry-After, which are allowed while no engine lives. "cut" are connections to a gateway that was killed.

The exit status is 1 if a text was wrong, a request failed that must not, or an acknowledged registration was lost.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from faulty.cells import DISK_FAULTS, Cell, all_cells, quick_cells
from faulty.cluster import FaultyCluster
from faulty.operator import Operator
from faulty.results import Row, figures, markdown, row, violations
from faulty.traffic import QUESTIONS, STREAMS, WHOLE, Traffic, find_truth
from harness.report import BenchError, commit, last_line, machine, ratio, say

from loraserve.config import ClusterConfig, Config
from loraserve.demo import demo_adapters
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.supervisor.processes import process_names

BEFORE_S = 1.5
"""Time for the streams to run before the fault begins."""
AFTER_S = 2.0
"""Time for which requests are sent after the fault, at the least."""
SERVED_TIMEOUT_S = 120.0
DRAIN_S = 30.0
"""Time for the streams of a gateway to end after SIGTERM. On a busy machine they take longer than the default."""
FEW_CELLS = 6
"""Up to this number of rows, each model has only one question, so that the run is short."""
EXPLANATION = """\
- `failed`: requests that ended with an error. `cut`: connections to a gateway that was killed. `refused`: answers 503
  with Retry-After while no engine is undisturbed.
- `longest wait`: the longest time without a token of any stream, also before its first.
- `median gap`: the median, over the streams that ran when the fault began, of the longest time between two tokens.
  `of moved streams`: only those on a disturbed engine.
- `recovered`: from the end of the fault (of a kill: its moment) until all processes are ready and all streams go on."""
SETTINGS = ("cluster.engines=2", "cluster.gateways=2", "engine.threads=1", f"gateway.drain_timeout_s={DRAIN_S}")


def run(folder: Path, cells: Sequence[Cell] | None, only: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Run the cells, or the whole table. Returns the rows and the names of the engines."""
    model = prepare_model(default_data_dir(), say)
    adapters = {adapter.name: adapter.path for adapter in demo_adapters(default_data_dir(), say)}
    names = process_names(Config(cluster=ClusterConfig(engines=2, gateways=2)))
    engines = [name for name in names if name.startswith("engine-")]
    texts = only or [""]
    wanted = [
        cell for cell in cells or all_cells(names) if any(text in f"{cell.title} {cell.target}" for text in texts)
    ]
    say(f"starting {', '.join(names)}")
    with FaultyCluster(folder, model, adapters, names, SETTINGS) as cluster:
        return asyncio.run(_run(cluster, wanted, engines, model, list(adapters))), engines


async def _run(
    cluster: FaultyCluster, cells: Sequence[Cell], engines: list[str], model: Path, adapters: Sequence[str]
) -> list[Row]:
    rows = []
    folder, shape = cluster.data_dir.parent / "adapters", shape_from_config(read_model_config(model))
    questions = len(QUESTIONS) if len(cells) > FEW_CELLS else 1
    async with cluster.session() as http:
        await cluster.wait_ready(http)
        say("asking the questions on the undisturbed cluster")
        traffic = Traffic(http, await find_truth(http, [model.name, *adapters], questions))
        for number, cell in enumerate(cells, start=1):
            operator = Operator(http, folder, shape) if cell.fault in DISK_FAULTS else None
            rows.append(await run_cell(cluster, cell, traffic, operator, engines))
            _report(rows[-1], f"{number} of {len(cells)}")
            await cluster.wait_ready(http)
    return rows


async def run_cell(
    cluster: FaultyCluster, cell: Cell, traffic: Traffic, operator: Operator | None, engines: Sequence[str]
) -> Row:
    """Disturb the cluster under load, and wait until it has recovered and all requests have ended."""
    if operator is not None:
        await operator.prepare()
    traffic.begin()
    await asyncio.sleep(BEFORE_S)
    began_s = time.monotonic()
    working = operator.work(cell.seconds) if operator is not None else asyncio.sleep(0)
    await asyncio.gather(cluster.disturb(cell), working)
    ended_s = time.monotonic()
    recovered_s, notes = await _recover(cluster, traffic, ended_s)
    await asyncio.sleep(max(0.0, ended_s + AFTER_S - time.monotonic()))
    await traffic.end()
    if operator is not None:
        await operator.check_and_clean()
        notes += [operator.summary(), *(f"LOST: {each}" for each in operator.lost)]
    return row(cell, traffic.requests, engines, (began_s, ended_s, recovered_s), notes)


async def _recover(cluster: FaultyCluster, traffic: Traffic, ended_s: float) -> tuple[float, list[str]]:
    """Return when everything worked again, and a note if it did not."""
    try:
        async with cluster.session() as http:
            await cluster.wait_ready(http)
        async with asyncio.timeout(SERVED_TIMEOUT_S):
            while not traffic.is_served_since(ended_s):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except (BenchError, TimeoutError) as error:
        return time.monotonic(), [f"NOT RECOVERED: {error or 'requests are not served'}"]
    return time.monotonic(), []


def _report(each: Row, progress: str) -> None:
    say(
        f"{progress}: {each.cell.title}, {each.cell.target}: {each.sent} sent, {each.failed} failed, "
        f"{each.corrupted} corrupted, longest wait {each.longest_wait_s:.1f} s, recovered in {each.recovered_s:.1f} s"
    )
    for note in each.notes:
        say(f"    {note}")


def page(rows: Sequence[Row], command: str, minutes: float) -> str:
    """Return the table as a page in markdown, with its command."""
    rows_text = f"{minutes:.0f} minutes for {len(rows)} rows"
    lines = [
        "# Faults under load",
        "",
        f"`{command}`, {date.today()}, {machine()}, commit {commit()}, {rows_text}.",
        f"Two gateways and two engines serve {STREAMS} greedy streams and {WHOLE} whole answers at all times.",
        "",
        EXPLANATION,
        "",
        markdown(rows),
        "",
        "While a disk was faulty, an operator loaded and unloaded adapters and asked for plans:",
        "",
        *(f"- {each.cell.title}, {each.cell.target}: {note}" for each in rows for note in each.notes),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Return 1 if there was any violation."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run a handful of rows, in less than a minute")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="run rows whose fault or process has this text"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to this page in markdown")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs in this folder")
    options = parser.parse_args(arguments)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ls-") as made:
        rows, engines = run(options.keep or Path(made), quick_cells() if options.quick else None, options.only)
    print(markdown(rows))
    for each in rows:
        for note in each.notes:
            print(f"{each.cell.title}, {each.cell.target}: {note}")
    if options.write:
        command = " ".join(["scripts/bench faults", *(["--quick"] if options.quick else [])])
        options.write.write_text(page(rows, command, (time.monotonic() - started_s) / 60))
    found = figures(rows, engines)
    print(last_line("faults", {"killed_gap": ratio(found["killed_gap_s"], found["undisturbed_gap_s"])}, found))
    return 1 if violations(rows, engines) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
