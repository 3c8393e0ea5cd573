"""Operating points: what an engine sustains under the SLO when all it serves is of one rank. Pure.

Derived from the cost model and the mix of prompts and outputs that is expected, never typed in.
"""

from collections.abc import Iterable

import numpy as np

from loraserve.planner.problem import Problem
from loraserve.planner.utilisation import ttft_of

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
