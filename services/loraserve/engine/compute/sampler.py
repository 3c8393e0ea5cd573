"""Sampling on the CPU: chooses one token per row of logits.

A token depends only on the row's logits, history, sampling parameters and output index. Batching, preemption and the
choice of the engine do not affect it. The sampling parameters have the same meaning as in vLLM.
``engine/cuda/sampling.py`` applies the same rules on a GPU.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams
from loraserve.messages.stop import forbidden_tokens

Row = NDArray[np.float32]

GREEDY_BELOW = 1e-5
"""Temperatures below this select the token with the largest logit."""

BLOCK_TOKENS = 256
"""Block size of the sums in ``_pick``. A running sum over the whole vocabulary would be slow."""

GROUPS = 32

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample(logits: NDArray[np.float32], rows: Sequence[SequenceStep], eos_token_ids: Collection[int]) -> list[Sampled]:
    """Sample one token per row of ``logits`` [rows, vocab]. ``rows`` are the sequences. May overwrite ``logits``."""
    return [_sample_row(row, step, eos_token_ids) for row, step in zip(logits, rows, strict=True)]


def _sample_row(logits: Row, step: SequenceStep, eos_token_ids: Collection[int]) -> Sampled:
    params = step.sampling
    changes = params.changes_logits(step.output_index)
    # Log-probabilities are computed from the raw logits, before penalties and temperature.
    log_normalizer = _log_sum_exp(logits) if params.logprobs is not None else 0.0
    raw = logits.copy() if params.logprobs is not None and changes else logits
    if changes:
        logits[forbidden_tokens(params, step.output_index, eos_token_ids, len(logits))] = -np.inf
        _penalize(logits, step)
    if params.temperature < GREEDY_BELOW:
        token = int(logits.argmax())
    else:
        token = _draw(logits, params, uniform(params.seed, step.output_index))
    if params.logprobs is None:
        return Sampled(request_id=step.request_id, token=token)
    top = tuple((t, float(raw[t]) - log_normalizer) for t in _largest(raw, params.logprobs))
    return Sampled(request_id=step.request_id, token=token, logprob=float(raw[token]) - log_normalizer, top=top)


def _penalize(logits: Row, step: SequenceStep) -> None:
    """Apply the repetition penalty to prompt and output tokens, the other penalties to output tokens only."""
    params = step.sampling
    history = np.asarray(step.history, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(history)
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        seen, counts = np.unique(history[step.prompt_length :], return_counts=True)
        logits[seen] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)


def _draw(logits: Row, params: SamplingParams, u: float) -> int:
    """Draw a token from those that pass min_p, top_k and top_p. ``u`` in [0, 1) is the random number."""
    largest = logits.max()
    if not np.isfinite(largest):
        return int(logits.argmax())
    weights = np.exp((logits - largest) / np.float32(params.temperature))
    tokens = _candidates(weights, params)
    if tokens is None:
        return _pick(weights, u)
    return int(tokens[_pick(weights[tokens], u)])


def _pick(weights: Row, u: float) -> int:
    """Return the first index whose cumulative weight exceeds ``u`` times the total, for ``u`` in [0, 1)."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK_TOKENS)).astype(np.float64)
    ends = np.cumsum(sums)
    target = u * ends[-1]
    block = _first_beyond(ends, target)
    start = block * BLOCK_TOKENS
    inner = np.cumsum(weights[start : start + BLOCK_TOKENS], dtype=np.float64)
    fraction = (target - ends[block] + sums[block]) / sums[block]
    return start + _first_beyond(inner, fraction * inner[-1])


def _first_beyond(cumulative: NDArray[np.float64], target: float) -> int:
    index = int(np.searchsorted(cumulative, target, side="right"))
    if index < len(cumulative):
        return index
    # Rounding made the target equal to the total. Return the last entry with a nonzero weight.
    return int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def _candidates(weights: Row, params: SamplingParams) -> NDArray[np.intp] | None:
    """Apply min_p, top_k and top_p in this order. Return the remaining tokens, most likely first, or None for all.

    ``weights`` are scaled so that the largest is 1. A token passes min_p if its weight is at least min_p.
    """
    top_k = params.top_k if 0 < params.top_k < len(weights) else 0
    if not top_k and params.top_p >= 1.0 and params.min_p <= 0.0:
        return None
    floor = np.float32(params.min_p)
    total = float(weights.sum(dtype=np.float64) if floor <= 0 else weights[weights >= floor].sum(dtype=np.float64))
    if top_k:
        floor = max(floor, _lower_bound_of_largest(weights, top_k))
    elif params.top_p < 1.0:
        # The tokens below this weight sum to less than 1 - top_p of the total, so top_p removes them all.
        floor = max(floor, np.float32(0.99 * (1.0 - params.top_p) * total / len(weights)))
    tokens = np.flatnonzero(weights >= floor)
    # The sort is stable, so of equal weights the smaller token id comes first.
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
    if top_k:
        tokens = tokens[:top_k]
        total = float(weights[tokens].sum(dtype=np.float64))
    if params.top_p < 1.0:
        cumulative = np.cumsum(weights[tokens], dtype=np.float64)
        tokens = tokens[: np.searchsorted(cumulative, params.top_p * total, side="left") + 1]
    return tokens


def _largest(row: Row, count: int) -> list[int]:
    """Return the indices of the ``count`` largest entries in descending order. Equal entries are ordered by index."""
    count = min(count, len(row))
    if count <= 0:
        return []
    tokens = np.flatnonzero(row >= _lower_bound_of_largest(row, count))
    return [int(token) for token in tokens[np.argsort(-row[tokens], kind="stable")][:count]]


def _lower_bound_of_largest(row: Row, count: int) -> np.float32:
    """Return a lower bound of the ``count``-th largest entry, computed from the maxima of groups."""
    width = len(row) // GROUPS
    values = row[: width * GROUPS].reshape(GROUPS, width).max(axis=0) if width >= count else row
    return np.float32(np.partition(values, len(values) - count)[len(values) - count])


def _log_sum_exp(row: Row) -> float:
    largest = row.max()
    return float(largest) + float(np.log(np.exp(row - largest).sum(dtype=np.float64)))


def uniform(seed: int, index: int) -> float:
    """Return a pseudorandom number in [0, 1) that depends only on ``seed`` and ``index`` (SplitMix64)."""
    return (_mix(_mix((seed & _MASK64) + _GOLDEN) + (index + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
