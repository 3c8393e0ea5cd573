"""A model that costs nothing and whose every token is known: adapters, its runner for engines, and the true texts.

The KV entry of a position is a hash of the adapter's bytes and of all tokens up to the position. The runner computes
each entry from the entry before it, which it reads from the sequence's blocks, and samples from the last entry, the
seed and the output index. So a token is wrong if any of them is: the adapter, a block, a token, a position.
"""

from collections.abc import Sequence
from functools import cache, partial
from random import Random
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np

from loraserve.adapter.format import (
    ITEM_BYTES,
    SlabHeader,
    encode_header,
    make_uniform_layout,
    seal_layout,
    slab_version,
)
from loraserve.adapter.pack import Slab
from loraserve.engine.compute.protocol import ComputedStep
from loraserve.engine.loading.memory import HostPool
from loraserve.engine.schedule.events import PENDING_TOKEN, Sampled, SequenceStep, StepBatch, StepResult
from loraserve.messages import AdapterRef, SamplingParams
from loraserve.messages.stop import finish_of, shown_count
from loraserve.model_shape import ModelShape

SHAPE = ModelShape(layers=2, hidden=16, heads=1, kv_heads=1, head_dim=16, ffn=16, vocab=256)
VOCAB = 997
DTYPE: Final = "float16"
BLOCK_TOKENS = 4
KV_BLOCKS = 40
MAX_TOKENS = 96
_PRIME = 1_000_003
_MASK = (1 << 61) - 1


class TwinAdapter(NamedTuple):
    ref: AdapterRef
    slab: Slab
    header: bytes
    """The encoded header."""


@cache
def twin_adapter(name: str) -> TwinAdapter:
    """Return the adapter of this name. Each name has its own weights; ranks are 2 and 4."""
    rank = 2 + 2 * (crc32(name.encode()) % 2)
    layout = make_uniform_layout(SHAPE, DTYPE, rank)
    data = Random(name).randbytes(layout.slab_bytes)
    header = seal_layout(layout, data)
    slab = Slab(header, memoryview(data), slab_version(header))
    ref = AdapterRef(name=name, version=slab.version, rank=rank, slab_bytes=header.slab_bytes)
    return TwinAdapter(ref, slab, encode_header(header))


@cache
def root_entry(adapter: str) -> int:
    """Return the entry before the first token. ``adapter`` "" is the base model."""
    return crc32(twin_adapter(adapter).slab.data) if adapter else 1


def next_entry(entry: int, token: int) -> int:
    return (entry * _PRIME + token + 1) & _MASK


def draw_token(entry: int, seed: int, index: int) -> int:
    """Return the token at output index ``index`` after the KV entry of the last known token."""
    return (((entry ^ (seed * 7919)) * _PRIME + index * 104_729) & _MASK) % VOCAB


class Truth(NamedTuple):
    """The right answer: all its tokens, the tokens shown as text, and why it ends."""

    tokens: tuple[int, ...]
    shown: tuple[int, ...]
    finish: str


def true_answer(adapter: str, prompt: Sequence[int], sampling: SamplingParams) -> Truth:
    entry = root_entry(adapter)
    for token in prompt:
        entry = next_entry(entry, token)
    tokens: list[int] = []
    while True:
        token = draw_token(entry, sampling.seed, len(tokens))
        end = finish_of(token, len(tokens), sampling, sampling.max_tokens, frozenset())
        tokens.append(token)
        if end.finish is not None:
            return Truth(tuple(tokens), tuple(tokens[: shown_count(len(tokens), end.finish, False)]), end.finish)
        entry = next_entry(entry, token)


class TwinRunner:
    """A Runner of this model. ``steps_ahead`` 1 makes it accept a step while another runs, as a GPU's does."""

    kv_blocks = KV_BLOCKS
    max_positions = MAX_TOKENS
    eos_token_ids: tuple[int, ...] = ()
    weights_backend = "no"

    def __init__(self, pool_bytes: int, steps_ahead: int) -> None:
        self.pool = HostPool(np.zeros(pool_bytes, np.uint8).data)
        self.steps_ahead = steps_ahead
        self._kv = [[0] * BLOCK_TOKENS for _ in range(KV_BLOCKS)]
        self._slabs: dict[int, range] = {}
        self._last_sampled: dict[str, int] = {}

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        start = base_elements * ITEM_BYTES[header.dtype]
        self._slabs[slot] = range(start, start + header.slab_bytes)

    def remove(self, slot: int) -> None:
        self._slabs.pop(slot, None)

    def submit(self, batch: StepBatch) -> ComputedStep:
        sampled = tuple(filter(None, map(partial(self._compute, {}), batch.sequences)))
        self._last_sampled = {each.request_id: each.token for each in sampled}
        return ComputedStep(StepResult(step_id=batch.step_id, sampled=sampled, duration_s=0.02))

    def _compute(self, roots: dict[int, int], part: SequenceStep) -> Sampled | None:
        entry = self._root(part.slot, roots) if part.start == 0 else self._at(part.blocks, part.start - 1)
        for position, known in enumerate(part.tokens, part.start):
            token = self._last_sampled.get(part.request_id, 0) if known == PENDING_TOKEN else known
            entry = next_entry(entry, token)
            self._kv[part.blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = entry
        if not part.sample:
            return None
        return Sampled(request_id=part.request_id, token=draw_token(entry, part.sampling.seed, part.output_index))

    def _at(self, blocks: Sequence[int], position: int) -> int:
        return self._kv[blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS]

    def _root(self, slot: int, roots: dict[int, int]) -> int:
        """Compute with the bytes that lie in the pool now, as a real engine does."""
        if slot < 0:
            return 1
        if slot not in roots:
            where = self._slabs[slot]
            roots[slot] = crc32(self.pool.view(where.start, len(where)))
        return roots[slot]


class WordDetokenizer:
    """Writes each token as a word, so that texts are equal only if all tokens are."""

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join(f"{token} " for token in tokens)

    def flush(self) -> str:
        return ""


class TwinTokenizer:
    """The part of ModelTokenizer that answers need, without a vocabulary."""

    max_positions = MAX_TOKENS

    @property
    def token_bytes(self) -> "TwinTokenizer":
        return self

    def detokenizer(self, skip_special_tokens: bool = True) -> WordDetokenizer:
        return WordDetokenizer()
