"""What drawing a batch's tokens takes beside its logits: sorted by what it costs on the host, then sent in one copy.

Which rows need what is known here, so that the device works through groups of known sizes and is never waited for.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraserve.engine.batch import SequenceStep, changes_logits
from loraserve.engine.sampler import GREEDY_BELOW, uniform
from loraserve.messages.base import SamplingParams

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
    places = [place for place, step in enumerate(rows) if changes_logits(step.sampling, step.output_index)]
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
