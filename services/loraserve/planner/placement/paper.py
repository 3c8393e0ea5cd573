"""The placement policy ``loraserve``, which follows the LoRAServe paper.

Jaiswal et al., "Serving Heterogeneous LoRA Adapters in Distributed LLM Inference Systems", arXiv:2511.22880.
An operating point is the tokens/s that an engine with adapters of one rank serves under the SLO. The demand of a rank
divided by its operating point is a fractional number of servers. Adapters of one rank are packed together, and can be
split over servers. Fractions go to servers with at least their rank, or else to new servers. Servers are assigned to
engines so that few bytes move. The router samples engines in proportion to the shares.

The sources here are the paper's abstract and a summary. The following choices are our own. Budgets are scaled to use
all servers. A rank fills the integer part of its budget with servers of its own. A fractional remainder keeps its own
rank's operating point, even on a server of higher rank, so that budgets fill the servers exactly. Memory, pins, the
minimum number of copies and adapters without traffic are handled as in the default policy.
"""

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from loraserve.messages import Placement
from loraserve.planner.placement.allocation import Allocation
from loraserve.planner.placement.balancing import MIN_SHARE
from loraserve.planner.placement.bins import assign_bins
from loraserve.planner.placement.problem import (
    CopyMap,
    CopyShares,
    Floats,
    PlanInput,
    Problem,
    build_problem,
    to_placements,
)
from loraserve.planner.placement.utilisation import predict_ttft_s

EPSILON = 1e-9
MIN_UTILISATION = 0.05
"""Utilisation to plan for if even an idle engine misses the SLO."""
BISECTION_STEPS = 40
MIN_TOKEN_S = 1e-12
"""Least cost of a token in seconds, which keeps operating points finite."""


def plan(inputs: PlanInput) -> tuple[Placement, ...]:
    """Return the copies that should exist. The router samples an engine in proportion to their shares."""
    problem = build_problem(inputs)
    if not problem.engines:
        return ()
    candidates = _find_fixed_points(problem, _pack_servers(problem))
    copies, parts = min(candidates, key=lambda found: _changed_bytes(problem, found[0]))
    return to_placements(problem, _copy_shares(copies, parts))


def operating_points(problem: Problem, ranks: Iterable[int]) -> dict[int, float]:
    """Return by rank the largest tokens/s at which an engine with only this rank meets the SLO (predicted P95 TTFT).

    Tokens include prefill and decode in the expected mix. Slab reads are ignored, because the number of adapters in a
    step depends on the placement.
    """
    return {rank: _operating_point(problem, rank) for rank in ranks}


def _operating_point(problem: Problem, rank: int) -> float:
    token_s, prefill_s = _token_costs_s(problem, rank)
    low, high = MIN_UTILISATION, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        ttft_s = float(predict_ttft_s(problem, np.array([middle]), np.array([prefill_s]))[0])
        low, high = (middle, high) if ttft_s <= problem.settings.slo_ttft_s else (low, middle)
    return low / token_s


def _token_costs_s(problem: Problem, rank: int) -> tuple[float, float]:
    """Return the seconds per token of the expected mix and the seconds per prefill of a mean prompt, at this rank."""
    work, cost = problem.work, problem.cost
    tokens = float(work.tokens_per_s.sum())
    decode = float(work.decode_tokens_per_s.sum())
    requests = max(float(work.requests_per_s.sum()), 1e-12)
    prompt, output = (tokens - decode) / requests, decode / requests
    padded = cost.lora == "padded"
    prefill_token_s = cost.prefill_token_s + prompt / 2 * cost.prefill_kv_token_s
    prefill_token_s += rank * (cost.padded_prefill_s if padded else cost.rank_token_s)
    decode_token_s = cost.sequence_s + cost.step_base_s / problem.batch + (prompt + output / 2) * cost.kv_token_s
    decode_token_s += rank * (cost.padded_decode_s if padded else cost.rank_token_s)
    all_s = (tokens - decode) * prefill_token_s + decode * decode_token_s
    return max(MIN_TOKEN_S, all_s / tokens), prompt * prefill_token_s


class _Server(msgspec.Struct):
    """A server to which no engine is assigned yet. ``parts``: by adapter, the fraction of its traffic there."""

    rank: int = 0
    used: float = 0.0
    parts: dict[int, float] = msgspec.field(default_factory=dict)


class _Piece(msgspec.Struct):
    """A fraction of an adapter's traffic (``part``) to be packed. ``servers``: the (fractional) servers it needs."""

    adapter: int
    rank: int
    part: float
    servers: float


Realisation = tuple[CopyMap, dict[tuple[int, int], float]]
"""Copies, and by (adapter, engine) the fraction of the adapter's traffic that was packed there."""


def _find_fixed_points(problem: Problem, servers: list[_Server]) -> list[Realisation]:
    """Call ``_realise`` with the copies of its last result until copies repeat. Return the results of the cycle.

    The cycle usually has one result, sometimes a few that alternate. There is a cycle because the number of possible
    results is finite. In practice it is reached within ten calls.
    """
    starts, found = [problem.current], [_realise(problem, servers, problem.current)]
    while found[-1][0] not in starts:
        starts.append(found[-1][0])
        found.append(_realise(problem, servers, starts[-1]))
    return found[starts.index(found[-1][0]) :]


def _changed_bytes(problem: Problem, copies: CopyMap) -> tuple[int, CopyMap]:
    """Return a sort key: the bytes of added and removed copies, then the copies to break ties.

    The bytes are 0 if ``copies`` equals the current copies. A candidate without changes is thus preferred.
    """
    pairs = enumerate(zip(problem.current, copies, strict=True))
    return sum(int(problem.extents[a]) * len(set(held) ^ set(new)) for a, (held, new) in pairs), copies


def _pack_servers(problem: Problem) -> list[_Server]:
    remainder, servers = [], []
    sizes = _server_budgets(problem)
    for rank in sorted(sizes, reverse=True):
        pieces = [_Piece(adapter=a, rank=rank, part=1.0, servers=size) for a, size in sizes[rank]]
        for _ in range(int(sum(piece.servers for piece in pieces) + EPSILON)):
            server = _Server(rank=rank)
            pieces = _fill_server(server, pieces)
            servers.append(server)
        remainder += pieces
    for piece in remainder:
        _pack_remainder(servers, piece, len(problem.engines))
    return servers + [_Server() for _ in range(len(problem.engines) - len(servers))]


def _server_budgets(problem: Problem) -> dict[int, list[tuple[int, float]]]:
    """Return by rank the adapters with traffic, each with the (fractional) number of servers that it needs."""
    tokens, ranks = problem.work.tokens_per_s, problem.ranks.tolist()
    used = np.flatnonzero(tokens > 0).tolist()
    points = operating_points(problem, {ranks[a] for a in used})
    total = sum(tokens[a] / points[ranks[a]] for a in used)
    sizes: dict[int, list[tuple[int, float]]] = {}
    for a in used:
        size = float(tokens[a]) / points[ranks[a]] / total * len(problem.engines)
        sizes.setdefault(ranks[a], []).append((a, size))
    return sizes


def _fill_server(server: _Server, pieces: list[_Piece]) -> list[_Piece]:
    """Put pieces on the server in order until it is full, and split the last one. Return the remaining pieces."""
    for i, piece in enumerate(pieces):
        left = _put_as_fits(server, piece)
        if left is not None:
            return [left, *pieces[i + 1 :]]
    return []


def _put_as_fits(server: _Server, piece: _Piece) -> _Piece | None:
    """Put as much of the piece on the server as fits. Return the piece that is left, or None if all fits."""
    fits = min(1.0, max(0.0, 1.0 - server.used) / piece.servers)
    if fits * piece.servers <= EPSILON:
        return piece
    _put(server, piece, fits)
    if (1 - fits) * piece.servers <= EPSILON:
        return None
    left = 1 - fits
    return _Piece(adapter=piece.adapter, rank=piece.rank, part=piece.part * left, servers=piece.servers * left)


def _put(server: _Server, piece: _Piece, fits: float) -> None:
    server.rank = max(server.rank, piece.rank)
    server.used += piece.servers * fits
    server.parts[piece.adapter] = server.parts.get(piece.adapter, 0.0) + piece.part * fits


def _pack_remainder(servers: list[_Server], piece: _Piece, max_servers: int) -> None:
    """Put the piece on servers whose rank is at least its rank, highest first. New servers get what does not fit."""
    left: _Piece | None = piece
    for server in sorted(servers, key=lambda s: -s.rank):
        if left is not None and server.rank >= piece.rank:
            left = _put_as_fits(server, left)
    while left is not None and len(servers) < max_servers:
        servers.append(_Server())
        left = _put_as_fits(servers[-1], left)
    if left is not None:  # Rounding errors can leave a small rest.
        _put(min(servers, key=lambda s: s.used), left, 1.0)


def _realise(problem: Problem, servers: list[_Server], held: CopyMap) -> Realisation:
    """Assign servers to engines. Return the copies that fit into memory, and the fraction packed for each copy."""
    engine_of = assign_bins(_kept_bytes(problem, servers, held)).tolist()
    parts = {(a, engine_of[i]): part for i, server in enumerate(servers) for a, part in server.parts.items()}
    allocation = Allocation(problem)
    engines_of: dict[int, list[int]] = {}
    for a, e in sorted(parts, key=lambda copy: (-parts[copy], copy)):
        engines_of.setdefault(a, []).append(e)
    for a in allocation.by_work:
        if a not in problem.pins:
            for e in engines_of.get(a, ()):
                allocation.add(a, e, parts[a, e])
    allocation.keep(held, idle_only=True)
    allocation.complete(held)
    return allocation.copies, parts


def _kept_bytes(problem: Problem, servers: list[_Server], held: CopyMap) -> Floats:
    kept = np.zeros((len(servers), len(problem.engines)))
    for i, server in enumerate(servers):
        for a in server.parts:
            kept[i, list(held[a])] += problem.extents[a]
    return kept


def _copy_shares(copies: CopyMap, parts: Mapping[tuple[int, int], float]) -> CopyShares:
    """Return the copies with shares in proportion to ``parts`` (packed fractions), but at least a minimum share."""
    adapters: list[int] = []
    engines: list[int] = []
    shares: list[float] = []
    for a, held in enumerate(copies):
        weights = [max(parts.get((a, e), 0.0), MIN_SHARE / len(held)) for e in held]
        adapters += [a] * len(held)
        engines += held
        shares += [weight / sum(weights) for weight in weights]
    return CopyShares(np.array(adapters, np.int64), np.array(engines, np.int64), np.array(shares, np.float64))
