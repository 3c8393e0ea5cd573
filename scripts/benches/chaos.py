"""Kills, stops and corrupts engines that read adapters from each other, and checks every text that they return.

A gateway and three engines on this machine serve greedy streams for twelve adapters. Each pool holds about half of
them. An engine reads the others from other engines: two engines over shm and tcp, one engine over tcp only. Every
second or two, a reading engine or the engine that it reads from is killed (kill -9), or stopped (SIGSTOP) for longer
than a lease lasts, or a copy in an engine's memory is corrupted from outside. Every text is compared with the output of
an undisturbed engine. An engine with a corrupted copy in its own pool gets no request for that adapter until it is
restarted. For this, the bench takes the router's place.

The gateway migrates the requests of a killed engine. The bench, as their client, sends every request once. "migrations"
counts the attempts after the first. "stuck requests" did not end within three minutes.

At the end the bench looks for memory and sockets left by killed engines. The exit status is 1 if a text was wrong, a
request was stuck or failed, an engine ended by itself or anything leaked.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import aiohttp
from chaotic.cluster import ENGINES, Victims
from chaotic.counts import Counts
from chaotic.routing import routing
from chaotic.traffic import Traffic
from chaotic.trouble import Trouble, progress
from chaotic.truth import Case, compute_truth, write_adapters
from harness.driver import driving
from harness.engines import SERVICES, Engines, config_for, short_folder
from harness.peer_memory import named_segments, poisoning
from harness.report import last_line, say

from loraserve.config import GatewayConfig, TransferConfig
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.testing.local_cluster import free_port

GATEWAY, DRIVER = "gateway-0", "gateway-1"
"""The driver is on the bus as another gateway, and sends no requests."""
MINUTES, QUICK_MINUTES = 10.0, 0.5
ASKERS = 4
LEASE_S = 0.2
REPORT_EVERY_S = 10.0
POOL_BYTES = 64 << 20
CACHE_BYTES = 48 << 20
SETTINGS = {"engine-2": ['transfer.transports=["tcp"]']}
"""Two engines use the best transport, one only tcp."""


def run(folder: Path, minutes: float, seed: int) -> Counts:
    """Run the bench. Raises BenchError if the engines do not start."""
    counts, rng = Counts(), Random(seed)
    model = prepare_model(default_data_dir(), say)
    shape = shape_from_config(read_model_config(model))
    say("computing the expected output of each adapter")
    folders = write_adapters(folder / "adapters", shape)
    before = named_segments()
    with short_folder() as run_dir:
        transfer = TransferConfig(transports=("shm", "tcp"), lease_s=LEASE_S)
        overrides = {
            "engine": {"pool_bytes": POOL_BYTES, "host_cache_bytes": CACHE_BYTES},
            "gateway": GatewayConfig(port=free_port()),
            "transfer": transfer,
        }
        config = config_for(folder, run_dir, model, len(ENGINES), overrides)
        cases = compute_truth(config, shape, folders)
        say(f"{len(cases)} prompts; starting {len(ENGINES)} engines")
        with Engines(folder, config, SETTINGS) as engines:
            victims = asyncio.run(_run(engines, folders, cases, rng, counts, minutes * 60.0))
        victims.count_left_behind()
        left = [path.name for path in run_dir.iterdir() if path.suffix != ".lock"]
        counts.leaked_sockets += len(left)
        _read_logs(engines, counts)
    counts.leaked_shm_files += len(named_segments() - before)
    return counts


async def _run(
    engines: Engines, folders: dict[str, Path], cases: list[Case], rng: Random, counts: Counts, seconds: float
) -> Victims:
    async with driving(engines.config, DRIVER) as driver, poisoning(engines.config) as poisoner:
        engines.start(*SERVICES, GATEWAY)
        await driver.ready(*SERVICES, GATEWAY)
        adapters = {name: await driver.register(name, path) for name, path in folders.items()}
        victims = Victims(engines, driver, adapters, counts)
        await asyncio.gather(*(victims.start(name) for name in ENGINES))
        await victims.spread()
        say(f"disturbing the engines for {seconds:.0f} s")
        gateway = engines.config.gateway
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            routing(engines.config, victims, rng) as router,
            aiohttp.ClientSession(f"http://{gateway.host}:{gateway.port}", connector=connector) as http,
        ):
            traffic = Traffic(http, router, cases, rng, counts)
            await _disturb(traffic, Trouble(victims, traffic, poisoner, rng, counts), counts, seconds)
            counts.migrations = router.migrations
        victims.note_crashes()
        await victims.count_mapped_of_dead()
        return victims


async def _disturb(traffic: Traffic, trouble: Trouble, counts: Counts, seconds: float) -> None:
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(ASKERS):
            tasks.create_task(traffic.keep_asking(over))
        tasks.create_task(trouble.make(over))
        await _wait(counts, seconds)
        over.set()


async def _wait(counts: Counts, seconds: float) -> None:
    began_s = time.monotonic()
    while (left_s := began_s + seconds - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, REPORT_EVERY_S))
        progress(counts, time.monotonic() - began_s)


def _read_logs(engines: Engines, counts: Counts) -> None:
    for name in ENGINES:
        ended = [each for each in engines.events(name, "lease_ended") if each["reader"] in ENGINES]
        counts.leases_expired += sum(each["reason"] == "expired" for each in ended)
        counts.mismatches_seen += sum(each["code"] == "corrupt" for each in engines.events(name, "source_failed"))
        loaded = [each["transport"] for each in engines.events(name, "adapter_loaded") if each["source"] in ENGINES]
        counts.read_over_shm += loaded.count("shm")
        counts.read_over_tcp += loaded.count("tcp")
        counts.engine_leaks += sum(1 for _ in engines.events(name, "leak"))


def main(arguments: Sequence[str]) -> int:
    """Return 1 if there was any fault."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="duration (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"run {QUICK_MINUTES} minutes")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random choices; their timing is not reproducible (%(default)s)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and adapters in this folder")
    options = parser.parse_args(arguments)
    minutes = QUICK_MINUTES if options.quick else options.minutes
    with tempfile.TemporaryDirectory(prefix="ls-chaos-") as made:
        counts = run(options.keep or Path(made), minutes, options.seed)
    print(counts.text())
    faults = counts.faults()
    print(last_line("chaos", faults, counts.figures()))
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
