"""The policies that the simulator compares. Each policy places copies of adapters and routes requests.

``ours`` (this project's default, ``DEFAULT_POLICY``) and ``loraserve`` (the LoRAServe paper) run the production code.
The others follow their papers or sources:

- ``slora-random`` and ``slora-contiguous`` assign each adapter to one engine, once. A request goes to the engine of
  its adapter. The LoRAServe paper compares with these placements.
- ``toppings`` keeps every adapter on every engine. A request goes to the engine that a rank-aware cost model predicts
  to finish it first (Li et al., "Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference", ATC 2025).
- ``dynamo`` makes copies in proportion to load, with hysteresis, on engines chosen by rendezvous hashing. A request
  goes to the copy with the fewest requests (NVIDIA Dynamo 1.3, ``lora/routing``).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from math import ceil
from random import Random

import msgspec

from loraserve.cost import CostModel, StepShape
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef, Placement, Rejected, Route
from loraserve.planner.placement import PLACEMENT_POLICIES
from loraserve.planner.placement.problem import PlacementPolicy, PlanInput
from loraserve.router.context import Candidate, Candidates, RoutingContext
from loraserve.router.engine_view import EngineView
from loraserve.router.policy import POLICIES, RoutingPolicy

HYSTERESIS = 0.2
"""``dynamo`` keeps an adapter's number of copies if the target differs by at most this fraction of that number."""


class Policy(msgspec.Struct, frozen=True):
    """A placement and a routing policy.

    With ``everywhere``, every engine holds every adapter, and adapters take neither KV memory nor load time. With
    ``random_placement``, the placement depends on the seed.
    """

    name: str
    place: PlacementPolicy
    route: RoutingPolicy
    everywhere: bool = False
    random_placement: bool = False


RANDOM, TOPPINGS, DEFAULT_POLICY = "slora-random", "toppings", "ours"
POLICY_NAMES = (RANDOM, "slora-contiguous", TOPPINGS, "dynamo", "loraserve", DEFAULT_POLICY)


def policy_named(name: str, seed: int = 0) -> Policy:
    """Return a policy; ``seed`` determines a random placement. Raises ConfigError if the name is unknown."""
    match name:
        case "slora-random":
            return Policy(name, partial(place_at_random, seed), route_to_copy, random_placement=True)
        case "slora-contiguous":
            return Policy(name, place_contiguously, route_to_copy)
        case "toppings":
            return Policy(name, place_everywhere, route_to_least_finish, everywhere=True)
        case "dynamo":
            return Policy(name, place_by_rendezvous, route_to_least_requests)
        case "loraserve":
            return Policy(name, PLACEMENT_POLICIES["loraserve"], POLICIES["shares"])
        case "ours":
            return Policy(name, PLACEMENT_POLICIES["ours"], POLICIES["predicted"])
    raise ConfigError(f"policy {name!r} is not known; there are {', '.join(POLICY_NAMES)}")


# Placement


def place_at_random(seed: int, inputs: PlanInput) -> tuple[Placement, ...]:
    """Keep the current placement. If there is none, deal adapters to engines at random, equally many to each."""
    versions = sorted(inputs.adapters)
    Random(f"placement {seed}").shuffle(versions)
    return tuple(inputs.current) or _deal(inputs, versions, lambda i: i % len(inputs.engines))


def place_contiguously(inputs: PlanInput) -> tuple[Placement, ...]:
    """Keep the current placement. If there is none, give each engine an equal range of adapters sorted by name."""
    versions = sorted(inputs.adapters, key=lambda version: (inputs.adapters[version].name, version))
    return tuple(inputs.current) or _deal(inputs, versions, lambda i: i * len(inputs.engines) // len(versions))


def place_everywhere(inputs: PlanInput) -> tuple[Placement, ...]:
    share = 1 / len(inputs.engines)
    return tuple(inputs.current) or tuple(
        _placement(inputs.adapters[version], engine.engine, share)
        for version in sorted(inputs.adapters)
        for engine in inputs.engines
    )


def place_by_rendezvous(inputs: PlanInput) -> tuple[Placement, ...]:
    """Place copies of each adapter, at least one, in proportion to requests/s, on the engines with the highest hashes.

    A hash is of (version, engine). An engine takes at most one copy more than an equal share of all copies.
    """
    names = [engine.engine for engine in inputs.engines]
    total_rps = sum(d.requests_per_s for d in inputs.demand)
    rps = {d.version: d.requests_per_s for d in inputs.demand}
    held = Counter(placement.version for placement in inputs.current)
    targets = {
        version: _copy_count(rps.get(version, 0.0) / total_rps if total_rps else 0.0, len(names), held[version])
        for version in inputs.adapters
    }
    slots = dict.fromkeys(names, ceil(sum(targets.values()) / len(names)) + 1)
    placements: list[Placement] = []
    for version in sorted(inputs.adapters, key=lambda v: (-targets[v], v)):
        ranked = sorted(names, key=lambda name: _rendezvous_hash(version, name), reverse=True)
        chosen = [name for name in ranked if slots[name] > 0][: targets[version]] or ranked[:1]
        for name in chosen:
            slots[name] -= 1
            placements.append(_placement(inputs.adapters[version], name, 1 / len(chosen)))
    return tuple(placements)


def _deal(inputs: PlanInput, versions: Sequence[str], engine_of: Callable[[int], int]) -> tuple[Placement, ...]:
    engines = inputs.engines
    return tuple(_placement(inputs.adapters[v], engines[engine_of(i)].engine, 1.0) for i, v in enumerate(versions))


def _placement(adapter: AdapterRef, engine: str, share: float) -> Placement:
    return Placement(version=adapter.version, name=adapter.name, engine=engine, share=share)


def _copy_count(load_share: float, engines: int, held: int) -> int:
    target = min(engines, max(1, ceil(load_share * engines)))
    return held if held and abs(target - held) <= HYSTERESIS * held else target


def _rendezvous_hash(version: str, engine: str) -> bytes:
    return blake2b(f"{version}/{engine}".encode(), digest_size=8).digest()


# Routing


def route_to_copy(context: RoutingContext) -> Candidates | Rejected:
    return _route_to_minimum(context, lambda engine: 0.0)


def route_to_least_requests(context: RoutingContext) -> Candidates | Rejected:
    """Route to the engine with a copy that has the fewest requests, regardless of their length."""
    return _route_to_minimum(context, lambda engine: engine.requests + context.rng.random())


def route_to_least_finish(context: RoutingContext) -> Candidates | Rejected:
    """Route to the engine with a copy where the request is predicted to end first (``finish_s``)."""
    output_tokens = context.view.mean_output_tokens
    return _route_to_minimum(context, lambda engine: finish_s(context.request, engine, context.cost, output_tokens))


def finish_s(request: Route, engine: EngineView, cost: CostModel, output_tokens: float) -> float:
    """Return the predicted seconds until a request ends: queued and own prefill, decode, and the wait for a place.

    ``output_tokens`` is the mean of all requests, because the output length is not known in advance.
    """
    load, limits, running, pending = engine.load, engine.capabilities, engine.adapters, engine.pending_adapters
    rank = request.adapter.rank if request.adapter else 0
    max_rank = max(rank, running.largest_rank, pending.largest_rank)
    sequences = engine.requests + 1
    batch = StepShape(
        decode_sequences=min(sequences, limits.max_running) if limits.max_running else sequences,
        kv_tokens=(limits.kv_blocks - load.memory.kv_blocks_free) * limits.block_tokens + len(request.prompt_tokens),
        slab_bytes=running.slab_bytes + pending.slab_bytes,
        rank_tokens=running.rank_sum + pending.rank_sum + rank,
        max_rank=max_rank,
    )
    waiting_tokens = load.queue.waiting_prefill_tokens + engine.pending_tokens + len(request.prompt_tokens)
    prefill = StepShape(prefill_tokens=waiting_tokens, rank_tokens=waiting_tokens * rank, max_rank=max_rank)
    return cost.step_s(prefill) + output_tokens * cost.step_s(batch) + _place_wait_s(engine, cost, output_tokens)


def _place_wait_s(engine: EngineView, cost: CostModel, output_tokens: float) -> float:
    """Return the wait in seconds for a place in the batch; 0 if the batch is not full."""
    max_running = engine.capabilities.max_running
    if not max_running or engine.requests < max_running:
        return 0.0
    step_s = cost.step_s(StepShape(decode_sequences=max_running))
    return (engine.requests + 1 - max_running) / max_running * output_tokens * step_s


def _route_to_minimum(context: RoutingContext, price: Callable[[EngineView], float]) -> Candidates | Rejected:
    """Route to the lowest price among ready engines with a planned copy, or among all ready ones if there are none."""
    ready = context.view.ready_engines()
    copies = context.planned_shares()
    engines = [engine for engine in ready if engine.name in copies] or ready
    if not engines:
        return Rejected(request_id=context.request.request_id, code="no_engine", message="no engine is ready")
    best = min(engines, key=price)
    return Candidates(Candidate(best.name, 0.0, "planned" if best.name in copies else "load"))
