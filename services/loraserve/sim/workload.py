"""What a simulated cluster is asked: adapters with their ranks, and requests in order of arrival. Plain data."""

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import exp, log
from random import Random
from typing import Literal

import msgspec

from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef
from loraserve.sim.traces import TraceRequest

RANKS = (8, 16, 32, 64, 128)
"""The paper's."""


class SimRequest(msgspec.Struct, frozen=True, gc=False):
    """``adapter`` is an index of the workload's adapters."""

    time_s: float
    adapter: int
    prompt_tokens: int
    output_tokens: int


class Workload(msgspec.Struct, frozen=True):
    """Requests in order of arrival. ``name`` says for people what it is."""

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
        """The same requests, sooner or later after each other, so that so many arrive a second."""
        factor = self.rps / rps
        start_s = self.requests[0].time_s if self.requests else 0.0
        moved = tuple(
            SimRequest((r.time_s - start_s) * factor, r.adapter, r.prompt_tokens, r.output_tokens)
            for r in self.requests
        )
        return Workload(self.name, self.adapters, moved)


def make_adapters(ranks: Sequence[int], slab_bytes_per_rank: int, names: Sequence[str] = ()) -> tuple[AdapterRef, ...]:
    """An adapter for each rank; ``names`` in the same order, else numbered."""
    return tuple(
        AdapterRef(
            name=names[i] if names else f"adapter-{i:05d}",
            version=f"{i:08x}",
            rank=rank,
            slab_bytes=rank * slab_bytes_per_rank,
        )
        for i, rank in enumerate(ranks)
    )


# MERGED: loraserve.sim.workload
# """Workloads drawn from distributions: arrivals, popularity, ranks and their drift, lengths. Pure.
#
# Loads are set afterwards (``Workload.at``): here a request a second arrives on average.
# """


Arrivals = Literal["poisson", "bursts"]
Drift = Literal["none", "ranks", "popularity"]

BURST_CV = 3.0
"""Coefficient of variation of the gaps in bursts; ServeGen's clients have 1 to 5."""
ZIPF_EXPONENT = 0.9
DRIFT_PHASES = 6
"""In how many steps popularity or the mix of ranks goes from its first to its last state."""

RANK_MIXES: dict[str, tuple[float, ...]] = {
    "uniform": (1, 1, 1, 1, 1),
    "mostly-small": (16, 8, 4, 2, 1),
    "two-ends": (4, 0, 0, 0, 1),
    "mostly-large": (1, 2, 4, 8, 16),
}
"""Weights of ranks 8, 16, 32, 64, 128 among adapters."""

LENGTHS: dict[str, tuple[float, float]] = {
    "prefill-heavy": (1500.0, 60.0),
    "chat": (600.0, 200.0),
    "decode-heavy": (200.0, 500.0),
}
"""Mean prompt and output tokens; both are lognormal."""
LENGTH_SIGMA = 0.8


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a workload is drawn from. ``requests`` 0: as the run is long."""

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


def draw(shape: Shape, slab_bytes_per_rank: int) -> Workload:
    """The workload of this shape; the same every time."""
    rng = Random(f"{shape.seed} {shape.name}")
    ranks = _ranks(shape, rng)
    popularity = [1 / (place + 1) ** ZIPF_EXPONENT for place in range(shape.adapters)]
    rng.shuffle(popularity)
    gaps = _gaps(shape.arrivals, rng)
    prompt, output = (_lognormal(mean, rng) for mean in LENGTHS[shape.lengths])
    requests: list[SimRequest] = []
    time_s = 0.0
    for phase in range(DRIFT_PHASES):
        weights = list(accumulate(_drifted(shape, popularity, ranks, phase)))
        for _ in range(len(requests), shape.requests * (phase + 1) // DRIFT_PHASES):
            time_s += next(gaps)
            adapter = min(bisect(weights, rng.random() * weights[-1]), shape.adapters - 1)
            requests.append(SimRequest(time_s, adapter, prompt(), output()))
    return Workload(shape.name, make_adapters(ranks, slab_bytes_per_rank), tuple(requests))


def _ranks(shape: Shape, rng: Random) -> list[int]:
    """As many adapters of each rank as its weight says, in no order."""
    weights = RANK_MIXES[shape.ranks]
    bounds = list(accumulate(weights))
    ranks = [
        RANKS[min(bisect(bounds, (i + 0.5) / shape.adapters * bounds[-1]), len(RANKS) - 1)]
        for i in range(shape.adapters)
    ]
    rng.shuffle(ranks)
    return ranks


def _gaps(arrivals: Arrivals, rng: Random) -> Iterator[float]:
    """Seconds between requests, 1 on average: exponential, or Gamma with a larger spread."""
    form = 1.0 if arrivals == "poisson" else 1 / BURST_CV**2
    while True:
        yield rng.gammavariate(form, 1 / form)


def _drifted(shape: Shape, popularity: Sequence[float], ranks: Sequence[int], phase: int) -> list[float]:
    """How often each adapter is asked for in a phase.

    ``ranks``: large ranks take over from small ones (the paper's shifting rank skew). ``popularity``: what was rarely
    asked for becomes popular, adapter by adapter.
    """
    done = phase / (DRIFT_PHASES - 1)
    if shape.drift == "ranks":
        tilt = (2 * done - 1) * 0.5
        return [p * (rank / 32) ** tilt for p, rank in zip(popularity, ranks, strict=True)]
    if shape.drift == "popularity":
        return [(1 - done) * p + done * q for p, q in zip(popularity, reversed(popularity), strict=True)]
    return list(popularity)


def _lognormal(mean: float, rng: Random) -> Callable[[], int]:
    mu = log(mean) - LENGTH_SIGMA**2 / 2
    return lambda: max(1, int(exp(rng.gauss(mu, LENGTH_SIGMA))))


def grid(requests: int = 0, adapters: int = 100, seed: int = 0) -> list[Shape]:
    """24: four mixes of ranks, two kinds of arrival, three of drift; lengths from prefill-heavy to decode-heavy."""
    lengths = list(LENGTHS)
    shapes = []
    for mix_index, mix in enumerate(RANK_MIXES):
        for arrivals_index, arrivals in enumerate(("poisson", "bursts")):
            for drift_index, drift in enumerate(("none", "ranks", "popularity")):
                # A Latin square: every mix, arrival and drift is seen with every length.
                length = lengths[(mix_index + arrivals_index + drift_index) % len(lengths)]
                shapes.append(
                    Shape(
                        ranks=mix,
                        arrivals=arrivals,  # type: ignore[arg-type]
                        drift=drift,  # type: ignore[arg-type]
                        lengths=length,
                        adapters=adapters,
                        requests=requests,
                        seed=seed,
                    )
                )
    return shapes


# MERGED: loraserve.sim.workload
# """A trace as a workload: its clients are tenants, each with adapters of its own. Pure: randomness is passed in."""


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
