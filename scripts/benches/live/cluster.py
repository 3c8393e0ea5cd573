"""Runs one policy on a live cluster: start, wait for the plan, measure an idle request, replay the workload."""

import asyncio
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.our_cluster import OurCluster
from harness.report import BenchError, say

from live.cpu_share import Meter, held_to, machine_s, share_of_core, used_s, waited_s
from live.policies import LivePolicy, pins
from live.replay import Replayed, Served, replay, stream
from live.scene import ENGINE_SETTINGS, ENGINES, Scene, mean_prompt_tokens, prompt_of
from loraserve.sim.outcome import WARMUP_SHARE
from loraserve.sim.workload import Workload

PLAN_INTERVAL_S = 5.0
WINDOW_S = 20.0
REJECT_FACTOR = 1e6
"""Requests are never refused: policies are compared by the waiting time of all requests."""
"""Share of the requests at the beginning that is not counted, as in the simulator."""
PLANNED_TIMEOUT_S = 30.0
ALONE = 6
MOST_ERRORS = 5


class LiveResult(NamedTuple):
    """The outcome of one policy. None means not known.

    Attributes:
        alone_s: TTFT of a mean prompt on an idle cluster.
        whys: Requests by the router's reason.
        plans: Number of published epochs.
        engine_cores: Cores used by engines.
        service_cores: Cores used by the other processes and the load generator.
        other_cores: Cores used by anything else on the machine.
        waiting: Engine threads that wait for a core, which the simulator does not model.
    """

    replayed: Replayed
    alone_s: float
    whys: dict[str, int]
    plans: int
    engine_cores: float | None
    service_cores: float | None
    other_cores: float | None
    waiting: float | None


def run_live(
    folder: Path, scene: Scene, workload: Workload, policy: LivePolicy, slo_s: float, profile: Path | None
) -> LiveResult:
    """Run a policy. Raises LoraServeError if the cluster does not start, BenchError if a measurement fails."""
    settings = [*ENGINE_SETTINGS, *cluster_settings(slo_s, profile), *policy.settings(workload, ENGINES)]
    say(f"{policy.name}: starting {ENGINES} engines")
    with OurCluster(folder, scene.model, scene.adapters, ENGINES, settings) as cluster:
        return asyncio.run(_measure(cluster, scene, workload, policy))


def cluster_settings(slo_s: float, profile: Path | None) -> list[str]:
    """Return the settings that all policies share."""
    return [
        f"planner.interval_s={PLAN_INTERVAL_S}",
        f"monitor.window_s={WINDOW_S}",
        f"router.slo_ttft_s={slo_s}",
        f"router.reject_factor={REJECT_FACTOR}",
        *([f"cluster.profile={profile}"] if profile else []),
    ]


async def _measure(cluster: OurCluster, scene: Scene, workload: Workload, policy: LivePolicy) -> LiveResult:
    pids = cluster.pids()
    engines = [pid for name, pid in pids.items() if name.startswith("engine-")]
    services = [os.getpid(), *(pid for pid in pids.values() if pid not in engines)]
    pinned = pins(policy.place, workload, ENGINES) if policy.place else {}
    await _until_planned(cluster, set(scene.adapters), pinned)
    with held_to(share_of_core(ENGINES), engines) as limiter:
        alone_s = await _alone_s(cluster, scene)
        say(f"{policy.name}: {len(workload.requests)} requests in {workload.duration_s:.0f} s, {workload.rps:.1f} rps")
        readings = (lambda: used_s(engines), lambda: used_s([*services, limiter]), machine_s, lambda: waited_s(engines))
        meters = [Meter(read_s) for read_s in readings]
        replayed = await replay(
            cluster.url, workload, scene.shape.vocab, WARMUP_SHARE, _progress(policy.name, workload)
        )
        by_engines, by_services, by_all, waiting = (meter.rate() for meter in meters)
    for error in sorted({served.error for served in replayed.served if served.error})[:MOST_ERRORS]:
        say(f"{policy.name}: a request failed: {error}")
    whys, plans = read_logs(cluster.data_dir / "logs")
    known = by_all is not None and by_engines is not None and by_services is not None
    others = max(0.0, by_all - by_engines - by_services) if known else None
    return LiveResult(replayed, alone_s, whys, plans, by_engines, by_services, others, waiting)


async def _until_planned(cluster: OurCluster, adapters: set[str], pinned: Mapping[str, list[str]]) -> None:
    """Wait until the plan has a copy of every adapter, as in the simulator, where it precedes the first request.

    Raises:
        BenchError: Copies are missing, or not where they are pinned, after ``PLANNED_TIMEOUT_S``.
    """
    deadline_s = time.monotonic() + PLANNED_TIMEOUT_S
    async with cluster.session() as http:
        while True:
            async with http.get("/admin/plan") as response:
                plan = await response.json()
            wrong = misplaced(plan.get("placements", ()), adapters, pinned)
            if not wrong:
                return
            if time.monotonic() > deadline_s:
                raise BenchError(f"copies are not placed as expected after {PLANNED_TIMEOUT_S:.0f} s: {wrong}")
            await asyncio.sleep(0.2)


def misplaced(
    placements: Sequence[Mapping[str, Any]], adapters: set[str], pinned: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Return the adapters without a copy or with misplaced copies, and the engines of their copies."""
    engines: dict[str, list[str]] = {name: [] for name in sorted(adapters)}
    for placement in placements:
        engines[placement["name"]].append(placement["engine"])
    return {name: found for name, found in engines.items() if not found or found != pinned.get(name, found)}


async def _alone_s(cluster: OurCluster, scene: Scene) -> float:
    """Return the median TTFT of the base model, one request at a time. Raises BenchError if one fails."""
    prompt_tokens = mean_prompt_tokens(scene.workload)
    found = []
    async with cluster.session() as http:
        for number in range(ALONE):
            served = Served(due_s=time.perf_counter())
            prompt = prompt_of(1_000_000 + number, prompt_tokens, scene.shape.vocab)
            body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
            await stream(http, cluster.url, {**body, **cluster.body("")}, served, time.perf_counter)
            if served.error:
                raise BenchError(f"a request on the idle cluster failed: {served.error}")
            found.append(served.ttft_s)
    return statistics.median(found)


def read_logs(folder: Path) -> tuple[dict[str, int], int]:
    """Return requests by the router's reason, and the number of published plans."""
    whys: dict[str, int] = {}
    for event in _events(folder / "router.log", "routed"):
        whys[event["why"]] = whys.get(event["why"], 0) + 1
    return dict(sorted(whys.items())), sum(1 for _ in _events(folder / "planner.log", "plan_published"))


def _events(log: Path, name: str) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines():
        if f'"{name}"' in line:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == name:
                    yield event


def _progress(name: str, workload: Workload) -> Callable[[int], None]:
    step = max(1, len(workload.requests) // 4)

    def ended(count: int) -> None:
        if count % step == 0:
            say(f"{name}: {count} of {len(workload.requests)} requests have ended")

    return ended
