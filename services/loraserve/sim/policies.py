"""The policies that are compared, each a way to place and a way to route."""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from math import ceil
from random import Random

import msgspec

from loraserve.cost import CostModel, StepShape
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef, Placement, Rejected, Route
from loraserve.planner.placement.policies import PLACEMENT_POLICIES
from loraserve.planner.placement.problem import PlacementPolicy, PlanInput
from loraserve.router.context import Candidate, Candidates, RoutingContext
from loraserve.router.engine_view import EngineView
from loraserve.router.policy import POLICIES, RoutingPolicy


class Policy(msgspec.Struct, frozen=True):
    """``everywhere``: every engine holds every adapter, at no cost. ``random_placement``: its placement depends on
    the seed."""

    name: str
    place: PlacementPolicy
    route: RoutingPolicy
    everywhere: bool = False
    random_placement: bool = False


NAMES = ("slora-random", "slora-contiguous", "toppings", "dynamo", "loraserve", "ours")


def policy_named(name: str, seed: int = 0) -> Policy:
    """``seed`` is of placements at random. Raises ConfigError naming the policies that there are."""
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
    raise ConfigError(f"policy {name!r} is not known; there are {', '.join(NAMES)}")


# MERGED:
# """What others do, as far as their papers and sources say. Pure. ``slora-random`` and ``slora-contiguous``:
# adapters dealt out to engines once, a request goes where its adapter is (the placements that LoRAServe's
# paper compares with). ``toppings``: every adapter everywhere, each request where it ends first by a model
# that knows ranks (Li et al., "Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference", USENIX
# ATC 2025). ``dynamo``: copies in proportion to load on engines chosen by rendezvous hashing, by counts of
# adapters and requests, with hysteresis (NVIDIA Dynamo 1.3, ``lora/routing``).
# """


HYSTERESIS = 0.2
"""Of the number of copies: a target that is off by less leaves them as they are."""


def place_at_random(seed: int, inputs: PlanInput) -> tuple[Placement, ...]:
    """Once, as many adapters on one engine as on another."""
    versions = sorted(inputs.adapters)
    Random(f"placement {seed}").shuffle(versions)
    return tuple(inputs.current) or _dealt(inputs, versions, lambda i: i % len(inputs.engines))


def place_contiguously(inputs: PlanInput) -> tuple[Placement, ...]:
    """Once, in order of their names: the first so many on the first engine, and so on."""
    versions = sorted(inputs.adapters, key=lambda version: (inputs.adapters[version].name, version))
    return tuple(inputs.current) or _dealt(inputs, versions, lambda i: i * len(inputs.engines) // len(versions))


def place_everywhere(inputs: PlanInput) -> tuple[Placement, ...]:
    share = 1 / len(inputs.engines)
    return tuple(inputs.current) or tuple(
        _placement(inputs.adapters[version], engine.engine, share)
        for version in sorted(inputs.adapters)
        for engine in inputs.engines
    )


def place_by_rendezvous(inputs: PlanInput) -> tuple[Placement, ...]:
    """Copies in proportion to requests a second, at least one; an engine has slots for its share of them."""
    names = [engine.engine for engine in inputs.engines]
    total_rps = sum(d.requests_per_s for d in inputs.demand)
    rps = {d.version: d.requests_per_s for d in inputs.demand}
    held: dict[str, int] = {}
    for placement in inputs.current:
        held[placement.version] = held.get(placement.version, 0) + 1
    targets = {
        version: _copies(rps.get(version, 0.0) / total_rps if total_rps else 0.0, len(names), held.get(version, 0))
        for version in inputs.adapters
    }
    slots = dict.fromkeys(names, ceil(sum(targets.values()) / len(names)) + 1)
    placements: list[Placement] = []
    for version in sorted(inputs.adapters, key=lambda v: (-targets[v], v)):
        ranked = sorted(names, key=lambda name: _weight(version, name), reverse=True)
        chosen = [name for name in ranked if slots[name] > 0][: targets[version]] or ranked[:1]
        for name in chosen:
            slots[name] -= 1
            placements.append(_placement(inputs.adapters[version], name, 1 / len(chosen)))
    return tuple(placements)


def route_to_copy(context: RoutingContext) -> Candidates | Rejected:
    """The one engine whose adapter it is."""
    return _least(context, lambda engine: 0.0)


def route_to_least_requests(context: RoutingContext) -> Candidates | Rejected:
    """The copy with the fewest requests, whatever they are."""
    return _least(context, lambda engine: engine.requests + context.rng.random())


def route_to_least_finish(context: RoutingContext) -> Candidates | Rejected:
    """Where it would end first: what waits there, its own prefill, and as many steps of that batch as it takes."""
    return _least(
        context, lambda engine: finish_s(context.request, engine, context.cost, context.view.mean_output_tokens)
    )


def finish_s(request: Route, engine: EngineView, cost: CostModel, output_tokens: float) -> float:
    """The length of the output is not known beforehand: the mean is taken."""
    load, mix, pending = engine.load, engine.adapters, engine.pending_adapters
    rank = request.adapter.rank if request.adapter else 0
    max_rank = max(rank, mix.largest_rank, pending.largest_rank)
    sequences = engine.requests + 1
    batch = StepShape(
        decode_sequences=min(sequences, load.max_running) if load.max_running else sequences,
        kv_tokens=(load.kv_blocks_total - load.kv_blocks_free) * load.block_tokens + len(request.prompt_tokens),
        slab_bytes=mix.slab_bytes + pending.slab_bytes,
        rank_tokens=mix.rank_sum + pending.rank_sum + rank,
        max_rank=max_rank,
    )
    waiting_tokens = load.waiting_prefill_tokens + engine.pending_tokens + len(request.prompt_tokens)
    prefill = StepShape(prefill_tokens=waiting_tokens, rank_tokens=waiting_tokens * rank, max_rank=max_rank)
    return cost.step_s(prefill) + output_tokens * cost.step_s(batch) + _wait_for_place_s(engine, cost, output_tokens)


def _wait_for_place_s(engine: EngineView, cost: CostModel, output_tokens: float) -> float:
    """Who waits although there is little to prefill waits for the end of others."""
    load = engine.load
    if not load.max_running or engine.requests < load.max_running:
        return 0.0
    step_s = cost.step_s(StepShape(decode_sequences=load.max_running))
    return (engine.requests + 1 - load.max_running) / load.max_running * output_tokens * step_s


def _least(context: RoutingContext, price: Callable[[EngineView], float]) -> Candidates | Rejected:
    ready = context.view.ready_engines()
    copies = context.planned_shares()
    able = [engine for engine in ready if engine.name in copies] or ready
    if not able:
        return Rejected(request_id=context.request.request_id, code="no_engine", message="no engine is ready")
    best = min(able, key=price)
    return Candidates(Candidate(best.name, 0.0, "planned" if best.name in copies else "load"))


def _dealt(inputs: PlanInput, versions: Sequence[str], engine_of: Callable[[int], int]) -> tuple[Placement, ...]:
    engines = inputs.engines
    return tuple(_placement(inputs.adapters[v], engines[engine_of(i)].engine, 1.0) for i, v in enumerate(versions))


def _placement(adapter: AdapterRef, engine: str, share: float) -> Placement:
    return Placement(version=adapter.version, name=adapter.name, engine=engine, share=share)


def _copies(load_share: float, engines: int, held: int) -> int:
    target = min(engines, max(1, ceil(load_share * engines)))
    return held if held and abs(target - held) <= HYSTERESIS * held else target


def _weight(version: str, engine: str) -> bytes:
    return blake2b(f"{version}/{engine}".encode(), digest_size=8).digest()
