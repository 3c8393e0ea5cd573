"""Time the CPU kernels beside their floor, a plain read of the same bytes.

    python -m loraserve.benchmarks.cpu_kernels

The shape is SmolLM2-135M's and a step is all 30 layers. Kernel and floor run in turn, so that a busy machine slows
both.
"""

import argparse
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from loraserve.adapter.format import make_uniform_layout
from loraserve.kernels import attention, lora
from loraserve.kernels.attention import AttentionBatch, KvCache, block_bytes, paged_attention
from loraserve.kernels.cpu.compiled import Kernel
from loraserve.kernels.cpu.operands import OperandBlock, int64s, integers, reader, take_part
from loraserve.kernels.cpu.threads import run
from loraserve.kernels.lora import AdapterTables, add_lora, plan_batch
from loraserve.model_shape import MODULES, ModelShape

SHAPE = ModelShape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)
RANKS = (8, 16, 32, 64)
PART_WORDS = 1 << 14


class ReadCall(OperandBlock):
    """Operands of ``_read_all``: ``words`` int64 at ``start``, and where their exclusive or is stored."""

    __slots__ = ()
    _fields_ = integers("start", "words", "result")


_operands = reader(ReadCall)


def _read_all(operands):  # type: ignore[no-untyped-def]
    o = _operands(operands)
    result = np.int64(0)
    first = take_part(operands) * PART_WORDS
    while first < o.words:
        count = min(PART_WORDS, o.words - first)
        row = int64s(o.start + first * 8, count)
        for i in range(count):
            result ^= row[i]
        first = take_part(operands) * PART_WORDS
    int64s(o.result, 1)[0] = result


READ = Kernel(_read_all)


def read_floor(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Return a function that reads every byte of the tensors once, on all threads."""
    result = torch.zeros(1, dtype=torch.int64)
    places = [(tensor.data_ptr(), tensor.numel() * tensor.element_size() // 8) for tensor in tensors]

    def read() -> None:
        for address, words in places:
            call = ReadCall(start=address, words=words, result=result.data_ptr())
            run(READ, call, shared=words >= 2 * PART_WORDS)

    return read


class LoraSteps:
    """Whole steps of add_lora with some of 16 resident adapters. ``slots`` has the slot of each token."""

    def __init__(self) -> None:
        headers = [make_uniform_layout(SHAPE, "bfloat16", rank) for rank in RANKS * 4]
        self.pool = torch.empty(sum(header.elements for header in headers), dtype=torch.bfloat16)
        self.pool.copy_(
            torch.randn(1 << 20).to(torch.bfloat16).repeat(self.pool.numel() // (1 << 20) + 1)[: len(self.pool)]
        )
        self.tables = AdapterTables(SHAPE, len(headers))
        self.slabs = []
        start = 0
        for slot, header in enumerate(headers):
            self.tables.install(slot, header, start)
            self.slabs.append(self.pool[start : start + header.elements])
            start += header.elements

    def step(self, slots: list[int]) -> Callable[[], None]:
        batch = plan_batch(torch.tensor(slots, dtype=torch.int32))
        xs = [torch.randn(len(slots), SHAPE.in_features(module)) for module in MODULES]
        ys = [torch.zeros(len(slots), sum(SHAPE.out_features(module))) for module in MODULES]

        def go() -> None:
            for layer in range(SHAPE.layers):
                for module in range(len(MODULES)):
                    add_lora(ys[module], xs[module], self.pool, self.tables, batch, layer, module)

        return go

    def floor(self, slots: list[int]) -> Callable[[], None]:
        """Return a function that reads the slabs layer by layer, as a step does."""
        used = [self.slabs[slot] for slot in sorted(set(slots))]
        layers = [slab.chunk(SHAPE.layers) for slab in used]
        return read_floor(part for layer in zip(*layers, strict=True) for part in layer)


def attention_step(queries: int, past: int, sequences: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Return (step, floor, bytes of KV) for ``queries`` new tokens in each sequence; ``past`` tokens with these."""
    blocks = -(-past // 16)
    cache = KvCache(SHAPE, blocks * sequences)
    cache.keys.uniform_(-1, 1)
    cache.values.uniform_(-1, 1)
    table = torch.arange(blocks * sequences, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(past - queries, past)
    batch = AttentionBatch(
        query_start=torch.arange(0, queries * sequences + 1, queries, dtype=torch.int32),
        seq_len=torch.full((sequences,), past, dtype=torch.int32),
        block_table=table,
        slot_mapping=(table[:, positions // 16].long() * 16 + positions % 16).flatten(),
    )
    q = torch.randn(queries * sequences, SHAPE.heads, SHAPE.head_dim)
    k, v = torch.randn(2, queries * sequences, SHAPE.kv_heads, SHAPE.head_dim).unbind()

    def go() -> None:
        for layer in range(SHAPE.layers):
            paged_attention(q, k, v, cache, batch, layer, SHAPE.head_dim**-0.5)

    floor = read_floor(part for layer in range(SHAPE.layers) for part in (cache.keys[layer], cache.values[layer]))
    return go, floor, blocks * sequences * block_bytes(SHAPE, 16)


def timed(step: Callable[[], None], floor: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Run step and floor in turn for about ``seconds``. Return the median milliseconds of each."""
    step()
    floor()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        step()
        between = time.perf_counter()
        floor()
        times.append((between - started, time.perf_counter() - between))
    steps, floors = zip(*times, strict=True)
    return 1e3 * float(np.median(steps)), 1e3 * float(np.median(floors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    lora.warm_up(torch.bfloat16)
    attention.warm_up()
    print(f"{arguments.threads} threads; kernels compiled or loaded in {time.perf_counter() - started:.1f} s")
    print(f"{'one step of 30 layers':<44}{'MB':>8}{'ms':>9}{'floor ms':>10}{'ratio':>7}")

    def line(name: str, size: int, step: Callable[[], None], floor: Callable[[], None]) -> None:
        ms, floor_ms = timed(step, floor, arguments.seconds)
        print(f"{name:<44}{size / 1e6:8.1f}{ms:9.2f}{floor_ms:10.2f}{ms / floor_ms:7.2f}", flush=True)

    steps = LoraSteps()
    for name, slots in {
        "lora: 1 token, rank 16": [1],
        "lora: 1 token, rank 64": [3],
        "lora: 16 tokens, 1 adapter, rank 16": [1] * 16,
        "lora: 16 tokens, 4 adapters, ranks 8 to 64": [0, 1, 2, 3] * 4,
        "lora: 16 tokens, 16 adapters, ranks 8 to 64": list(range(16)),
        "lora: 512 tokens, 1 adapter, rank 16": [1] * 512,
        "lora: 512 tokens, 1 adapter, rank 64": [3] * 512,
    }.items():
        size = sum(steps.slabs[slot].numel() * 2 for slot in set(slots))
        line(name, size, steps.step(slots), steps.floor(slots))
    for name, queries, past, sequences in (
        ("attention: 1 token over 128", 1, 128, 1),
        ("attention: 1 token over 2048", 1, 2048, 1),
        ("attention: 16 tokens over 128 each", 1, 128, 16),
        ("attention: 16 tokens over 512 each", 1, 512, 16),
        ("attention: prefill of 512", 512, 512, 1),
        ("attention: prefill of 128 after 1920", 128, 2048, 1),
    ):
        step, floor, size = attention_step(queries, past, sequences)
        line(name, size, step, floor)


if __name__ == "__main__":
    main()
