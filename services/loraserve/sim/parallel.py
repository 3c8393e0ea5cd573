"""Simulations side by side on the machine's cores, with progress."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from loraserve.device import core_count
from loraserve.sim.runs import Job, Point, point

SAY_EVERY_S = 2.0


@contextmanager
def spread(
    workers: int = 0, say: Callable[[str], None] | None = None
) -> Iterator[Callable[[Sequence[Job]], list[Point]]]:
    """A function that simulates jobs, in their order; ``workers`` 0 is one for each core."""
    with ProcessPoolExecutor(max_workers=workers or core_count()) as pool:
        counter = _Counter(say or _to_stderr)

        def run(jobs: Sequence[Job]) -> list[Point]:
            # Longest first: the batch then ends with short ones, and no core waits for a long one.
            ordered = sorted(range(len(jobs)), key=lambda i: -jobs[i].rps)
            futures = {pool.submit(point, jobs[i]): i for i in ordered}
            counter.begun(len(jobs))
            points: dict[int, Point] = {}
            for future in as_completed(futures):
                points[futures[future]] = future.result()
                counter.ended(points[futures[future]])
            return [points[i] for i in range(len(jobs))]

        yield run


class _Counter:
    """Says every few seconds how far it is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begun = self._ended = 0
        self._started_s = self._said_s = time.monotonic()

    def begun(self, jobs: int) -> None:
        self._begun += jobs

    def ended(self, point: Point) -> None:
        self._ended += 1
        now = time.monotonic()
        if now - self._said_s >= SAY_EVERY_S:
            self._said_s = now
            what = (
                f"{point.policy} at {point.rps:.1f} rps on {point.engines} engines: P95 TTFT {point.p95_ttft_s:.2f} s"
            )
            self._say(f"[{now - self._started_s:6.1f} s] {self._ended} of {self._begun} runs; {what}")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
