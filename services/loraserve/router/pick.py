"""From scores to the engines that are asked, best first, and why. Pure."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from loraserve.cost import CostModel
from loraserve.router.choice import Candidate, Choice, Rng, Seconds
from loraserve.router.prices import Array
from loraserve.router.score import Scores, engine_seconds, own_seconds, prefill_tokens
from loraserve.router.table import PriceTable
from loraserve.router.view import ClusterView

MOST_CANDIDATES = 4
"""Whoever does not answer costs a second, and gateways do not wait for ever."""
NEAR = 0.05
"""Scores within this share of the best's time, or of a step, are a tie: the prediction's error is larger."""
LEAST_TIE_S = 5e-5
SUSPECT_S = 1e9
"""Added to the score of an engine that does not answer, or is drained: it is asked after all others."""


def near_ties(ranked: Array, best: int, scores: Scores, table: PriceTable, rng: Rng) -> list[int]:
    """The best by lot, so that equal engines share the load.

    Among near-ties a copy of the plan wins: a long queue makes what the plan is worth smaller than the tie.
    """
    tie_s = NEAR * max(scores.ttft_s.item(best), table.columns.decode_step_s.item(best)) + LEAST_TIE_S
    near = (ranked <= np.array(ranked.item(best) + tie_s)).nonzero()[0].tolist()
    return near if len(near) == 1 else by_lot(near, scores.shares, rng)


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


def choice_of(
    columns: Sequence[int], ranked: Array | None, view: ClusterView, table: PriceTable, scores: Scores, cost: CostModel
) -> Choice:
    """These and then the best by ``ranked``, each with its prediction and why. Who has the request already comes first.

    Others than the first are worked out when they are asked for, from what was known when the first was chosen.
    """
    first = _column_of_live(view, scores)
    if first is not None:
        why = "live"
    else:
        first = columns[0]
        why = "prefix" if _prefix_decided(first, table, scores, cost) else _why(first, scores)
    return Choice(_candidate(first, why, scores), partial(_others, first, columns, ranked, scores))


def _others(first: int, columns: Sequence[int], ranked: Array | None, scores: Scores) -> tuple[Candidate, ...]:
    more = _next_best(ranked, columns) if ranked is not None else []
    rest = [column for column in (*columns, *more) if column != first][: MOST_CANDIDATES - 1]
    return tuple(_candidate(column, _why(column, scores), scores) for column in rest)


def _candidate(column: int, why: str, scores: Scores) -> Candidate:
    parts = Seconds(
        scores.queue_s.item(column),
        scores.load_s.item(column),
        scores.own_s.item(column),
        scores.step_s.item(column),
        scores.engine_s.item(column),
    )
    return Candidate(scores.engines[column].name, scores.ttft_s.item(column), why, parts)


def _column_of_live(view: ClusterView, scores: Scores) -> int | None:
    live = view.live.get(scores.request.request_id)
    if live is None or live.engine not in view.engines:
        return None
    column = view.engines[live.engine].column
    return column if column >= 0 and scores.score[column] < np.inf else None


def _why(column: int, scores: Scores) -> str:
    if scores.request.adapter is None:
        return "base"
    if column in scores.near.resident or column in scores.near.begun:
        return "planned" if column in scores.shares else "resident"
    return "spill" if scores.near.resident else "load"


def _prefix_decided(column: int, table: PriceTable, scores: Scores, cost: CostModel) -> bool:
    """Whether it has some of the prompt, and another would be the best if nothing of it were there."""
    if column not in scores.saved_tokens:
        return False
    tokens = prefill_tokens(scores.request, table, {})
    _, own_s = own_seconds(scores.request, scores.near, table, cost, tokens)
    further_s = engine_seconds(scores.request, scores.near, table, cost, tokens) - scores.engine_s
    without = suspects_last(scores.score + (own_s - scores.own_s) + further_s * table.harm_weight, table)
    return bool(without[column] > without.min())
