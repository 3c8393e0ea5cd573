"""Times on a CUDA GPU: replays of captured graphs, so that no launch is waited for, and the memory's own speed."""

import statistics
from collections.abc import Callable
from typing import Protocol

import torch

COPY_BYTES = 2 << 30
ROUNDS = 5
WARM_UPS = 3


class Timer(Protocol):
    """Measures steps. Raises what a step raises where it does not compile or does not fit."""

    def ms(self, step: Callable[[], None]) -> float:
        """Milliseconds of one ``step``."""


class GraphTimer:
    """Median over rounds of replays; a round takes about ``seconds / ROUNDS``."""

    def __init__(self, seconds: float = 0.15) -> None:
        self._seconds = seconds

    def ms(self, step: Callable[[], None]) -> float:
        graph = capture(step)
        once_ms = _replays_ms(graph, 1)
        count = max(1, round(1e3 * self._seconds / ROUNDS / max(once_ms, 1e-3)))
        return statistics.median(_replays_ms(graph, count) / count for _ in range(ROUNDS))


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


def _replays_ms(graph: torch.cuda.CUDAGraph, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def copy_bytes_per_s(timer: Timer, size_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written by a second of copying within the device's memory; the best of three times."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    best_ms = min(timer.ms(lambda: _copy(target, source)) for _ in range(3))
    return 2 * size_bytes / (best_ms / 1e3)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
