"""A trace as a workload: its clients are tenants, each with adapters of its own. Pure: randomness is passed in."""

from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from random import Random

from loraserve.errors import ConfigError
from loraserve.sim.traces import TraceRequest
from loraserve.sim.workload import RANKS, SimRequest, Workload, make_adapters

POWER = 1.0
"""Of a tenant's adapters the k-th is asked for 1 / k ** POWER times as often as the first."""


def tenants_workload(
    trace: Sequence[TraceRequest],
    adapters: int,
    requests: int,
    slab_bytes_per_rank: int,
    name: str,
    seed: int = 0,
    path: str = "",
) -> Workload:
    """The first so many requests of the trace, for so many adapters.

    Every tenant has an adapter, those with more requests have more, and each request of a tenant
    draws one by a power law. Ranks are dealt out evenly, at random. Where there are fewer adapters than tenants, the
    smallest tenants share the last one. Raises ConfigError where the trace is too short for the load to be a load, and
    calls it by its ``path``, where there is one.
    """
    if adapters < 1:
        raise ConfigError(f"--adapters {adapters}: at least one adapter is needed")
    drawn_from = trace[:requests]
    if len(drawn_from) < 2 or drawn_from[-1].time_s <= drawn_from[0].time_s:
        raise ConfigError(
            f"{path or name}: the first {requests} requests are all at one time: there is no load to scale"
        )
    rng = Random(seed)
    ranks = [RANKS[i % len(RANKS)] for i in range(adapters)]
    # Before any request is drawn: the ranks are the same whatever the load, which is how many requests there are.
    rng.shuffle(ranks)
    owned = _owned([client for client, _ in Counter(r.client for r in trace).most_common()], trace, adapters)
    weights = {c: list(accumulate(1 / (k + 1) ** POWER for k in range(len(own)))) for c, own in owned.items()}
    drawn = []
    for r in drawn_from:
        own, bounds = owned[r.client], weights[r.client]
        adapter = own[min(bisect(bounds, rng.random() * bounds[-1]), len(own) - 1)]
        drawn.append(SimRequest(r.time_s, adapter, r.prompt_tokens, r.output_tokens))
    names = [""] * adapters
    for client, own in owned.items():
        for place, adapter in enumerate(own):
            names[adapter] = names[adapter] or f"{client}/{place}"
    return Workload(name, make_adapters(ranks, slab_bytes_per_rank, names), tuple(drawn))


def _owned(clients: Sequence[str], trace: Sequence[TraceRequest], adapters: int) -> dict[str, list[int]]:
    """Adapters of each tenant, largest tenant first; the next one goes to whoever has most requests for each it has."""
    counts = Counter(r.client for r in trace)
    number = dict.fromkeys(clients[:adapters], 1)
    for _ in range(adapters - len(number)):
        number[max(number, key=lambda c: counts[c] / number[c])] += 1
    owned: dict[str, list[int]] = {}
    begin = 0
    for client in clients:
        if client in number:
            owned[client] = list(range(begin, begin + number[client]))
            begin += number[client]
        else:
            owned[client] = [adapters - 1]
    return owned
