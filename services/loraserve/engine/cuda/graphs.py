"""Captures decode steps of different sizes as CUDA graphs, so that one launch runs all kernels of a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loraserve.engine.cuda.decoder import NONE, BufferSize, GpuDecoder, GpuStepInputs, StepBuffer
from loraserve.kernels.attention.gpu import Backend, GpuAttentionBatch
from loraserve.kernels.lora.tuning import bucket
from loraserve.kernels.lora.work import LoraWork

MIN_TABLE_WIDTH = {"gathered": 16, "paged": 256}
WIDTH_FACTOR = {"gathered": 4, "paged": 8}


def batch_sizes(max_running: int) -> tuple[int, ...]:
    """Return the batch sizes to capture: ``max_running`` and all smaller powers of two."""
    sizes = [1 << power for power in range(max_running.bit_length())]
    return tuple(sorted({size for size in sizes if size < max_running} | {max_running}))


def table_widths(max_blocks: int, attention: Backend) -> tuple[int, ...]:
    """Return the block table widths to capture, in blocks per sequence.

    Gathered attention reads all blocks of the width, so it gets more widths. Paged attention reads only used blocks.
    """
    widths = {max_blocks}
    width = MIN_TABLE_WIDTH[attention]
    while width < max_blocks:
        widths.add(width)
        width *= WIDTH_FACTOR[attention]
    return tuple(sorted(widths))


@dataclass(frozen=True)
class DecodeGraph:
    """A captured step. Replaying ``graph`` reads ``buffer`` and overwrites ``logits`` [rows, vocab]."""

    buffer: StepBuffer
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class DecodeGraphs:
    """The captured graphs, by number of sequences, block table width and whether any token uses an adapter.

    ``make_work`` returns the LoraWork for a number of tokens. ``previous_tokens`` holds the tokens sampled in the
    preceding step, always at the same address.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        previous_tokens: torch.Tensor,
        sizes: tuple[int, ...],
        widths: tuple[int, ...],
        make_work: Callable[[int], LoraWork],
    ) -> None:
        self._decoder = decoder
        self._previous_tokens = previous_tokens
        self._sizes = sizes
        self._widths = widths
        self._make_work = make_work
        self._graphs: dict[tuple[int, int, bool], DecodeGraph] = {}
        self._logits = torch.empty(0)

    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture all graphs on the current stream, which must also replay them."""
        # The largest graphs come first, so that the smaller ones reuse their memory.
        keys = list(self._keys())
        pool = torch.cuda.graph_pool_handle()
        for done, key in enumerate(keys):
            progress(f"capturing CUDA graphs: {done} of {len(keys)}")
            self._graphs[key] = self._capture(*key, pool)

    def find(self, sequences: int, blocks: int, adapted: bool) -> DecodeGraph | None:
        """Return the smallest fitting graph, or None. ``blocks`` is the longest sequence's number of KV blocks."""
        key = (bucket(sequences, self._sizes), bucket(blocks, self._widths), adapted)
        return self._graphs.get(key) if sequences <= self._sizes[-1] and blocks <= self._widths[-1] else None

    def _keys(self) -> Iterator[tuple[int, int, bool]]:
        for size in reversed(self._sizes):
            for width in reversed(self._widths):
                yield from ((size, width, adapted) for adapted in (True, False))

    def _capture(self, size: int, width: int, adapted: bool, pool: Any) -> DecodeGraph:
        buffer = StepBuffer(BufferSize(size, size, width, size), self._previous_tokens.device)
        buffer.source.fill_(NONE)
        buffer.kv_slots.fill_(NONE)
        buffer.slots.fill_(NONE)
        buffer.seq_len.fill_(1)
        buffer.query_start.copy_(torch.arange(size + 1))
        buffer.sampled.copy_(torch.arange(size))
        attention = GpuAttentionBatch(buffer.query_start, buffer.seq_len, buffer.table)
        inputs = GpuStepInputs(buffer, attention, self._make_work(size) if adapted else None)

        def forward() -> torch.Tensor:
            return self._decoder.forward(inputs, self._previous_tokens)

        # Run once before the capture, to compile kernels and allocate buffers.
        logits = forward()
        if not self._logits.numel():
            # All graphs share the output buffer of the first and largest, because they never run concurrently.
            self._logits = torch.empty_like(logits)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._logits[:size].copy_(forward())
        return DecodeGraph(buffer, graph, self._logits[:size])
