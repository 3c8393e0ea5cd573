"""From scores to the engines that are asked, best first, and why. Pure."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import Route
from loraserve.router.choice import Candidate, Rng, Seconds
from loraserve.router.prices import Array
from loraserve.router.score import Scores, own_seconds
from loraserve.router.table import PriceTable
from loraserve.router.view import ClusterView

MOST_CANDIDATES = 4
"""Whoever does not answer costs a second, and gateways do not wait for ever."""
NEAR = 0.05
"""Scores within this share of the best's time, or of a step, are a tie: the prediction's error is larger."""
LEAST_TIE_S = 5e-5
SUSPECT_S = 1e9
"""Added to the score of an engine that does not answer, or is drained: it is asked after all others."""


def best_columns(scores: Scores, table: PriceTable, shares: Mapping[int, float], rng: Rng) -> list[int]:
    """By score, near-ties by lot so that equal engines share the load; suspects last.

    Among near-ties a copy of the plan wins: a long queue makes what the plan is worth smaller than the tie.
    """
    ranked = suspects_last(scores.score, table)
    best = int(ranked.argmin())
    tie_s = NEAR * max(scores.ttft_s.item(best), table.columns.decode_step_s.item(best)) + LEAST_TIE_S
    near = (ranked <= ranked.item(best) + tie_s).nonzero()[0].tolist()
    first = near if len(near) == 1 else by_lot(near, shares, rng)
    return first + _next_best(ranked, first) if len(first) < MOST_CANDIDATES else first


def suspects_last(score: Array, table: PriceTable) -> Array:
    return score + table.columns.avoided * SUSPECT_S if table.suspects else score


def by_lot(columns: Sequence[int], shares: Mapping[int, float], rng: Rng) -> list[int]:
    """At most as many as are asked: those with a share first, a larger one more often; without any, all alike."""
    planned = [column for column in columns if column in shares]
    if not planned:
        return _shuffled(columns, rng)
    # Each comes first with a probability in proportion to its share (Efraimidis and Spirakis, 2006).
    planned.sort(key=lambda column: rng.random() ** (1 / shares[column]), reverse=True)
    return [*planned, *(column for column in columns if column not in shares)][:MOST_CANDIDATES]


def _shuffled(columns: Sequence[int], rng: Rng) -> list[int]:
    """The first few of a random order."""
    rest = list(columns)
    count = min(len(rest), MOST_CANDIDATES)
    for place in range(count):
        other = place + int(rng.random() * (len(rest) - place))
        rest[place], rest[other] = rest[other], rest[place]
    return rest[:count]


def _next_best(ranked: Array, first: Sequence[int]) -> list[int]:
    """Those that come after the first; without those that are out of the question."""
    rest, found = ranked.copy(), list[int]()
    rest[first] = np.inf
    while len(first) + len(found) < MOST_CANDIDATES:
        column = int(rest.argmin())
        if rest.item(column) == np.inf:
            break
        found.append(column)
        rest[column] = np.inf
    return found


def candidates(
    columns: Sequence[int],
    request: Route,
    view: ClusterView,
    table: PriceTable,
    scores: Scores,
    shares: Mapping[int, float],
    cost: CostModel,
) -> tuple[Candidate, ...]:
    """These, each with its prediction and why. Who has the request already comes first."""
    live = _column_of_live(request, view, scores)
    if live is not None:
        columns = [live, *(column for column in columns if column != live)][:MOST_CANDIDATES]
    whys = ["base" for _ in columns] if request.adapter is None else _whys(columns, scores, shares)
    if live is not None:
        whys[0] = "live"
    elif columns[0] in scores.saved_tokens and _prefix_decided(columns[0], request, table, scores, cost):
        whys[0] = "prefix"
    return tuple(_candidate(column, why, table, scores) for column, why in zip(columns, whys, strict=True))


def _candidate(column: int, why: str, table: PriceTable, scores: Scores) -> Candidate:
    parts = Seconds(
        scores.queue_s.item(column),
        scores.load_s.item(column),
        scores.own_s.item(column),
        scores.step_s.item(column),
        scores.harm_s.item(column),
    )
    return Candidate(table.engines[column].name, scores.ttft_s.item(column), why, parts)


def _column_of_live(request: Route, view: ClusterView, scores: Scores) -> int | None:
    live = view.live.get(request.request_id)
    engine = view.engines.get(live.engine) if live is not None else None
    able = engine is not None and engine.column >= 0 and scores.score[engine.column] < np.inf
    return engine.column if engine is not None and able else None


def _whys(columns: Iterable[int], scores: Scores, shares: Mapping[int, float]) -> list[str]:
    held, absent = (*scores.near.resident, *scores.near.begun), "spill" if scores.near.resident else "load"
    return [("planned" if column in shares else "resident") if column in held else absent for column in columns]


def _prefix_decided(column: int, request: Route, table: PriceTable, scores: Scores, cost: CostModel) -> bool:
    """Whether another would be the best if nothing of the prompt were there."""
    _, own_s = own_seconds(request, scores.near, table, cost, float(len(request.prompt_tokens)))
    without = suspects_last(scores.score - scores.own_s + own_s, table)
    return bool(without[column] > without.min())
