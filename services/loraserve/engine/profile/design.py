"""Which batches are timed: of every kind that serving brings, small and large, drawn from a seed. Pure."""

from collections.abc import Sequence
from random import Random

import msgspec

from loraserve.cost import StepShape
from loraserve.engine.limits import SchedulerLimits

KINDS = (
    "decode",
    "decode, adapters",
    "prefill",
    "prefill, adapters",
    "both",
    "both, adapters",
)
SHORTEST_CONTEXT = 16
SHORTEST_PREFILL = 4
MOST_PREFILLS = 3


class SizedAdapter(msgspec.Struct, frozen=True):
    """An adapter as far as its cost goes."""

    rank: int
    slab_bytes: int


class Part(msgspec.Struct, frozen=True):
    """One sequence: ``tokens`` behind ``context`` others, with the adapter of this index; -1 is none."""

    tokens: int
    context: int
    adapter: int = -1

    @property
    def decodes(self) -> bool:
        return self.tokens == 1


class Batch(msgspec.Struct, frozen=True):
    """One step to be timed."""

    kind: str
    parts: tuple[Part, ...]


def design(limits: SchedulerLimits, adapters: int, count: int, seed: int = 0) -> list[Batch]:
    """``count`` batches, the kinds in turn; none exceeds the limits. Sizes are drawn evenly over their logarithm."""
    rng = Random(seed)
    return [_batch(KINDS[index % len(KINDS)], limits, adapters, rng) for index in range(count)]


def shape_of_batch(batch: Batch, adapters: Sequence[SizedAdapter]) -> StepShape:
    """What the cost model sees of it."""
    decodes = [part for part in batch.parts if part.decodes]
    prefills = [part for part in batch.parts if not part.decodes]
    used = {part.adapter for part in batch.parts} - {-1}
    return StepShape(
        decode_sequences=len(decodes),
        kv_tokens=sum(part.context + 1 for part in decodes),
        prefill_tokens=sum(part.tokens for part in prefills),
        # Each token attends to the context, to those of its own before it, and to itself.
        prefill_kv_tokens=sum(p.tokens * p.context + p.tokens * (p.tokens + 1) / 2 for p in prefills),
        slab_bytes=sum(adapters[index].slab_bytes for index in used),
        rank_tokens=sum(part.tokens * adapters[part.adapter].rank for part in batch.parts if part.adapter >= 0),
        max_rank=max((adapters[index].rank for index in used), default=0),
    )


def _batch(kind: str, limits: SchedulerLimits, adapters: int, rng: Random) -> Batch:
    chosen = [-1]
    if "adapters" in kind:
        chosen = rng.sample(range(adapters), _even_log(rng, 1, adapters))
    # A third of the room for each of at most three prefills is there whatever the decodes take.
    decodes = _even_log(rng, 1, limits.max_running) if "prefill" not in kind else 0
    budget = limits.max_step_tokens - decodes
    prefill_tokens = _even_log(rng, SHORTEST_PREFILL, budget) if "decode" not in kind else 0
    if prefill_tokens < SHORTEST_PREFILL:
        prefill_tokens = 0
    prefills = _split(prefill_tokens, rng)
    room = limits.kv_blocks // (decodes + len(prefills)) * limits.block_tokens
    longest = min(limits.max_model_tokens, room)
    parts = [Part(1, _context(rng, longest - 1), rng.choice(chosen)) for _ in range(decodes)]
    parts += [Part(t, rng.choice((0, _context(rng, longest - t))), rng.choice(chosen)) for t in prefills if t < longest]
    return Batch(kind, tuple(parts) or (Part(1, 0, rng.choice(chosen)),))


def _split(tokens: int, rng: Random) -> list[int]:
    count = rng.randint(1, MOST_PREFILLS)
    if tokens < count * SHORTEST_PREFILL:
        return [tokens] if tokens else []
    return [tokens // count + (index < tokens % count) for index in range(count)]


def _context(rng: Random, most: int) -> int:
    return _even_log(rng, SHORTEST_CONTEXT, most)


def _even_log(rng: Random, least: int, most: int) -> int:
    """From ``least`` to ``most``, as likely below as above their geometric mean; ``most`` where that is less."""
    if most <= least:
        return max(most, 0)
    return min(int(least * ((most + 1) / least) ** rng.random()), most)
