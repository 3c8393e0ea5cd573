"""Sampling on the device. It applies the rules of ``engine/compute/sampler.py`` to all rows of a batch at once.

``prepare`` groups the rows by sampling method on the host and sends all parameters in one copy. ``draw`` thus knows the
sizes of the groups and never waits for the device. The next step can be launched before a token is known.

A row gets the same token in any batch, because each row is computed independently and sums use integers. The order in
which a kernel adds integers does not change their sum.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraserve.engine.compute.sampler import BLOCK_TOKENS, GREEDY_BELOW, uniform
from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams
from loraserve.messages.stop import forbidden_tokens

MAX_VOCAB = (1 << 19) - 1
"""Maximum vocabulary size. Weights are integers up to 2^44, and the sum over a row must fit into int64."""

NARROW = 1024
"""To find up to this many of the largest values, ``topk`` is used. For more, the row is sorted."""

WEIGHT_ONE = 2.0**44
"""Integer weight of a row's most likely token. Tokens that are more than 2^44 times less likely get weight 0."""

Array = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """Parameters of a group of rows that are sampled with the same method.

    ``rows`` int64 [n] holds indices into the batch. ``width`` is the maximum number of tokens to draw from. The other
    fields are float64 [n, 1]. ``u`` in [0, 1) is the random number. An unset ``top_k`` is the vocabulary's size.
    """

    rows: Tensor
    width: int
    u: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class LogitChanges:
    """Changes to logits before sampling. ``rows`` int64 [n] holds the batch indices of the rows with changes.

    ``forbidden``, ``repeated`` and ``output`` are int64 indices into the flattened logits [n, vocab] of these rows.
    Forbidden tokens are never drawn. Repeated ones get the repetition penalty, output ones the other penalties.
    ``repetition``, ``presence`` and ``frequency`` are the penalties, float64 [n].
    """

    rows: Tensor
    forbidden: Tensor
    repeated: Tensor
    output: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class SamplingInputs:
    """All inputs of ``draw`` except the logits. Greedy rows are in none of ``plain``, ``narrow`` and ``wide``.

    ``plain`` rows have no filters, ``narrow`` rows have a top_k of at most NARROW, and ``wide`` rows have filters that
    need a sort. ``asked`` int64 [n] holds the rows that return log-probabilities. ``most`` is the largest number of top
    tokens that a row requests.
    """

    rows: int
    vocab: int
    plain: Draws
    narrow: Draws
    wide: Draws
    changes: LogitChanges
    asked: Tensor
    most: int


def prepare(
    rows: Sequence[SequenceStep], vocab: int, eos_token_ids: Collection[int], device: torch.device
) -> SamplingInputs:
    """Return the inputs of ``draw`` for logits [len(rows), vocab]. Does not wait for the copy to the device."""
    assert 0 < vocab <= MAX_VOCAB, vocab
    narrow_width = max((_narrow_k(step.sampling, vocab) for step in rows), default=0)
    groups = [_group(step.sampling, vocab) for step in rows]
    members = [[row for row, own in enumerate(groups) if own == group] for group in ("plain", "narrow", "wide")]
    asked = [row for row, step in enumerate(rows) if step.sampling.logprobs is not None]
    parts = [*(_draw_arrays(rows, group, vocab) for group in members), _change_arrays(rows, vocab, eos_token_ids)]
    sent = iter(_upload([*chain.from_iterable(parts), _integers(asked)], device))
    plain, narrow, wide = (
        Draws(next(sent), width, *next(sent).unsqueeze(2).unbind()) for width in (vocab, narrow_width, vocab)
    )
    return SamplingInputs(
        rows=len(rows),
        vocab=vocab,
        plain=plain,
        narrow=narrow,
        wide=wide,
        changes=LogitChanges(next(sent), next(sent), next(sent), next(sent), *next(sent).unbind()),
        asked=next(sent),
        most=min(max((step.sampling.logprobs or 0 for step in rows), default=0), vocab),
    )


def _group(params: SamplingParams, vocab: int) -> str:
    if params.temperature < GREEDY_BELOW:
        return "greedy"
    if _narrow_k(params, vocab):
        return "narrow"
    filters = 0 < params.top_k < vocab or params.top_p < 1.0 or params.min_p > 0.0
    return "wide" if filters else "plain"


def _narrow_k(params: SamplingParams, vocab: int) -> int:
    """Return top_k if it is set, below ``vocab`` and at most NARROW, else 0."""
    return params.top_k if 0 < params.top_k < vocab and params.top_k <= NARROW else 0


def _draw_arrays(rows: Sequence[SequenceStep], group: list[int], vocab: int) -> list[Array]:
    """Return the arrays for the Draws of one group of rows: ``rows`` [n] and the five float fields [5, n]."""
    values = [_draw_values(rows[row], vocab) for row in group]
    return [_integers(group), np.array(values, dtype=np.float64).reshape(-1, 5).T]


def _draw_values(step: SequenceStep, vocab: int) -> tuple[float, ...]:
    p = step.sampling
    top_k = p.top_k if 0 < p.top_k < vocab else vocab
    return uniform(p.seed, step.output_index), p.temperature, top_k, min(p.top_p, 1.0), p.min_p


def _change_arrays(rows: Sequence[SequenceStep], vocab: int, eos_token_ids: Collection[int]) -> list[Array]:
    """Return arrays for LogitChanges in the order of its fields. The three penalties form one array [3, n]."""
    changed = [row for row, step in enumerate(rows) if step.sampling.changes_logits(step.output_index)]
    steps = [rows[row] for row in changed]
    penalties = [
        (s.sampling.repetition_penalty, s.sampling.presence_penalty, s.sampling.frequency_penalty) for s in steps
    ]
    return [
        _integers(changed),
        _flat((forbidden_tokens(s.sampling, s.output_index, eos_token_ids, vocab) for s in steps), vocab),
        _flat((s.history if s.sampling.repetition_penalty != 1.0 else () for s in steps), vocab),
        _flat((s.history[s.prompt_length :] if _counts_output(s) else () for s in steps), vocab),
        np.array(penalties, dtype=np.float64).reshape(-1, 3).T,
    ]


def _counts_output(step: SequenceStep) -> bool:
    return step.sampling.presence_penalty != 0.0 or step.sampling.frequency_penalty != 0.0


def _flat(tokens: Iterable[Sequence[int]], vocab: int) -> NDArray[np.int64]:
    """Convert the tokens of all rows to one array of indices into flattened logits [rows, vocab]."""
    return np.concatenate([_integers(own) + row * vocab for row, own in enumerate(tokens)] or [_integers(())])


def _integers(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Copy arrays with 8-byte items to the device in one transfer. Returns tensors of the same shapes."""
    sizes = [array.size for array in arrays]
    # Only copies from pinned memory are asynchronous. torch reuses that memory only after the copy.
    packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda" and sum(sizes) > 0)
    np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.int64) for array in arrays], out=packed.numpy())
    parts = torch.split_with_sizes(packed.to(device, non_blocking=True), sizes)
    return [
        (part.view(torch.float64) if array.dtype == np.float64 else part).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


Picker = Callable[[Tensor, Draws], Tensor]


class Drawn(NamedTuple):
    """Sampling results on the device. All but ``tokens`` int64 [rows] are None if no row wants log-probabilities.

    ``logprobs`` is float32 [rows]. ``top_tokens`` int64 and ``top_logprobs`` float32 are [rows, k] for the largest
    requested k, most likely tokens first. Rows that do not want log-probabilities hold zeros.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


def draw(logits: Tensor, inputs: SamplingInputs) -> Drawn:
    """Sample one token per row of ``logits`` [rows, vocab] of any floating dtype. ``logits`` is not changed."""
    assert logits.shape == (inputs.rows, inputs.vocab), logits.shape
    changed = _change(logits, inputs.changes)
    greedy = changed.argmax(dim=1)
    tokens = greedy
    pickers: tuple[tuple[Draws, Picker], ...] = (
        (inputs.plain, _pick_from_all),
        (inputs.narrow, _pick_from_most_likely),
        (inputs.wide, _pick_from_most_likely),
    )
    for draws, pick in pickers:
        if len(draws.rows):
            drawn = _draw_group(changed, greedy, draws, pick)
            tokens = tokens.index_copy(0, draws.rows, drawn)
    return _with_logprobs(logits, tokens, inputs) if len(inputs.asked) else Drawn(tokens)


def sampled(
    rows: Sequence[SequenceStep],
    tokens: NDArray[np.int64],
    logprobs: NDArray[np.float32] | None = None,
    top_tokens: NDArray[np.int64] | None = None,
    top_logprobs: NDArray[np.float32] | None = None,
) -> list[Sampled]:
    """Return one Sampled per row from host copies of the fields of ``Drawn``."""
    if logprobs is None or top_tokens is None or top_logprobs is None:
        return [Sampled(request_id=s.request_id, token=token) for s, token in zip(rows, tokens.tolist(), strict=True)]
    best = zip(top_tokens.tolist(), top_logprobs.tolist(), strict=True)
    values = zip(rows, tokens.tolist(), logprobs.tolist(), best, strict=True)
    return [_sampled(step, token, logprob, *top) for step, token, logprob, top in values]


def _sampled(step: SequenceStep, token: int, logprob: float, top: list[int], top_logprobs: list[float]) -> Sampled:
    asked = step.sampling.logprobs
    if asked is None:
        return Sampled(request_id=step.request_id, token=token)
    pairs = tuple(zip(top, top_logprobs, strict=True))[: max(asked, 0)]
    return Sampled(request_id=step.request_id, token=token, logprob=logprob, top=pairs)


def _change(logits: Tensor, changes: LogitChanges) -> Tensor:
    """Apply forbidden tokens and penalties. Returns float32 if any row changes, else ``logits`` itself."""
    if not len(changes.rows):
        return logits
    values = logits.index_select(0, changes.rows).float()
    flat, vocab = values.view(-1), logits.shape[1]
    flat.scatter_(0, changes.forbidden, -torch.inf)
    _penalize_repetition(flat, changes, vocab)
    _penalize_output(flat, changes, vocab)
    return logits.float().index_copy(0, changes.rows, values)


def _penalize_repetition(flat: Tensor, changes: LogitChanges, vocab: int) -> None:
    # Read all values before writing, so that a repeated token is penalised only once.
    values = flat.gather(0, changes.repeated)
    penalty = changes.repetition.float().gather(0, changes.repeated // vocab)
    flat.scatter_(0, changes.repeated, torch.where(values > 0, values / penalty, values * penalty))


def _penalize_output(flat: Tensor, changes: LogitChanges, vocab: int) -> None:
    counts = torch.zeros_like(flat, dtype=torch.int32)
    counts.scatter_add_(0, changes.output, torch.ones_like(changes.output, dtype=torch.int32))
    row = changes.output // vocab
    frequency, presence = changes.frequency.gather(0, row), changes.presence.gather(0, row)
    penalty = frequency * counts.gather(0, changes.output) + presence
    flat.scatter_(0, changes.output, flat.gather(0, changes.output) - penalty.float())


def _draw_group(logits: Tensor, greedy: Tensor, draws: Draws, pick: Picker) -> Tensor:
    """Sample int64 tokens [n] for one group. Rows whose largest logit is not finite get the greedy token."""
    values = logits.index_select(0, draws.rows).float()
    largest = values.amax(dim=1, keepdim=True)
    weights = ((values - largest) / draws.temperature.float()).exp()
    tokens = pick(weights, draws).squeeze(1)
    return torch.where(largest.squeeze(1).isfinite(), tokens, greedy.index_select(0, draws.rows))


def _pick_from_all(weights: Tensor, draws: Draws) -> Tensor:
    """Draw tokens [n, 1] from the whole vocabulary. Find a block of BLOCK_TOKENS tokens, then a token in it.

    This is faster than a cumulative sum over the whole vocabulary, which makes several passes over memory.
    """
    integers = torch.nn.functional.pad(_integer_weights(weights), (0, -weights.shape[1] % BLOCK_TOKENS))
    blocks = integers.view(len(weights), -1, BLOCK_TOKENS)
    sums = blocks.sum(dim=2)
    ends = sums.cumsum(dim=1)
    target = _target(draws.u, ends[:, -1:])
    block = _first_beyond(ends, target)
    inner = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK_TOKENS)).squeeze(1).cumsum(dim=1)
    start = ends.gather(1, block) - sums.gather(1, block)
    return block * BLOCK_TOKENS + _first_beyond(inner, target - start)


def _pick_from_most_likely(weights: Tensor, draws: Draws) -> Tensor:
    """Draw tokens [n, 1] from those that pass min_p, top_k and top_p."""
    weights, tokens = largest_first(weights, draws.width)
    left = weights >= draws.min_p.float()
    left &= torch.arange(draws.width, device=weights.device) < draws.top_k
    sums = _integer_weights(weights).masked_fill(~left, 0).cumsum(dim=1)
    # The token whose cumulative weight reaches top_p is the last candidate.
    last = _clamped(torch.searchsorted(sums, (draws.top_p * sums[:, -1:]).ceil().long()), draws.width)
    return tokens.gather(1, _first_beyond(sums, _target(draws.u, sums.gather(1, last))))


def _integer_weights(weights: Tensor) -> Tensor:
    """Scale float32 weights of at most 1 by WEIGHT_ONE (2^44) and convert them to int64."""
    return (weights * WEIGHT_ONE).long()


def _target(u: Tensor, total: Tensor) -> Tensor:
    """Return ``u`` times ``total`` as int64. It is below ``total``, because ``u`` has 53 bits and is below 1."""
    return (u * total).long()


def _first_beyond(sums: Tensor, target: Tensor) -> Tensor:
    return _clamped(torch.searchsorted(sums, target, right=True), sums.shape[1])


def _clamped(index: Tensor, length: int) -> Tensor:
    """Limit an index to ``length - 1``. A search returns ``length`` if no sum is large enough."""
    return index.clamp(max=length - 1)


def largest_first(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return each row's ``count`` largest values, descending, and their ids. Equal values are ordered by id."""
    if count > NARROW:
        ordered = torch.sort(values, dim=1, descending=True, stable=True)
        return ordered.values[:, :count], ordered.indices[:, :count]
    # topk returns equal values in no defined order, so the keys include the id.
    bits = (values + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # sorts as an integer like the float does
    length = values.shape[1]
    keys = (rank.long() << 32) + torch.arange(length - 1, -1, -1, device=values.device)
    ids = length - 1 - (keys.topk(count, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, ids), ids


def _with_logprobs(logits: Tensor, tokens: Tensor, inputs: SamplingInputs) -> Drawn:
    """Return ``tokens`` with log-probabilities of the raw ``logits``, before penalties and temperature."""
    values = logits.index_select(0, inputs.asked).float()
    normalizer = _log_sum_exp(values)
    own = values.gather(1, tokens.index_select(0, inputs.asked).unsqueeze(1)) - normalizer
    best, ids = largest_first(values, inputs.most)
    shape = (len(tokens), inputs.most)
    logprobs = torch.zeros(len(tokens), device=logits.device)
    return Drawn(
        tokens=tokens,
        logprobs=logprobs.index_copy(0, inputs.asked, own.squeeze(1).float()),
        top_tokens=tokens.new_zeros(shape).index_copy(0, inputs.asked, ids),
        top_logprobs=logprobs.new_zeros(shape).index_copy(0, inputs.asked, (best - normalizer).float()),
    )


def _log_sum_exp(values: Tensor) -> Tensor:
    """Return log(sum(exp(row))) of each row, float64 [n, 1]. It is NaN if the row's maximum is not finite."""
    largest = values.amax(dim=1, keepdim=True)
    total = _integer_weights((values - largest).exp()).sum(dim=1, keepdim=True).double() / WEIGHT_ONE
    return (largest.double() + total.log()).masked_fill(~largest.isfinite(), torch.nan)
