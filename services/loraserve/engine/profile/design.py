"""Which batches are timed: of every kind that serving brings, small and large, drawn from a seed. Pure."""

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
    most_decodes = min(limits.max_running, max(1, limits.kv_blocks - MOST_PREFILLS))
    decodes = _even_log(rng, 1, most_decodes) if "prefill" not in kind else 0
    budget = limits.max_step_tokens - decodes
    prefills = _split(_even_log(rng, SHORTEST_PREFILL, budget), rng) if "decode" not in kind else []
    if not prefills:
        decodes = max(decodes, 1)
    room = limits.kv_blocks // (decodes + len(prefills)) * limits.block_tokens
    longest = min(limits.max_model_tokens, room)
    lengths = [1] * decodes + [min(tokens, longest) for tokens in prefills]
    return Batch(kind, tuple(_part(tokens, longest, rng.choice(chosen), rng) for tokens in lengths))


def _part(tokens: int, longest: int, adapter: int, rng: Random) -> Part:
    """A sequence that decodes has a context; one that prefills has none, or goes on behind one."""
    context = _even_log(rng, SHORTEST_CONTEXT, longest - tokens)
    return Part(tokens, context if tokens == 1 else rng.choice((0, context)), adapter)


def _split(tokens: int, rng: Random) -> list[int]:
    """Among one to three sequences; none where there are too few tokens for one."""
    count = min(rng.randint(1, MOST_PREFILLS), tokens // SHORTEST_PREFILL)
    return [tokens // count + (index < tokens % count) for index in range(count)]


def _even_log(rng: Random, least: int, most: int) -> int:
    """From ``least`` to ``most``, as likely below as above their geometric mean; ``most`` where that is less."""
    if most <= least:
        return max(most, 0)
    return min(int(least * ((most + 1) / least) ** rng.random()), most)
