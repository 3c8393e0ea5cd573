"""Sampling on the CPU: from the logits of each row to a token.

A token is a pure function of the row's logits, history, sampling parameters and output index. Nothing here keeps state
or looks at other rows, so a request gets the same tokens in any batch, after any preemption and on any engine. Names
and meanings are vLLM's. ``engine/cuda/sampling.py`` computes the same on a GPU.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams
from loraserve.messages.stop import forbidden_tokens

Row = NDArray[np.float32]

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy."""

BLOCK_TOKENS = 256
"""Drawing sums the weights in blocks of this many tokens: a running sum over the whole vocabulary is slow."""

GROUPS = 32

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample(logits: NDArray[np.float32], rows: Sequence[SequenceStep], eos_token_ids: Collection[int]) -> list[Sampled]:
    """Return one token per row of ``logits`` [rows, vocab], which may be overwritten."""
    return [_sample_row(row, step, eos_token_ids) for row, step in zip(logits, rows, strict=True)]


def _sample_row(logits: Row, step: SequenceStep, eos_token_ids: Collection[int]) -> Sampled:
    params = step.sampling
    changes = params.changes_logits(step.output_index)
    # Log-probabilities are the model's own: computed before penalties and temperature.
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
    """Apply the penalties: repetition counts prompt and output, presence and frequency count the output alone."""
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
    """Return the token at ``u`` of the cumulative distribution over the tokens that the filters leave."""
    largest = logits.max()
    if not np.isfinite(largest):
        return int(logits.argmax())
    weights = np.exp((logits - largest) / np.float32(params.temperature))
    tokens = _candidates(weights, params)
    if tokens is None:
        return _pick(weights, u)
    return int(tokens[_pick(weights[tokens], u)])


def _pick(weights: Row, u: float) -> int:
    """Return the index at ``u`` in [0, 1) of the cumulative weights: find the block, then the place in it."""
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
    # The target was rounded up to the total: take the last entry with a weight.
    return int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def _candidates(weights: Row, params: SamplingParams) -> NDArray[np.intp] | None:
    """Return the tokens that min_p, top_k and top_p leave, applied in this order, most likely first; None for all.

    The largest of ``weights`` is 1, so min_p is the smallest weight that passes.
    """
    top_k = params.top_k if 0 < params.top_k < len(weights) else 0
    if not top_k and params.top_p >= 1.0 and params.min_p <= 0.0:
        return None
    floor = np.float32(params.min_p)
    total = float(weights.sum(dtype=np.float64) if floor <= 0 else weights[weights >= floor].sum(dtype=np.float64))
    if top_k:
        floor = max(floor, _lower_bound_of_largest(weights, top_k))
    elif params.top_p < 1.0:
        # Tokens below this weight sum to less than what top_p cuts off, so they need not be sorted.
        floor = max(floor, np.float32(0.99 * (1.0 - params.top_p) * total / len(weights)))
    tokens = np.flatnonzero(weights >= floor)
    # Ties go to the smaller id, so that exactly top_k tokens are left.
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
    if top_k:
        tokens = tokens[:top_k]
        total = float(weights[tokens].sum(dtype=np.float64))
    if params.top_p < 1.0:
        cumulative = np.cumsum(weights[tokens], dtype=np.float64)
        tokens = tokens[: np.searchsorted(cumulative, params.top_p * total, side="left") + 1]
    return tokens


def _largest(row: Row, count: int) -> list[int]:
    """Return the indices of the ``count`` largest entries, largest first, ties by index."""
    count = min(count, len(row))
    if count <= 0:
        return []
    tokens = np.flatnonzero(row >= _lower_bound_of_largest(row, count))
    return [int(token) for token in tokens[np.argsort(-row[tokens], kind="stable")][:count]]


def _lower_bound_of_largest(row: Row, count: int) -> np.float32:
    """Return a value that at least ``count`` entries reach, and few more: computed from the maxima of groups."""
    width = len(row) // GROUPS
    values = row[: width * GROUPS].reshape(GROUPS, width).max(axis=0) if width >= count else row
    return np.float32(np.partition(values, len(values) - count)[len(values) - count])


def _log_sum_exp(row: Row) -> float:
    largest = row.max()
    return float(largest) + float(np.log(np.exp(row - largest).sum(dtype=np.float64)))


def uniform(seed: int, index: int) -> float:
    """Return a pseudorandom number in [0, 1) that depends on seed and index alone (SplitMix64)."""
    return (_mix(_mix((seed & _MASK64) + _GOLDEN) + (index + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
