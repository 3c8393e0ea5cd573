"""Workloads: adapters with their ranks, and requests in order of arrival.

A workload is drawn from distributions (``WorkloadShape``) or made from a trace (``TraceSource``). Each client of a
trace becomes a tenant with its own adapters. ``Workload.at`` sets the request rate.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import exp, log
from pathlib import Path
from random import Random
from typing import Literal, get_args

import msgspec

from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef
from loraserve.sim.traces import TraceRequest

Arrivals = Literal["poisson", "bursts"]
Drift = Literal["none", "ranks", "popularity"]

RANKS = (8, 16, 32, 64, 128)
"""The adapter ranks of the LoRAServe paper."""
RANK_MIXES: dict[str, tuple[float, ...]] = {
    "uniform": (1, 1, 1, 1, 1),
    "mostly-small": (16, 8, 4, 2, 1),
    "two-ends": (4, 0, 0, 0, 1),
    "mostly-large": (1, 2, 4, 8, 16),
}
"""Relative numbers of adapters, one for each rank of ``RANKS``."""
LENGTHS: dict[str, tuple[float, float]] = {
    "prefill-heavy": (1500.0, 60.0),
    "chat": (600.0, 200.0),
    "decode-heavy": (200.0, 500.0),
}
"""Mean numbers of prompt and output tokens. Both numbers are drawn from lognormal distributions."""
LENGTH_SIGMA = 0.8
BURST_CV = 3.0
"""Coefficient of variation of the gaps between requests for ``bursts``. ServeGen's clients have 1 to 5."""
ZIPF_EXPONENT = 0.9
DRIFT_PHASES = 6
"""Number of phases of a workload with drift. Each phase has constant popularities."""
TENANT_EXPONENT = 1.0
"""The k-th adapter of a tenant is requested 1 / k ** TENANT_EXPONENT times as often as the tenant's first."""


class SimRequest(msgspec.Struct, frozen=True, gc=False):
    """A request. ``adapter`` is an index into ``Workload.adapters``."""

    time_s: float
    adapter: int
    prompt_tokens: int
    output_tokens: int


class Workload(msgspec.Struct, frozen=True):
    """Adapters, and requests in order of arrival. ``name`` describes the workload in tables."""

    name: str
    adapters: tuple[AdapterRef, ...]
    requests: tuple[SimRequest, ...]

    @property
    def duration_s(self) -> float:
        return self.requests[-1].time_s - self.requests[0].time_s if self.requests else 0.0

    @property
    def rps(self) -> float:
        return len(self.requests) / self.duration_s if self.duration_s else 0.0

    def at(self, rps: float) -> "Workload":
        """Return the workload with the gaps between requests scaled to a mean of ``rps`` requests per second."""
        factor = self.rps / rps
        start_s = self.requests[0].time_s if self.requests else 0.0
        scaled = (msgspec.structs.replace(r, time_s=(r.time_s - start_s) * factor) for r in self.requests)
        return Workload(self.name, self.adapters, tuple(scaled))


class WorkloadShape(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a drawn workload. With ``requests`` 0, the run's duration determines the number of requests."""

    ranks: str = "uniform"
    arrivals: Arrivals = "poisson"
    drift: Drift = "none"
    lengths: str = "chat"
    adapters: int = 100
    requests: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.ranks} {self.arrivals} {self.drift} {self.lengths}"


class TraceSource(msgspec.Struct, frozen=True, kw_only=True):
    """The first ``requests`` requests of a trace file. If 0, the run's duration determines the number."""

    path: str
    adapters: int = 100
    requests: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{Path(self.path).name.partition('.')[0]}, {self.adapters} adapters"


def make_adapters(ranks: Sequence[int], slab_bytes_per_rank: int, names: Sequence[str] = ()) -> tuple[AdapterRef, ...]:
    """Return one adapter for each rank, with names from ``names`` or numbered names."""
    return tuple(
        AdapterRef(
            name=names[i] if names else f"adapter-{i:05d}",
            version=f"{i:08x}",
            rank=rank,
            slab_bytes=rank * slab_bytes_per_rank,
        )
        for i, rank in enumerate(ranks)
    )


# Drawn from distributions


def draw_workload(shape: WorkloadShape, slab_bytes_per_rank: int) -> Workload:
    """Draw a workload with a mean of 1 request per second. Equal shapes give equal workloads."""
    rng = Random(f"{shape.seed} {shape.name}")
    ranks = _draw_ranks(shape, rng)
    popularity = [1 / (place + 1) ** ZIPF_EXPONENT for place in range(shape.adapters)]
    rng.shuffle(popularity)
    gaps = _gaps(shape.arrivals, rng)
    prompt, output = (_lognormal(mean, rng) for mean in LENGTHS[shape.lengths])
    requests: list[SimRequest] = []
    time_s = 0.0
    for phase in range(DRIFT_PHASES):
        bounds = list(accumulate(_drifted(shape, popularity, ranks, phase)))
        for _ in range(len(requests), shape.requests * (phase + 1) // DRIFT_PHASES):
            time_s += next(gaps)
            adapter = min(bisect(bounds, rng.random() * bounds[-1]), shape.adapters - 1)
            requests.append(SimRequest(time_s, adapter, prompt(), output()))
    return Workload(shape.name, make_adapters(ranks, slab_bytes_per_rank), tuple(requests))


def grid_shapes(requests: int = 0, adapters: int = 100, seed: int = 0) -> list[WorkloadShape]:
    """Return 24 shapes: every combination of rank mix, arrivals and drift.

    Lengths follow a Latin square: every rank mix, every kind of arrivals and every drift occurs with every length.
    """
    lengths = list(LENGTHS)
    return [
        WorkloadShape(
            ranks=mix,
            arrivals=arrivals,
            drift=drift,
            lengths=lengths[(mix_index + arrivals_index + drift_index) % len(lengths)],
            adapters=adapters,
            requests=requests,
            seed=seed,
        )
        for mix_index, mix in enumerate(RANK_MIXES)
        for arrivals_index, arrivals in enumerate(get_args(Arrivals))
        for drift_index, drift in enumerate(get_args(Drift))
    ]


def _draw_ranks(shape: WorkloadShape, rng: Random) -> list[int]:
    """Return a rank for each adapter, in random order. The number of each rank is proportional to its weight."""
    bounds = list(accumulate(RANK_MIXES[shape.ranks]))
    ranks = [
        RANKS[min(bisect(bounds, (i + 0.5) / shape.adapters * bounds[-1]), len(RANKS) - 1)]
        for i in range(shape.adapters)
    ]
    rng.shuffle(ranks)
    return ranks


def _gaps(arrivals: Arrivals, rng: Random) -> Iterator[float]:
    """Yield gaps between requests in seconds, mean 1: exponential for ``poisson``, Gamma for ``bursts``."""
    alpha = 1.0 if arrivals == "poisson" else 1 / BURST_CV**2
    while True:
        yield rng.gammavariate(alpha, 1 / alpha)


def _drifted(shape: WorkloadShape, popularity: Sequence[float], ranks: Sequence[int], phase: int) -> list[float]:
    """Return the relative request rate of each adapter in a phase.

    With drift ``ranks``, requests shift from small to large ranks (the shifting rank skew of the LoRAServe paper). With
    drift ``popularity``, rarely requested adapters become popular, and popular adapters become rarely requested.
    """
    progress = phase / (DRIFT_PHASES - 1)
    if shape.drift == "ranks":
        tilt = (2 * progress - 1) * 0.5
        return [p * (rank / 32) ** tilt for p, rank in zip(popularity, ranks, strict=True)]
    if shape.drift == "popularity":
        return [(1 - progress) * p + progress * q for p, q in zip(popularity, reversed(popularity), strict=True)]
    return list(popularity)


def _lognormal(mean: float, rng: Random) -> Callable[[], int]:
    mu = log(mean) - LENGTH_SIGMA**2 / 2
    return lambda: max(1, int(exp(rng.gauss(mu, LENGTH_SIGMA))))


# Made from a trace


def trace_workload(trace: Sequence[TraceRequest], source: TraceSource, slab_bytes_per_rank: int) -> Workload:
    """Return a workload of the first ``source.requests`` requests of the trace.

    Every client is a tenant with at least one adapter. Clients with more requests have more adapters. Each request
    draws one of its client's adapters by a power law. All ranks are equally frequent, in random order. If there are
    fewer adapters than clients, the clients with the fewest requests share the last adapter.

    Raises ConfigError if there is no adapter, if there are fewer than two requests, or if all arrive at one time.
    """
    if source.adapters < 1:
        raise ConfigError(f"--adapters {source.adapters}: at least one adapter is needed")
    used = trace[: source.requests]
    if len(used) < 2 or used[-1].time_s <= used[0].time_s:
        raise ConfigError(
            f"{source.path}: the first {source.requests} requests arrive at the same time, so no load can be set"
        )
    rng = Random(source.seed)
    ranks = [RANKS[i % len(RANKS)] for i in range(source.adapters)]
    # Shuffle before any request is drawn, so that the ranks do not depend on the number of requests.
    rng.shuffle(ranks)
    owned = _deal_adapters(trace, source.adapters)
    bounds = {c: list(accumulate(1 / (k + 1) ** TENANT_EXPONENT for k in range(len(a)))) for c, a in owned.items()}
    requests = []
    for r in used:
        own, own_bounds = owned[r.client], bounds[r.client]
        adapter = own[min(bisect(own_bounds, rng.random() * own_bounds[-1]), len(own) - 1)]
        requests.append(SimRequest(r.time_s, adapter, r.prompt_tokens, r.output_tokens))
    names = [""] * source.adapters
    for client, own in owned.items():
        for place, adapter in enumerate(own):
            names[adapter] = names[adapter] or f"{client}/{place}"
    return Workload(source.name, make_adapters(ranks, slab_bytes_per_rank, names), tuple(requests))


def _deal_adapters(trace: Sequence[TraceRequest], adapters: int) -> dict[str, list[int]]:
    """Return each client's adapters: one each. Any other goes to the client with the most requests per adapter."""
    counts = Counter(r.client for r in trace)
    clients = [client for client, _ in counts.most_common()]
    number = dict.fromkeys(clients[:adapters], 1)
    for _ in range(adapters - len(number)):
        number[max(number, key=lambda c: counts[c] / number[c])] += 1
    owned: dict[str, list[int]] = {}
    first = 0
    for client in clients:
        if client in number:
            owned[client] = list(range(first, first + number[client]))
            first += number[client]
        else:
            owned[client] = [adapters - 1]
    return owned
