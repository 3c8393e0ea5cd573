"""Times on a CUDA GPU: replays of captured graphs, so that no launch is waited for, and the memory's own speed."""

import statistics
from collections.abc import Callable
from typing import Protocol

import torch

COPY_BYTES = 2 << 30
FLUSH_BYTES = 256 << 20
"""More than any L2 cache holds."""
LEAST_REPLAYS, MOST_REPLAYS = 5, 200
WARM_UPS = 3


class Timer(Protocol):
    """Measures steps. Raises what a step raises where it does not compile or does not fit."""

    def ms(self, step: Callable[[], None]) -> float:
        """Milliseconds of one ``step``."""


class GraphTimer:
    """Median of replays that take about ``seconds``, each with a cold L2 cache: a step that reads what it needs once
    reads it from memory, however little it is.

    A replay's start is part of it, a few microseconds: steps of many layers keep that small.
    """

    def __init__(self, seconds: float = 0.15) -> None:
        self._seconds = seconds
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def ms(self, step: Callable[[], None]) -> float:
        graph = capture(step)
        once_ms = statistics.median(self._replays_ms(graph, LEAST_REPLAYS))
        count = round(1e3 * self._seconds / max(once_ms, 1e-3))
        return statistics.median(self._replays_ms(graph, min(MOST_REPLAYS, max(LEAST_REPLAYS, count))))

    def _replays_ms(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        spans = []
        for _ in range(count):
            # By reading: lines that were written would be written back at the cost of the step.
            torch.sum(self._flush, dim=0, out=self._sum)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in spans]


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step as a graph, after runs that compile and allocate whatever it needs."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def copy_bytes_per_s(timer: Timer, size_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written by a second of copying within the device's memory; the best of three times."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    best_ms = min(timer.ms(lambda: _copy(target, source)) for _ in range(3))
    return 2 * size_bytes / (best_ms / 1e3)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
