"""Where copies of adapters should live, from forecast demand. Pure and deterministic.

First sound version: every adapter with demand gets a copy, hot ones several, each copy on the engine with the least
planned cost that has the memory; a copy stays where it is unless moving it evens out the load by more than the
hysteresis. Cost is the share of an engine's time that the forecast traffic of an adapter takes at its rank.
"""

from collections.abc import Mapping, Sequence

import msgspec

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement
from loraserve.planner.settings import PlanSettings

POOL_FRACTION = 0.75
"""Of a pool that the plan may pin; the rest is for adapters that come on demand."""
HYSTERESIS = 0.2
"""A copy moves only if its engine carries this much more than the fair share."""
SPLIT_SHARE = 0.05
"""Of an engine's time: an adapter that takes less needs no second copy, however little the others take."""
IDLE_WEIGHT = 1e-9
"""Of an adapter that is kept although nobody asks for it: enough to be ordered, too little to weigh."""


class _Engine(msgspec.Struct):
    name: str
    room_bytes: int
    cost: float = 0.0


def plan(
    demand: Sequence[AdapterDemand],
    adapters: Mapping[str, AdapterRef],
    engines: Sequence[EngineLoad],
    current: Sequence[Placement],
    cost: CostModel,
    settings: PlanSettings,
) -> tuple[Placement, ...]:
    """Copies by (version, engine) with their shares of traffic; adapters nobody asks for are planned nowhere new."""
    targets = [_Engine(e.engine, int(e.pool_total_bytes * POOL_FRACTION)) for e in engines]
    if not targets:
        return ()
    weights = _weights(demand, adapters, current, cost)
    fair = sum(weights.values()) / len(targets)
    placements: list[Placement] = []
    # Heaviest first: the light ones then fill the gaps (longest processing time first).
    for version in sorted(weights, key=lambda v: (-weights[v], v)):
        copies = _copies(weights[version], fair, settings.min_copies, len(targets))
        stay = [p.engine for p in current if p.version == version]
        chosen = _choose(targets, adapters[version], weights[version], copies, stay, fair)
        name = adapters[version].name
        placements += [Placement(version=version, name=name, engine=e, share=1 / len(chosen)) for e in chosen]
    return tuple(sorted(placements, key=lambda p: (p.name, p.version, p.engine)))


def _weights(
    demand: Sequence[AdapterDemand],
    adapters: Mapping[str, AdapterRef],
    current: Sequence[Placement],
    cost: CostModel,
) -> dict[str, float]:
    """Share of an engine's time of each adapter that is asked for or planned now."""
    weights = {p.version: IDLE_WEIGHT for p in current if p.version in adapters}
    for asked in demand:
        seen = asked.prefill_tokens_per_s + asked.decode_tokens_per_s
        if asked.version in adapters and max(seen, asked.forecast_tokens_per_s) > 0:
            adapter = adapters[asked.version]
            # The forecast is of all tokens; they are taken to split as those that were seen.
            growth = max(1.0, asked.forecast_tokens_per_s / seen) if seen > 0 else 0.0
            decode = asked.decode_tokens_per_s * growth if seen > 0 else asked.forecast_tokens_per_s
            prefill = asked.prefill_tokens_per_s * growth
            weights[asked.version] = cost.busy_share(prefill, decode, adapter.rank, adapter.slab_bytes)
    return weights


def _copies(weight: float, fair: float, min_copies: int, engines: int) -> int:
    """One, and one more for every whole engine's fair share that the adapter brings; none more where few ask."""
    shares = round(weight / fair) if weight > SPLIT_SHARE else 0
    return min(engines, max(min_copies, 1, shares))


def _choose(
    targets: list[_Engine], adapter: AdapterRef, weight: float, copies: int, stay: Sequence[str], fair: float
) -> list[str]:
    """Engines for the copies of one adapter; their room and cost are taken."""
    chosen: list[str] = []
    for _ in range(copies):
        able = [e for e in targets if e.room_bytes >= extent_bytes(adapter.slab_bytes) and e.name not in chosen]
        if not able:
            break
        least = min(able, key=lambda e: (e.cost, e.name))
        kept = [e for e in able if e.name in stay and e.cost + weight / copies <= fair * (1 + HYSTERESIS)]
        near = [e for e in able if e.name in stay and e.cost <= least.cost + fair * HYSTERESIS]
        best = min(kept or near or [least], key=lambda e: (e.cost, e.name))
        best.room_bytes -= extent_bytes(adapter.slab_bytes)
        best.cost += weight / copies
        chosen.append(best.name)
    return chosen
