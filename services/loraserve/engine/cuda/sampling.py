"""What drawing a batch's tokens takes beside its logits: sorted by what it costs on the host, then sent in one copy.

Which rows need what is known here, so that the device works through groups of known sizes and is never waited for.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraserve.engine.compute.sampler import BLOCK_TOKENS, GREEDY_BELOW, uniform
from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams

MAX_VOCAB = (1 << 19) - 1
"""The shares of a row's tokens are whole numbers up to 2^44, and their sum must fit int64."""
NARROW = 1024
"""Up to this many of the largest are selected, more are sorted."""

Array = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """Rows that draw alike, from their ``width`` most likely tokens or from all: ``rows`` int64 [n] are their places.

    ``top_k`` is at most the vocabulary, and that where none is set; ``top_p`` is at most 1. Of ``temperature`` and
    ``min_p`` the sampler takes the nearest float32.
    """

    rows: Tensor
    width: int
    u: Tensor  # float64 [n, 1], as the others
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class Changes:
    """Rows whose logits change before a token is drawn: ``rows`` int64 [n] are their places in the batch.

    A token of one of them is its place in their logits [n, vocab], int64: each that must not be drawn, each of prompt
    and output where repetition counts, each of the output where presence or frequency does.
    """

    rows: Tensor
    forbidden: Tensor
    repeated: Tensor
    output: Tensor
    repetition: Tensor  # float64 [n], as the others
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class SamplingInputs:
    """Everything but the logits. A part without rows costs nothing; greedy rows are in none.

    ``plain`` draws from all tokens. ``narrow`` is limited by a small top_k, ``wide`` filters but needs a sort.
    ``asked`` int64 [n] are the rows whose log-probabilities are wanted, with up to ``most`` of their best tokens.
    """

    rows: int
    vocab: int
    plain: Draws
    narrow: Draws
    wide: Draws
    changes: Changes
    asked: Tensor
    most: int


def prepare(
    rows: Sequence[SequenceStep], vocab: int, eos_token_ids: Collection[int], device: torch.device
) -> SamplingInputs:
    """The inputs of a batch whose logits are [len(rows), vocab]. Does not wait for the copy."""
    assert 0 < vocab <= MAX_VOCAB, vocab
    narrow_width = max((_narrow_k(step.sampling, vocab) for step in rows), default=0)
    groups = [_group(step.sampling, vocab) for step in rows]
    drawn = [[place for place, own in enumerate(groups) if own == group] for group in ("plain", "narrow", "wide")]
    asked = [place for place, step in enumerate(rows) if step.sampling.logprobs is not None]
    parts = [*(_draw_arrays(rows, places, vocab) for places in drawn), _change_arrays(rows, vocab, eos_token_ids)]
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
        changes=Changes(next(sent), next(sent), next(sent), next(sent), *next(sent).unbind()),
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
    """top_k where it sets a small limit, else 0."""
    return params.top_k if 0 < params.top_k < vocab and params.top_k <= NARROW else 0


def _draw_arrays(rows: Sequence[SequenceStep], places: list[int], vocab: int) -> list[Array]:
    """The rows' places [n] and the fields of Draws [5, n]."""
    values = [_draw_values(rows[place], vocab) for place in places]
    return [_integers(places), np.array(values, dtype=np.float64).reshape(-1, 5).T]


def _draw_values(step: SequenceStep, vocab: int) -> tuple[float, ...]:
    p = step.sampling
    top_k = p.top_k if 0 < p.top_k < vocab else vocab
    return uniform(p.seed, step.output_index), p.temperature, top_k, min(p.top_p, 1.0), p.min_p


def _change_arrays(rows: Sequence[SequenceStep], vocab: int, eos_token_ids: Collection[int]) -> list[Array]:
    """The rows' places [n], tokens that are forbidden, repeated and put out, and the three penalties [3, n]."""
    places = [place for place, step in enumerate(rows) if step.sampling.changes_logits(step.output_index)]
    steps = [rows[place] for place in places]
    penalties = [
        (s.sampling.repetition_penalty, s.sampling.presence_penalty, s.sampling.frequency_penalty) for s in steps
    ]
    return [
        _integers(places),
        _flat((_forbidden(step, vocab, eos_token_ids) for step in steps), vocab),
        _flat((step.history if step.sampling.repetition_penalty != 1.0 else () for step in steps), vocab),
        _flat((step.history[step.prompt_length :] if _counts_output(step) else () for step in steps), vocab),
        np.array(penalties, dtype=np.float64).reshape(-1, 3).T,
    ]


def _counts_output(step: SequenceStep) -> bool:
    return step.sampling.presence_penalty != 0.0 or step.sampling.frequency_penalty != 0.0


def _forbidden(step: SequenceStep, vocab: int, eos_token_ids: Collection[int]) -> list[int]:
    if step.output_index >= step.sampling.min_tokens:
        return []
    return [token for token in (*eos_token_ids, *step.sampling.stop_token_ids) if 0 <= token < vocab]


def _flat(tokens: Iterable[Sequence[int]], vocab: int) -> NDArray[np.int64]:
    """The tokens of each row in turn, as places in [rows, vocab]."""
    return np.concatenate([_integers(own) + row * vocab for row, own in enumerate(tokens)] or [_integers(())])


def _integers(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays, whose items all have 8 bytes, as tensors of the same shapes that share one copy to the device."""
    sizes = [array.size for array in arrays]
    # Only from pinned memory does a copy run beside the host; its allocator keeps it until the copy is done.
    packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda" and sum(sizes) > 0)
    np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.int64) for array in arrays], out=packed.numpy())
    parts = torch.split_with_sizes(packed.to(device, non_blocking=True), sizes)
    return [
        (part.view(torch.float64) if array.dtype == np.float64 else part).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


WHOLE = 2.0**44
"""The share of a row's most likely token. Tokens less likely than it by more than this have none."""

Picker = Callable[[Tensor, Draws], Tensor]


@dataclass(frozen=True)
class Drawn:
    """Tensors on the device: ``tokens`` int64 [rows], and the rest where some row asked for log-probabilities.

    ``logprobs`` float32 [rows], ``top_tokens`` int64 and ``top_logprobs`` float32 [rows, most], best first; rows that
    did not ask hold zeros.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


def draw(logits: Tensor, inputs: SamplingInputs) -> Drawn:
    """One token per row of ``logits`` [rows, vocab], of any floating dtype; they are left as they are."""
    assert logits.shape == (inputs.rows, inputs.vocab), logits.shape
    changed = _change(logits, inputs.changes)
    greedy = changed.argmax(dim=1)
    tokens = greedy
    pickers: tuple[tuple[Draws, Picker], ...] = (
        (inputs.plain, _pick_of_all),
        (inputs.narrow, _pick_of_most_likely),
        (inputs.wide, _pick_of_most_likely),
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
    """What ``Drawn`` holds, once it has arrived on the host, as one value per row."""
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


def _change(logits: Tensor, changes: Changes) -> Tensor:
    """The logits with those of ``changes.rows`` changed; float32 where there are any."""
    if not len(changes.rows):
        return logits
    values = logits.index_select(0, changes.rows).float()
    flat, vocab = values.view(-1), logits.shape[1]
    flat.scatter_(0, changes.forbidden, -torch.inf)
    _penalize_repetition(flat, changes, vocab)
    _penalize_output(flat, changes, vocab)
    return logits.float().index_copy(0, changes.rows, values)


def _penalize_repetition(flat: Tensor, changes: Changes, vocab: int) -> None:
    """A token that occurs often is read before any is written, so that it is changed once."""
    values = flat.gather(0, changes.repeated)
    penalty = changes.repetition.float().gather(0, changes.repeated // vocab)
    flat.scatter_(0, changes.repeated, torch.where(values > 0, values / penalty, values * penalty))


def _penalize_output(flat: Tensor, changes: Changes, vocab: int) -> None:
    counts = torch.zeros_like(flat, dtype=torch.int32)
    counts.scatter_add_(0, changes.output, torch.ones_like(changes.output, dtype=torch.int32))
    of_token = changes.output // vocab
    frequency, presence = changes.frequency.gather(0, of_token), changes.presence.gather(0, of_token)
    penalty = frequency * counts.gather(0, changes.output) + presence
    flat.scatter_(0, changes.output, flat.gather(0, changes.output) - penalty.float())


def _draw_group(logits: Tensor, greedy: Tensor, draws: Draws, pick: Picker) -> Tensor:
    """Tokens int64 [n] of the group's rows: the largest where that is not finite, since it leaves no distribution."""
    values = logits.index_select(0, draws.rows).float()
    largest = values.amax(dim=1, keepdim=True)
    weights = ((values - largest) / draws.temperature.float()).exp()
    tokens = pick(weights, draws).squeeze(1)
    return torch.where(largest.squeeze(1).isfinite(), tokens, greedy.index_select(0, draws.rows))


def _pick_of_all(weights: Tensor, draws: Draws) -> Tensor:
    """Tokens [n, 1] at ``u`` of the sums by token id: first the block, then the place in it.

    A running sum over the whole vocabulary would read and write all of it several times.
    """
    shares = torch.nn.functional.pad(_shares(weights), (0, -weights.shape[1] % BLOCK_TOKENS))
    blocks = shares.view(len(weights), -1, BLOCK_TOKENS)
    sums = blocks.sum(dim=2)
    ends = sums.cumsum(dim=1)
    target = _target(draws.u, ends[:, -1:])
    block = _first_beyond(ends, target)
    inner = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK_TOKENS)).squeeze(1).cumsum(dim=1)
    begin = ends.gather(1, block) - sums.gather(1, block)
    return block * BLOCK_TOKENS + _first_beyond(inner, target - begin)


def _pick_of_most_likely(weights: Tensor, draws: Draws) -> Tensor:
    """Tokens [n, 1] at ``u`` of the sums over what min_p, top_k and top_p leave in turn, the most likely first."""
    weights, tokens = largest_first(weights, draws.width)
    left = weights >= draws.min_p.float()
    left &= torch.arange(draws.width, device=weights.device) < draws.top_k
    sums = _shares(weights).masked_fill(~left, 0).cumsum(dim=1)
    # The token with which top_p is reached is the last that is left.
    last = _limited(torch.searchsorted(sums, (draws.top_p * sums[:, -1:]).ceil().long()), draws.width)
    return tokens.gather(1, _first_beyond(sums, _target(draws.u, sums.gather(1, last))))


def _shares(weights: Tensor) -> Tensor:
    """Weights float32, at most 1, as int64."""
    return (weights * WHOLE).long()


def _target(u: Tensor, total: Tensor) -> Tensor:
    """Always below ``total``: ``u`` has 53 bits, so that their product is not rounded up to it."""
    return (u * total).long()


def _first_beyond(sums: Tensor, target: Tensor) -> Tensor:
    return _limited(torch.searchsorted(sums, target, right=True), sums.shape[1])


def _limited(index: Tensor, length: int) -> Tensor:
    """Within the row, which the sums of a row that is not finite may point out of."""
    return index.clamp(max=length - 1)


def largest_first(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of float32 ``values`` and their ids, best first, ties by id."""
    if count > NARROW:
        ordered = torch.sort(values, dim=1, descending=True, stable=True)
        return ordered.values[:, :count], ordered.indices[:, :count]
    # topk leaves open which of equals it takes, so that each is given a key of its own.
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes one of the two zeros
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the floats, also where they are negative
    length = values.shape[1]
    keys = (rank.long() << 32) + torch.arange(length - 1, -1, -1, device=values.device)
    ids = length - 1 - (keys.topk(count, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, ids), ids


def _with_logprobs(logits: Tensor, tokens: Tensor, inputs: SamplingInputs) -> Drawn:
    """Log-probabilities are the model's own: of the logits before penalties and temperature."""
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
    """Float64 [n, 1]; NaN where the largest is not finite, since devices differ in what integer a NaN becomes."""
    largest = values.amax(dim=1, keepdim=True)
    total = _shares((values - largest).exp()).sum(dim=1, keepdim=True).double() / WHOLE
    return (largest.double() + total.log()).masked_fill(~largest.isfinite(), torch.nan)
