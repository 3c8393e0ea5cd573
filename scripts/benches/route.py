"""Measures the time for the router to choose among 8, 64 and 1,000 engines, and to apply a load report of all engines.

Each choice has the steps of the service: expire pending requests, choose an engine, record the request as load there.
Engines hold 25 adapters each and have waiting, running and pending requests. The plan has two copies of each adapter.
Prompts have 600 tokens; half of the prompts share a prefix. There are as many choices between two reports as engines,
up to 250. route_N_us is the median of the choice for requests with an adapter, including the prices that earlier
requests have changed; route_and_sent_N_us is the median of all three steps.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from statistics import median
from typing import Literal

from harness.report import last_line, say, table

from loraserve.cost import CostModel
from loraserve.messages import (
    AdapterRef,
    ClusterLoad,
    EngineSeen,
    Placement,
    Plan,
    Route,
    SamplingParams,
)
from loraserve.router.context import Candidates, PlannedCopies, RoutingContext, Slo
from loraserve.router.policy import POLICIES
from loraserve.router.view import ClusterView
from loraserve.testing.reports import engine_seen, resident

ENGINES = (8, 64, 1000)
RANKS = (8, 16, 32, 64, 128)
RESIDENT = 25
COPIES = 2
PROMPT_TOKENS = 600
COMMON_TOKENS = 300
RUNNING = 12
BYTES_PER_RANK = 5 << 20
SLO = Slo(ttft_s=10.0, reject_factor=4.0)
KINDS = ("adapter", "base")
MAIN = ("predicted", "exact")
GOALS = {8: "< 40", 64: "< 50", 1000: "< 500"}


class Cluster:
    """A cluster of busy engines that hold the planned adapters."""

    def __init__(self, engines: int, lora: Literal["exact", "padded"]) -> None:
        self.rng = Random(engines)
        self.names = [f"engine-{number}" for number in range(engines)]
        self.adapters = [_adapter(number) for number in range(engines * RESIDENT // COPIES)]
        # Two copies of each adapter, on engines far apart.
        self.held: dict[str, list[AdapterRef]] = {name: [] for name in self.names}
        placements = []
        for number, adapter in enumerate(self.adapters):
            for engine in {(number + copy * (engines // 2 + 1)) % engines for copy in range(COPIES)}:
                self.held[self.names[engine]].append(adapter)
                placements.append(
                    Placement(version=adapter.version, name=adapter.name, engine=self.names[engine], share=1 / COPIES)
                )
        self.plan = PlannedCopies(Plan(epoch=1, created_unix_s=0.0, placements=tuple(placements)))
        self.cost = CostModel(lora=lora)
        self.view = ClusterView()
        self.now = 100.0
        self.sent = 0
        self.pictures = 0
        self.common = tuple(self.rng.randrange(32_000) for _ in range(COMMON_TOKENS))

    def picture(self) -> ClusterLoad:
        self.pictures += 1
        seen = tuple(self._seen(name) for name in self.names)
        return ClusterLoad(incarnation="bench", sequence=self.pictures, engines=seen)

    def request(self, kind: str) -> Route:
        self.sent += 1
        begins = self.common if self.sent % 2 else ()
        own = tuple(self.rng.randrange(32_000) for _ in range(PROMPT_TOKENS - len(begins)))
        return Route(
            request_id=f"r{self.sent}",
            gateway="gateway-0",
            prompt_tokens=(*begins, *own),
            sampling=SamplingParams(max_tokens=256),
            adapter=self.rng.choice(self.adapters) if kind == "adapter" else None,
        )

    def _seen(self, name: str) -> EngineSeen:
        held, running = self.held[name], self.rng.randrange(RUNNING)
        runs = {adapter.version for adapter in self.rng.sample(held, min(running, len(held)))}
        return engine_seen(
            name,
            waiting=self.rng.randrange(4),
            running=running,
            waiting_prefill_tokens=self.rng.randrange(2000),
            kv_blocks=10_000,
            kv_blocks_free=self.rng.randrange(2000, 10_000),
            pool_bytes=32 << 30,
            pool_free_bytes=4 << 30,
            pool_room_bytes=4 << 30,
            max_model_tokens=8192,
            decode_step_s=0.03,
            prefill_tokens_per_s=5000.0,
            load_bytes=0.0,
            load_bytes_per_s=1e10,
            request_ids=tuple(f"{name}-{self.pictures + number}" for number in range(running)),
            resident=tuple(resident(a, pinned=True, running=int(a.version in runs)) for a in held),
        )


def _adapter(number: int) -> AdapterRef:
    rank = RANKS[number % len(RANKS)]
    return AdapterRef(name=f"adapter-{number}", version=f"{number:064x}", rank=rank, slab_bytes=rank * BYTES_PER_RANK)


class Measured:
    """Seconds of each choice by kind, of each choice with its other steps, and of each load report."""

    def __init__(self) -> None:
        self.choosing: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.whole: list[float] = []
        self.pictures: list[float] = []

    def row(self, goal: str) -> list[object]:
        chosen_s = self.choosing["adapter"]
        p99_s, base_s = sorted(chosen_s)[len(chosen_s) * 99 // 100], median(self.choosing["base"])
        times_us = [p99_s * 1e6, base_s * 1e6, median(self.whole) * 1e6]
        return [median(chosen_s) * 1e6, goal, *times_us, median(self.pictures) * 1e3]

    def figures(self, name: str) -> dict[str, float | int | None]:
        return {
            f"route_{name}_us": median(self.choosing["adapter"]) * 1e6,
            f"route_and_sent_{name}_us": median(self.whole) * 1e6,
            f"picture_{name}_ms": median(self.pictures) * 1e3,
        }


def measure(engines: int, policy: str, lora: Literal["exact", "padded"], pictures: int, choices: int) -> Measured:
    cluster, measured, choose = Cluster(engines, lora), Measured(), POLICIES[policy]
    for _ in range(pictures):
        cluster.now += 0.25
        picture = cluster.picture()
        measured.pictures.append(_seconds(lambda picture=picture: cluster.view.update(picture, cluster.now)))  # type: ignore[misc]
        # The first choice after a report computes all prices, so this is counted with the report.
        measured.pictures[-1] += _seconds(lambda: cluster.view.prices(cluster.cost))
        for request in [cluster.request(KINDS[number % 8 == 7]) for number in range(choices)]:
            cluster.now += 0.2 / choices
            _choose_once(cluster, choose, request, measured)
    return measured


def _choose_once(cluster: Cluster, choose: Callable[..., object], request: Route, measured: Measured) -> None:
    view = cluster.view
    began_s = time.perf_counter()
    view.expire_pending(cluster.now)
    choosing_s = time.perf_counter()
    choice = choose(RoutingContext(request, view, cluster.plan, cluster.cost, SLO, cluster.rng))
    chosen_s = time.perf_counter()
    assert isinstance(choice, Candidates), choice
    view.record_sent(choice.first.engine, request, cluster.now)
    measured.whole.append(time.perf_counter() - began_s)
    measured.choosing[KINDS[request.adapter is None]].append(chosen_s - choosing_s)


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def main(arguments: Sequence[str]) -> int:
    """Run the bench. Returns 0."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench route", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer choices")
    options = parser.parse_args(arguments)
    pictures = 4 if options.quick else 20
    figures: dict[str, float | int | None] = {}
    rows: list[list[object]] = []
    for engines in ENGINES:
        for policy, lora in (("predicted", "exact"), ("predicted", "padded"), ("shares", "exact")):
            say(f"{engines} engines, {policy}, {lora} cost")
            choices = max(64, min(engines, 250))
            measured = measure(engines, policy, lora, pictures, choices)  # type: ignore[arg-type]
            rows.append([f"{engines}, {policy}, {lora}", *measured.row(GOALS[engines])])
            figures |= measured.figures(f"{engines}" if (policy, lora) == MAIN else f"{engines}_{policy}_{lora}")
    header = ["engines, policy, cost", "route() us", "goal", "p99 us", "base us", "with sent() us", "picture ms"]
    print(table("One choice; one without an adapter; with its other steps; one load report", header, rows))
    print(last_line("route", {}, figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
