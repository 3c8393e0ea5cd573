"""Adapters, batches and caches for the tests of the kernels. Memory that no kernel may read is NaN."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from loraserve.adapter.format import Dtype, SlabHeader, make_layout
from loraserve.kernels.attention import AttentionBatch, KvCache
from loraserve.kernels.lora import AdapterTables
from loraserve.model_shape import MODULES, SLICES, ModelShape

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {
    # Widths that are no multiple of a vector, a step or a register block, and one that is of all.
    "odd": ModelShape(layers=2, hidden=72, heads=3, kv_heads=1, head_dim=24, ffn=106, vocab=50),
    "even": ModelShape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=192, vocab=50),
}


@dataclass
class Adapters:
    """A pool with an adapter in each slot of the tables, with NaN between them."""

    shape: ModelShape
    headers: list[SlabHeader]
    tables: AdapterTables
    pool: torch.Tensor

    def operands(self, module: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (y, x) for a step of ``tokens`` tokens."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.tables.in_features[module], generator=generator)
        y = torch.randn(tokens, sum(self.tables.out_features[module]), generator=generator)
        return y, x


def make_adapters(shape: ModelShape, dtype: Dtype, ranks: list[list[tuple[int, ...]]], seed: int = 0) -> Adapters:
    """Make adapters. ``ranks`` has, for each adapter, the ranks of the slices of each (layer, module)."""
    choose = random.Random(seed)
    scales = [[tuple(choose.uniform(0.5, 2.0) for _ in row) for row in rows] for rows in ranks]
    headers = [make_layout(shape, dtype, rows, scale) for rows, scale in zip(ranks, scales, strict=True)]
    gap = 48
    pool = torch.full((sum(h.elements + gap for h in headers) + gap,), float("nan"), dtype=DTYPES[dtype])
    tables = AdapterTables(shape, len(headers))
    start = gap
    generator = torch.Generator().manual_seed(seed)
    for slot, header in enumerate(headers):
        _fill(pool, tables, slot, header, start, generator)
        start += header.elements + gap
    tables.validate()
    return Adapters(shape, headers, tables, pool)


def _fill(
    pool: torch.Tensor, tables: AdapterTables, slot: int, header: SlabHeader, start: int, generator: torch.Generator
) -> None:
    """Write random weights into the rows of a slab; the padding between rows stays NaN."""
    tables.install(slot, header, start)
    for index, row in enumerate(header.rows):
        layer, module = divmod(index, len(MODULES))
        count = int(tables.elements[slot, layer, module])
        place = start + row.offset
        pool[place : place + count] = (torch.randn(count, generator=generator) * 0.2).to(pool.dtype)


def random_ranks(shape: ModelShape, choices: list[int], seed: int) -> list[tuple[int, ...]]:
    choose = random.Random(seed)
    return [tuple(choose.choice(choices) for _ in SLICES[name]) for _ in range(shape.layers) for name in MODULES]


@pytest.fixture(scope="session")
def adapters_of() -> Callable[..., Adapters]:
    return make_adapters


@pytest.fixture(scope="session")
def mixed() -> Callable[[str, str], Adapters]:
    """Six adapters of mixed ranks, some without some slices; the one in slot 5 has no weights."""
    made: dict[tuple[str, str], Adapters] = {}

    def get(shape: str, dtype: str) -> Adapters:
        if (shape, dtype) not in made:
            ranks = [random_ranks(SHAPES[shape], [0, 1, 2, 3, 4, 5, 8, 16, 33], seed) for seed in range(5)]
            ranks.append(random_ranks(SHAPES[shape], [0], 0))
            made[shape, dtype] = make_adapters(SHAPES[shape], dtype, ranks)  # type: ignore[arg-type]
        return made[shape, dtype]

    return get


class Sequences:
    """Paged sequences, whose blocks lie in the cache in random order, and steps over them."""

    def __init__(self, shape: ModelShape, lengths: list[int], block_tokens: int, seed: int) -> None:
        choose = random.Random(seed)
        self.shape = shape
        self.block_tokens = block_tokens
        self.lengths = lengths
        counts = [-(-length // block_tokens) for length in lengths]
        self.cache = KvCache(shape, sum(counts) + 3, block_tokens)
        self.cache.keys.fill_(float("nan"))
        self.cache.values.fill_(float("nan"))
        ids = list(range(sum(counts) + 3))
        choose.shuffle(ids)
        # Past a sequence's own blocks the table names a block that is all NaN.
        self.table = torch.full((len(lengths), max(counts) + 1), ids.pop(), dtype=torch.int32)
        for row, count in zip(self.table, counts, strict=True):
            row[:count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
        generator = torch.Generator().manual_seed(seed)
        width = (max(lengths), shape.head_dim)
        self.q = [torch.randn(n, shape.heads, width[1], generator=generator) for n in lengths]
        self.k = [torch.randn(n, shape.kv_heads, width[1], generator=generator) for n in lengths]
        self.v = [torch.randn(n, shape.kv_heads, width[1], generator=generator) for n in lengths]

    def step(
        self, spans: list[tuple[int, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]:
        """Return (q, k, v, batch) of tokens start..stop of each (sequence, start, stop)."""
        places = []
        for index, start, stop in spans:
            position = torch.arange(start, stop)
            block = self.table[index, position // self.block_tokens].long()
            places.append(block * self.block_tokens + position % self.block_tokens)
        counts = torch.tensor([0] + [stop - start for _, start, stop in spans])
        batch = AttentionBatch(
            query_start=counts.cumsum(0).to(torch.int32),
            seq_len=torch.tensor([stop for _, _, stop in spans], dtype=torch.int32),
            block_table=self.table[[index for index, _, _ in spans]].contiguous(),
            slot_mapping=torch.cat(places),
        )
        q, k, v = (torch.cat([part[i][a:b] for i, a, b in spans]) for part in (self.q, self.k, self.v))
        return q, k, v, batch


@pytest.fixture(scope="session")
def sequences_of() -> Callable[..., Sequences]:
    return Sequences


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return a function that sets the number of compute threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
