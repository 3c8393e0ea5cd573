"""Generates random batches to time, of every kind and size that occurs in serving."""

from collections.abc import Sequence
from random import Random

import msgspec

from loraserve.cost import StepShape
from loraserve.engine.schedule.events import SchedulerLimits

KINDS = (
    "decode",
    "decode, adapters",
    "prefill",
    "prefill, adapters",
    "both",
    "both, adapters",
)
MIN_CONTEXT = 16
MIN_PREFILL = 4
MAX_PREFILLS = 3


class SizedAdapter(msgspec.Struct, frozen=True):
    rank: int
    slab_bytes: int


class BatchPart(msgspec.Struct, frozen=True):
    """One sequence of a batch: ``tokens`` to compute after ``context`` tokens. ``adapter`` is an index, -1 for none."""

    tokens: int
    context: int
    adapter: int = -1

    @property
    def is_decode(self) -> bool:
        return self.tokens == 1


class TimedBatch(msgspec.Struct, frozen=True):
    kind: str
    parts: tuple[BatchPart, ...]


def design_batches(limits: SchedulerLimits, adapters: int, count: int, seed: int = 0) -> list[TimedBatch]:
    """Return ``count`` batches within the limits, cycling through the kinds. Sizes are log-uniform."""
    rng = Random(seed)
    return [_draw_batch(KINDS[index % len(KINDS)], limits, adapters, rng) for index in range(count)]


def batch_shape(batch: TimedBatch, adapters: Sequence[SizedAdapter]) -> StepShape:
    decodes = [part for part in batch.parts if part.is_decode]
    prefills = [part for part in batch.parts if not part.is_decode]
    used = {part.adapter for part in batch.parts} - {-1}
    return StepShape(
        decode_sequences=len(decodes),
        kv_tokens=sum(part.context + 1 for part in decodes),
        prefill_tokens=sum(part.tokens for part in prefills),
        # Each token attends to the context, to the earlier new tokens of its sequence, and to itself.
        prefill_kv_tokens=sum(p.tokens * p.context + p.tokens * (p.tokens + 1) / 2 for p in prefills),
        slab_bytes=sum(adapters[index].slab_bytes for index in used),
        rank_tokens=sum(part.tokens * adapters[part.adapter].rank for part in batch.parts if part.adapter >= 0),
        max_rank=max((adapters[index].rank for index in used), default=0),
    )


def _draw_batch(kind: str, limits: SchedulerLimits, adapters: int, rng: Random) -> TimedBatch:
    adapters_used = [-1]
    if "adapters" in kind:
        adapters_used = rng.sample(range(adapters), _log_uniform(rng, 1, adapters))
    max_decodes = min(limits.max_running, max(1, limits.kv_blocks - MAX_PREFILLS))
    decodes = _log_uniform(rng, 1, max_decodes) if "prefill" not in kind else 0
    budget = limits.max_step_tokens - decodes
    prefills = _split_prefill(_log_uniform(rng, MIN_PREFILL, budget), rng) if "decode" not in kind else []
    if not prefills:
        decodes = max(decodes, 1)
    room = limits.kv_blocks // (decodes + len(prefills)) * limits.block_tokens
    longest = min(limits.max_model_tokens, room)
    lengths = [1] * decodes + [min(tokens, longest) for tokens in prefills]
    return TimedBatch(kind, tuple(_draw_part(tokens, longest, rng.choice(adapters_used), rng) for tokens in lengths))


def _draw_part(tokens: int, longest: int, adapter: int, rng: Random) -> BatchPart:
    """Return a sequence with a random context length. A prefill may have none, like a prompt's first chunk."""
    context = _log_uniform(rng, MIN_CONTEXT, longest - tokens)
    return BatchPart(tokens, context if tokens == 1 else rng.choice((0, context)), adapter)


def _split_prefill(tokens: int, rng: Random) -> list[int]:
    """Return the token counts of one to MAX_PREFILLS prefills, or [] if ``tokens`` is below MIN_PREFILL."""
    count = min(rng.randint(1, MAX_PREFILLS), tokens // MIN_PREFILL)
    return [tokens // count + (index < tokens % count) for index in range(count)]


def _log_uniform(rng: Random, least: int, most: int) -> int:
    """Draw a log-uniform integer from ``least`` to ``most``. Returns ``max(most, 0)`` if ``most <= least``."""
    if most <= least:
        return max(most, 0)
    return min(int(least * ((most + 1) / least) ** rng.random()), most)
