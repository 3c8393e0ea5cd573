"""Runs simulations in parallel processes and prints progress messages."""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from loraserve.device import core_count
from loraserve.sim.runs import RunAll, RunFigures, RunSpec, run_figures

PROGRESS_INTERVAL_S = 2.0


@contextmanager
def parallel_runner(workers: int = 0, quiet: bool = False) -> Iterator[RunAll]:
    """Yield a ``RunAll`` with ``workers`` processes (0: one per core). Progress goes to stderr unless ``quiet``."""
    with ProcessPoolExecutor(max_workers=workers or core_count()) as pool:
        progress = _Progress(quiet)

        def run_all(specs: Sequence[RunSpec]) -> list[RunFigures]:
            # Start the longest runs first, so that no core waits for a long run that started last.
            ordered = sorted(range(len(specs)), key=lambda i: -specs[i].rps)
            futures = {pool.submit(run_figures, specs[i]): i for i in ordered}
            progress.add_runs(len(specs))
            figures: dict[int, RunFigures] = {}
            for future in as_completed(futures):
                figures[futures[future]] = future.result()
                progress.record_end(figures[futures[future]])
            return [figures[i] for i in range(len(specs))]

        yield run_all


class _Progress:
    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._runs = self._ended = 0
        self._started_s = self._shown_s = time.monotonic()

    def add_runs(self, count: int) -> None:
        self._runs += count

    def record_end(self, figures: RunFigures) -> None:
        self._ended += 1
        now = time.monotonic()
        if not self._quiet and now - self._shown_s >= PROGRESS_INTERVAL_S:
            self._shown_s = now
            run = f"{figures.policy} at {figures.rps:.1f} rps on {figures.engines} engines"
            text = f"{self._ended} of {self._runs} runs; {run}: P95 TTFT {figures.p95_ttft_s:.2f} s"
            print(f"[{now - self._started_s:6.1f} s] {text}", file=sys.stderr, flush=True)
