"""What a step holds, as the cost model sees it. Pure."""

from collections.abc import Mapping

from loraserve.cost import StepShape
from loraserve.engine.batch import StepBatch
from loraserve.messages import AdapterRef


def shape_of(batch: StepBatch, adapters: Mapping[int, AdapterRef]) -> tuple[StepShape, dict[int, int]]:
    """And its tokens by the rank of their adapter, 0 the base model; ``adapters`` are by slot."""
    decode = kv = prefill = prefill_kv = 0
    slot_tokens: dict[int, int] = {}
    for part in batch.sequences:
        tokens = len(part.tokens)
        slot_tokens[part.slot] = slot_tokens.get(part.slot, 0) + tokens
        if tokens == 1 and part.output_index > 0:
            decode += 1
            kv += part.start + 1
        else:
            prefill += tokens
            prefill_kv += tokens * part.start + tokens * (tokens + 1) // 2
    mix: dict[int, int] = {}
    for slot, tokens in slot_tokens.items():
        rank = adapters[slot].rank if slot >= 0 else 0
        mix[rank] = mix.get(rank, 0) + tokens
    shape = StepShape(
        decode_sequences=decode,
        kv_tokens=kv,
        prefill_tokens=prefill,
        prefill_kv_tokens=prefill_kv,
        slab_bytes=sum(adapters[slot].slab_bytes for slot in slot_tokens if slot >= 0),
        rank_tokens=sum(rank * tokens for rank, tokens in mix.items()),
        max_rank=max(mix, default=0),
    )
    return shape, mix
