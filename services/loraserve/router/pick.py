"""From scores to the engines that are asked, best first, and why. Pure."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import Route
from loraserve.router.choice import Candidate, Rng, Seconds
from loraserve.router.prices import Array, PriceTable
from loraserve.router.score import Scores, own_seconds
from loraserve.router.view import ClusterView

MOST_CANDIDATES = 8
NEAR = 0.05
"""Scores within this share of the best's time, or of a step, are a tie: the prediction's error is larger."""
LEAST_TIE_S = 5e-5
SUSPECT_S = 1e9
"""Added to the score of an engine that does not answer: it is asked after all others."""


def best_columns(scores: Scores, table: PriceTable, shares: Mapping[int, float], rng: Rng) -> list[int]:
    """By score, near-ties by lot so that equal engines share the load; suspects last.

    Among near-ties a copy of the plan wins: a long queue makes what the plan is worth smaller than the tie.
    """
    ranked = suspects_last(scores.score, table)
    best = int(ranked.argmin())
    tie_s = max(NEAR * max(scores.ttft_s[best], table.columns.decode_step_s[best]), LEAST_TIE_S)
    near = (ranked <= ranked[best] + tie_s).nonzero()[0].tolist()
    first = near if len(near) == 1 else by_lot(near, shares, rng)
    if len(first) >= MOST_CANDIDATES:
        return first
    return first + [column for column in _smallest(ranked) if column not in first]


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


def _smallest(ranked: Array) -> list[int]:
    """The columns with the smallest values, in order; without those that are out of the question."""
    count = min(len(ranked), MOST_CANDIDATES)
    columns: list[int] = ranked.argpartition(count - 1)[:count].tolist()
    values = ranked[columns].tolist()
    return [column for value, column in sorted(zip(values, columns, strict=True)) if value < np.inf]


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
    version = request.adapter.version if request.adapter is not None else ""
    whys = _whys(columns, version, view, table, shares)
    if live is not None:
        whys[0] = "live"
    elif columns[0] in scores.saved_tokens and _prefix_decided(columns[0], request, view, table, scores, cost):
        whys[0] = "prefix"
    return tuple(_candidate(column, why, table, scores) for column, why in zip(columns, whys, strict=True))


def _candidate(column: int, why: str, table: PriceTable, scores: Scores) -> Candidate:
    parts = Seconds(
        float(scores.queue_s[column]),
        float(scores.load_s[column]),
        float(scores.own_s[column]),
        float(scores.step_s[column]),
        float(scores.harm_s[column]),
    )
    return Candidate(table.engines[column].name, float(scores.ttft_s[column]), why, parts)


def _column_of_live(request: Route, view: ClusterView, scores: Scores) -> int | None:
    live = view.live.get(request.request_id)
    engine = view.engines.get(live.engine) if live is not None else None
    able = engine is not None and engine.column >= 0 and scores.score[engine.column] < np.inf
    return engine.column if engine is not None and able else None


def _whys(
    columns: Iterable[int], version: str, view: ClusterView, table: PriceTable, shares: Mapping[int, float]
) -> list[str]:
    if not version:
        return ["base" for _ in columns]
    near = view.near(version)
    held = any(engine.column >= 0 and version in engine.resident for engine in near.values())
    absent = "spill" if held else "load"
    whys = []
    for column in columns:
        engine = table.engines[column]
        has_it = engine.name in near and (version in engine.resident or version in engine.loading)
        whys.append(("planned" if column in shares else "resident") if has_it else absent)
    return whys


def _prefix_decided(
    column: int, request: Route, view: ClusterView, table: PriceTable, scores: Scores, cost: CostModel
) -> bool:
    """Whether another would be the best if nothing of the prompt were there."""
    _, own_s = own_seconds(request, view, table, cost, float(len(request.prompt_tokens)))
    without = suspects_last(scores.score - scores.own_s + own_s, table)
    return bool(without[column] > without.min())
