"""Operating points: what an engine sustains under the SLO when all it serves is of one rank. Pure.

Derived from the cost model and the mix of prompts and outputs that is expected, never typed in.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement
from loraserve.planner.placement.allocation import Holdings
from loraserve.planner.placement.assignment import relabel
from loraserve.planner.placement.balancing import LEAST_SHARE
from loraserve.planner.placement.problem import Copies, Floats, Pieces, PlanSettings, Problem, placements, problem_of
from loraserve.planner.placement.utilisation import ttft_of

LEAST_UTILISATION = 0.05
"""Where the SLO cannot be kept even by an idle engine, engines are planned this full rather than not at all."""
HALVINGS = 40
LEAST_TOKEN_S = 1e-12
"""Where the cost model says that tokens cost nothing, an engine is still not without end."""


def operating_points(problem: Problem, ranks: Iterable[int]) -> dict[int, float]:
    """By rank, tokens/s of prefill and decode together at which the predicted P95 TTFT is the SLO.

    Bytes of slabs are left out: how many adapters share a step depends on the placement.
    """
    return {rank: _operating_point(problem, rank) for rank in ranks}


def _operating_point(problem: Problem, rank: int) -> float:
    token_s, prefill_s = _costs(problem, rank)
    low, high = LEAST_UTILISATION, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        predicted_s = float(ttft_of(problem, np.array([middle]), np.array([prefill_s]))[0])
        low, high = (middle, high) if predicted_s <= problem.settings.slo_ttft_s else (low, middle)
    return low / token_s


def _costs(problem: Problem, rank: int) -> tuple[float, float]:
    """Of a token of the expected mix, the engine's time; and of a request, its prefill. Seconds, at that rank."""
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
    return max(LEAST_TOKEN_S, all_s / tokens), prompt * prefill_token_s


NOTHING = 1e-9


class _Server(msgspec.Struct):
    """``parts``: by adapter, of its traffic. ``used``: of the server."""

    rank: int = 0
    used: float = 0.0
    parts: dict[int, float] = msgspec.field(default_factory=dict)


class _Piece(msgspec.Struct):
    """Traffic that needs a place; ``part`` of the adapter's, ``servers`` full of it at its own rank."""

    adapter: int
    rank: int
    part: float
    servers: float


Realised = tuple[Copies, dict[tuple[int, int], float]]
"""Copies, and by adapter and engine the part of the adapter's traffic that is meant for it."""


def plan(
    demand: Sequence[AdapterDemand],
    adapters: Mapping[str, AdapterRef],
    engines: Sequence[EngineLoad],
    current: Sequence[Placement],
    cost: CostModel,
    settings: PlanSettings,
) -> tuple[Placement, ...]:
    """Copies by (version, engine) with the shares that requests are to be sampled by."""
    problem = problem_of(demand, adapters, engines, current, cost, settings)
    if not problem.engines:
        return ()
    copies, parts = min(_settled(problem, _pack(problem)), key=lambda found: _change(problem, found[0]))
    return placements(problem, _pieces(copies, parts))


def _settled(problem: Problem, servers: list[_Server]) -> list[Realised]:
    """What realising again and again comes to, each from the one before: mostly one that follows from itself, at times
    a few that take turns for ever. There are finitely many, so that one comes twice; it does within ten."""
    helds, found = [problem.current], [_realise(problem, servers, problem.current)]
    while found[-1][0] not in helds:
        helds.append(found[-1][0])
        found.append(_realise(problem, servers, helds[-1]))
    return found[helds.index(found[-1][0]) :]


def _change(problem: Problem, copies: Copies) -> tuple[int, Copies]:
    """Bytes of copies that come and go. What is in force has none: where it is one of those, it stays."""
    pairs = enumerate(zip(problem.current, copies, strict=True))
    return sum(int(problem.extents[a]) * len(set(held) ^ set(new)) for a, (held, new) in pairs), copies


def _pack(problem: Problem) -> list[_Server]:
    """As many servers as engines, by rank; which engine is which is open yet."""
    left, servers = [], []
    sizes = _budgets(problem)
    for rank in sorted(sizes, reverse=True):
        line = [_Piece(adapter=a, rank=rank, part=1.0, servers=size) for a, size in sizes[rank]]
        for _ in range(int(sum(piece.servers for piece in line) + NOTHING)):
            server = _Server(rank=rank)
            line = _fill(server, line)
            servers.append(server)
        left += line
    for piece in left:
        _overflow(servers, piece, len(problem.engines))
    return servers + [_Server() for _ in range(len(problem.engines) - len(servers))]


def _budgets(problem: Problem) -> dict[int, list[tuple[int, float]]]:
    """By rank its adapters, with the servers that each is to have."""
    tokens, ranks = problem.work.tokens_per_s, problem.ranks.tolist()
    asked = np.flatnonzero(tokens > 0).tolist()
    points = operating_points(problem, {ranks[a] for a in asked})
    total = sum(tokens[a] / points[ranks[a]] for a in asked)
    sizes: dict[int, list[tuple[int, float]]] = {}
    for a in asked:
        size = float(tokens[a]) / points[ranks[a]] / total * len(problem.engines)
        sizes.setdefault(ranks[a], []).append((a, size))
    return sizes


def _fill(server: _Server, line: list[_Piece]) -> list[_Piece]:
    """Pieces in order until the server is full, the last one split; what is left of them."""
    for i, piece in enumerate(line):
        rest = _take(server, piece)
        if rest is not None:
            return [rest, *line[i + 1 :]]
    return []


def _take(server: _Server, piece: _Piece) -> _Piece | None:
    """Puts as much of the piece as fits; what does not is the answer."""
    fits = min(1.0, max(0.0, 1.0 - server.used) / piece.servers)
    if fits * piece.servers <= NOTHING:
        return piece
    _put(server, piece, fits)
    if (1 - fits) * piece.servers <= NOTHING:
        return None
    rest = 1 - fits
    return _Piece(adapter=piece.adapter, rank=piece.rank, part=piece.part * rest, servers=piece.servers * rest)


def _put(server: _Server, piece: _Piece, fits: float) -> None:
    server.rank = max(server.rank, piece.rank)
    server.used += piece.servers * fits
    server.parts[piece.adapter] = server.parts.get(piece.adapter, 0.0) + piece.part * fits


def _overflow(servers: list[_Server], piece: _Piece, most: int) -> None:
    """To servers that hold a rank as high, the highest first, as far as they have room; then to a new one."""
    rest: _Piece | None = piece
    for server in sorted(servers, key=lambda s: -s.rank):
        if rest is not None and server.rank >= piece.rank:
            rest = _take(server, rest)
    while rest is not None and len(servers) < most:
        servers.append(_Server())
        rest = _take(servers[-1], rest)
    if rest is not None:  # Rounding.
        _put(min(servers, key=lambda s: s.used), rest, 1.0)


def _realise(problem: Problem, servers: list[_Server], held: Copies) -> Realised:
    """Servers become engines; copies as memory allows, and the parts of traffic that were meant for them."""
    engine_of = relabel(_kept_bytes(problem, servers, held)).tolist()
    parts = {(a, engine_of[i]): part for i, server in enumerate(servers) for a, part in server.parts.items()}
    holdings = Holdings(problem)
    by_adapter: dict[int, list[int]] = {}
    for a, e in sorted(parts, key=lambda at: (-parts[at], at)):
        by_adapter.setdefault(a, []).append(e)
    for a in holdings.by_weight:
        if a not in problem.pins:
            for e in by_adapter.get(a, ()):
                holdings.put(a, e, parts[a, e])
    holdings.stay(held, asked=False)
    holdings.complete(held)
    return holdings.copies, parts


def _kept_bytes(problem: Problem, servers: list[_Server], held: Copies) -> Floats:
    kept = np.zeros((len(servers), len(problem.engines)))
    for i, server in enumerate(servers):
        for a in server.parts:
            kept[i, list(held[a])] += problem.extents[a]
    return kept


def _pieces(copies: Copies, parts: Mapping[tuple[int, int], float]) -> Pieces:
    """Shares are the parts; a copy that no traffic was meant for gets next to none beside one that it was."""
    adapters: list[int] = []
    engines: list[int] = []
    shares: list[float] = []
    for a, held in enumerate(copies):
        meant = [max(parts.get((a, e), 0.0), LEAST_SHARE / len(held)) for e in held]
        adapters += [a] * len(held)
        engines += held
        shares += [part / sum(meant) for part in meant]
    return Pieces(np.array(adapters, np.int64), np.array(engines, np.int64), np.array(shares, np.float64))
