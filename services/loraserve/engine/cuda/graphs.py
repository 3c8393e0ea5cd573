"""Decode steps as captured CUDA graphs, one for each size: a step costs one launch, however many kernels it has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loraserve.engine.cuda.decoder import GpuDecoder
from loraserve.engine.cuda.step_buffer import StepBuffer, StepShape
from loraserve.kernels.attention.gpu import Backend, GpuAttentionBatch
from loraserve.kernels.lora.tuning import bucket
from loraserve.kernels.lora.work import LoraWork

NARROWEST_BLOCKS = {"gathered": 16, "paged": 256}
WIDER = {"gathered": 4, "paged": 8}


def batch_sizes(max_running: int) -> tuple[int, ...]:
    """Powers of two, and ``max_running`` itself: a step runs the next larger one, padded."""
    sizes = [1 << power for power in range(max_running.bit_length())]
    return tuple(sorted({size for size in sizes if size < max_running} | {max_running}))


def table_widths(most_blocks: int, attention: Backend) -> tuple[int, ...]:
    """Blocks of a sequence that a graph has room for.

    Gathered attention reads all of that room, so that there are many sizes; for paged attention it is only sent.
    """
    widths = {most_blocks}
    width = NARROWEST_BLOCKS[attention]
    while width < most_blocks:
        widths.add(width)
        width *= WIDER[attention]
    return tuple(sorted(widths))


@dataclass(frozen=True)
class DecodeGraph:
    """A captured step: fill ``step``, replay ``graph``, read ``logits`` [rows, vocab] before the next replay."""

    step: StepBuffer
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class DecodeGraphs:
    """Graphs by (sequences, width of the table, whether somebody uses an adapter)."""

    def __init__(
        self,
        decoder: GpuDecoder,
        drawn: torch.Tensor,
        sizes: tuple[int, ...],
        widths: tuple[int, ...],
        work: Callable[[int], LoraWork],
    ) -> None:
        """``work`` gives the LoraWork of a size; ``drawn`` are the tokens of the step before, at their one address."""
        self._decoder = decoder
        self._drawn = drawn
        self._sizes = sizes
        self._widths = widths
        self._work = work
        self._graphs: dict[tuple[int, int, bool], DecodeGraph] = {}
        self._logits = torch.empty(0)

    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture all, largest first, so that the smaller ones find its memory. On the stream that will replay them."""
        keys = list(self._keys())
        pool = torch.cuda.graph_pool_handle()
        for done, key in enumerate(keys):
            progress(f"capturing CUDA graphs: {done} of {len(keys)}")
            self._graphs[key] = self._capture(*key, pool)

    def find(self, sequences: int, blocks: int, adapted: bool) -> DecodeGraph | None:
        """The least graph that holds such a step; None where none was captured for it."""
        key = (bucket(sequences, self._sizes), bucket(blocks, self._widths), adapted)
        return self._graphs.get(key) if sequences <= self._sizes[-1] and blocks <= self._widths[-1] else None

    def _keys(self) -> Iterator[tuple[int, int, bool]]:
        for size in reversed(self._sizes):
            for width in reversed(self._widths):
                yield from ((size, width, adapted) for adapted in (True, False))

    def _capture(self, size: int, width: int, adapted: bool, pool: Any) -> DecodeGraph:
        step = StepBuffer(StepShape(size, size, width, size), self._drawn.device)
        step.source.fill_(-1)
        step.kv_slots.fill_(-1)
        step.slots.fill_(-1)
        step.seq_len.fill_(1)
        step.query_start.copy_(torch.arange(size + 1))
        step.sampled.copy_(torch.arange(size))
        batch = GpuAttentionBatch(step.query_start, step.seq_len, step.table)
        lora = self._work(size) if adapted else None

        def forward() -> torch.Tensor:
            return self._decoder.forward(step, self._drawn, batch, lora)

        # What is compiled, or allocated once, must be so before.
        logits = forward()
        if not self._logits.numel():  # of the largest batch; one for all graphs, as they run one after the other
            self._logits = torch.empty_like(logits)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._logits[:size].copy_(forward())
        return DecodeGraph(step, graph, self._logits[:size])
