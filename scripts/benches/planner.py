"""Measures time and memory of planning, for 8 engines x 200 adapters and 1,000 x 100,000, on one core.

Demand follows a power law, ranks are 8 to 128, and LoRA costs are padded (the hardest case for placement) or exact. A
plan is made from scratch, from itself, after a drift of demand (up to 30% each) and after the loss of one engine in a
hundred. The figures are the slowest of these cases; each case is the median of its runs in processor time, which other
load on the machine does not affect. Memory is the peak allocated by Python and numpy (tracemalloc, in a separate run)
without the inputs.
"""

import argparse
import sys
import time
import tracemalloc
from collections.abc import Sequence
from random import Random
from statistics import median
from typing import Literal

import msgspec
from harness.report import last_line, say, table

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineCapabilities, Placement
from loraserve.planner.placement import PLACEMENT_POLICIES
from loraserve.planner.placement.problem import PlanInput, PlanSettings

SMALL, LARGE = (8, 200), (1000, 100_000)
RANKS = (8, 16, 32, 64, 128)
BYTES_PER_RANK = 5 << 20
POOL_BYTES = 160 << 30
REQUESTS_PER_ENGINE = 3.5
PROMPT_TOKENS, OUTPUT_TOKENS = 900, 250
DRIFT = 0.3
GOALS = {SMALL: "< 20 ms", LARGE: "< 2 s"}
SETTINGS = PlanSettings()


class Cluster(msgspec.Struct):
    """The inputs of a plan."""

    demand: list[AdapterDemand]
    adapters: dict[str, AdapterRef]
    engines: list[EngineCapabilities]
    cost: CostModel

    def plan(self, current: Sequence[Placement]) -> tuple[Placement, ...]:
        inputs = PlanInput(
            demand=self.demand,
            adapters=self.adapters,
            engines=self.engines,
            current=current,
            cost=self.cost,
            settings=SETTINGS,
        )
        return PLACEMENT_POLICIES["ours"](inputs)


def main(arguments: Sequence[str]) -> int:
    """Run the bench. Returns 0."""
    parser = argparse.ArgumentParser("scripts/bench planner", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--runs", type=int, help="runs of each case at the large size; default 3, with --quick 1")
    options = parser.parse_args(arguments)
    runs = options.runs or (1 if options.quick else 3)
    rows, slowest = [], {SMALL: 0.0, LARGE: 0.0}
    for size, repeat in ((SMALL, runs * 7), (LARGE, runs)):
        for lora in ("padded", "exact"):
            say(f"{size[0]} engines x {size[1]} adapters, {lora}")
            for name, seconds in _measured(_cluster(*size, lora), repeat):
                slowest[size] = max(slowest[size], seconds)
                rows.append([f"{size[0]} x {size[1]} {lora}, {name}", seconds * 1e3, GOALS[size]])
    say("memory")
    peak_mib = _peak_bytes(_cluster(*LARGE, "padded")) / (1 << 20)
    print(table("milliseconds, median", ["plan", "ms", "goal"], rows))
    print(f"\npeak memory at {LARGE[0]} x {LARGE[1]}: {peak_mib:.0f} MiB")
    figures = {
        "plan_1000x100000_s": slowest[LARGE],
        "plan_8x200_ms": slowest[SMALL] * 1e3,
        "peak_mib": peak_mib,
    }
    print(last_line("planner", {}, figures))
    return 0


def _cluster(engines: int, adapters: int, lora: Literal["padded", "exact"]) -> Cluster:
    """Return a cluster whose costs resemble an 8-billion model on a data-centre GPU."""
    rng = Random(adapters)
    refs = [_adapter(number, rng.choice(RANKS)) for number in range(adapters)]
    weights = [1 / (number + 1) ** 0.9 for number in range(adapters)]
    scale = engines * REQUESTS_PER_ENGINE / sum(weights)
    return Cluster(
        demand=[_demand(ref, weight * scale) for ref, weight in zip(refs, weights, strict=True)],
        adapters={ref.version: ref for ref in refs},
        engines=[_engine(f"engine-{number}") for number in range(engines)],
        cost=CostModel(
            step_base_s=0.01,
            sequence_s=1e-4,
            kv_token_s=6.5e-8,
            prefill_token_s=8e-5,
            lora=lora,
            slab_byte_s=6e-13,
            rank_token_s=1e-7,
            padded_prefill_s=4e-7,
            padded_decode_s=6e-7,
            load_byte_s=1e-10,
        ),
    )


def _adapter(number: int, rank: int) -> AdapterRef:
    return AdapterRef(name=f"adapter-{number}", version=f"v{number}", rank=rank, slab_bytes=rank * BYTES_PER_RANK)


def _demand(ref: AdapterRef, requests_per_s: float) -> AdapterDemand:
    tokens_per_s = requests_per_s * (PROMPT_TOKENS + OUTPUT_TOKENS)
    return AdapterDemand(
        version=ref.version,
        name=ref.name,
        rank=ref.rank,
        prefill_tokens_per_s=requests_per_s * PROMPT_TOKENS,
        decode_tokens_per_s=requests_per_s * OUTPUT_TOKENS,
        requests_per_s=requests_per_s,
        forecast_tokens_per_s=tokens_per_s,
        forecast_std_tokens_per_s=tokens_per_s / 10,
    )


def _engine(name: str) -> EngineCapabilities:
    return EngineCapabilities(
        engine=name,
        incarnation="i",
        kv_blocks=20_000,
        block_tokens=16,
        pool_bytes=POOL_BYTES,
        max_running=256,
        max_model_tokens=0,
        max_step_tokens=512,
    )


def _measured(cluster: Cluster, runs: int) -> list[tuple[str, float]]:
    """Return the median seconds of a plan from scratch, from itself, after a drift and after a loss."""
    plan = cluster.plan(())
    rng = Random(1)
    demand = [
        _demand(cluster.adapters[d.version], d.requests_per_s * (1 + rng.uniform(-DRIFT, DRIFT)))
        for d in cluster.demand
    ]
    drifted = msgspec.structs.replace(cluster, demand=demand)
    lost = msgspec.structs.replace(cluster, engines=cluster.engines[max(1, len(cluster.engines) // 100) :])
    return [
        ("from scratch", _seconds(cluster, (), runs)),
        ("from itself", _seconds(cluster, plan, runs)),
        ("after a drift", _seconds(drifted, plan, runs)),
        ("engines lost", _seconds(lost, plan, runs)),
    ]


def _seconds(cluster: Cluster, current: Sequence[Placement], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        cluster.plan(current)
        times.append(time.process_time() - start)
    return median(times)


def _peak_bytes(cluster: Cluster) -> int:
    tracemalloc.start()
    cluster.plan(())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
