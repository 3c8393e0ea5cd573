"""Measures, at the client of a real cluster, whether loading an adapter delays the streams of other requests."""

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import aiohttp

from harness.http_load import Stream, complete, prompt, session
from harness.our_cluster import OurCluster
from harness.report import Number, rounded, say, table
from loraserve.model_shape import ModelShape
from loraserve.testing.tiny_model import write_peft_adapter

RANK = 64
STREAMS = 4
TOKENS = 320
STEADY_AFTER_S = 1.5
BETWEEN_S = 0.4
SHORTEST_PROMPT = (1,)
"""The prompt of the request that triggers the load: one token, so that its prefill costs almost nothing."""

Span = tuple[float, float]


class Gaps(NamedTuple):
    """Seconds between tokens of the running streams: the median, and the longest gap during each event."""

    median_s: float
    quiet_s: float
    loading_s: list[float]
    resident_s: list[float]

    def longest_steps(self) -> float:
        """Return the longest gap of all loads, in median steps."""
        return rounded(max(self.loading_s) / self.median_s)

    def figures(self) -> dict[str, Number]:
        return {
            "gap_median_step_ms": self.median_s * 1e3,
            "gap_quiet_steps": self.quiet_s / self.median_s,
            "gap_request_for_resident_steps": max(self.resident_s) / self.median_s,
        }

    def tables(self) -> str:
        rows = [["nothing else", self.quiet_s * 1e3, self.quiet_s / self.median_s]]
        for what, gaps in (("a request that loads rank 64", self.loading_s), ("the same, resident", self.resident_s)):
            rows += [[what, gap * 1e3, gap / self.median_s] for gap in gaps]
        title = f"Longest gap between tokens of {STREAMS} base streams (median step {self.median_s * 1e3:.1f} ms)"
        return table(title, ["meanwhile", "ms", "steps"], rows)


def write_rank64(folder: Path, shape: ModelShape, count: int) -> dict[str, Path]:
    """Write ``count`` adapters of rank 64 on all seven projections, unless they exist."""
    made = {}
    for index in range(count):
        name = f"rank{RANK}-{index}"
        made[name] = folder / name
        if not (folder / name / "adapter_model.safetensors").exists():
            write_peft_adapter(folder / name, shape, RANK, seed=100 + index, strength=0.05, dtype="bfloat16")
    return made


def measure(cluster: OurCluster, adapters: Mapping[str, Path]) -> Gaps:
    """Request each adapter twice while streams run: the first request loads it, for the second it is resident."""
    say("gaps between tokens while rank-64 adapters are loaded")
    return asyncio.run(_measure(cluster, list(adapters)))


async def _measure(cluster: OurCluster, names: Sequence[str]) -> Gaps:
    async with session() as http:
        await complete(http, cluster.url, cluster.body(""), prompt(80_000), 8)
        running = [
            asyncio.create_task(complete(http, cluster.url, cluster.body(""), prompt(90_000 + index), TOKENS))
            for index in range(STREAMS)
        ]
        await asyncio.sleep(STEADY_AFTER_S)
        steady_s = time.perf_counter()
        loading = [await _ask(http, cluster, name) for name in names]
        resident = [await _ask(http, cluster, name) for name in names]
        streams = await asyncio.gather(*running)
    end_s = min(stream.times_s[-1] for stream in streams)
    assert resident[-1][1] < end_s, "the streams ended before the last load did"
    gaps = _gaps(streams, steady_s, end_s)
    quiet = [gap for (begin, end), gap in gaps if not any(_meet((begin, end), span) for span in loading + resident)]
    return Gaps(
        statistics.median(quiet),
        max(quiet),
        [_longest(gaps, span) for span in loading],
        [_longest(gaps, span) for span in resident],
    )


async def _ask(http: aiohttp.ClientSession, cluster: OurCluster, name: str) -> Span:
    """Request one token. Returns when the request began and ended."""
    begin_s = time.perf_counter()
    await complete(http, cluster.url, cluster.body(name), SHORTEST_PROMPT, 1)
    end_s = time.perf_counter()
    await asyncio.sleep(BETWEEN_S)
    return begin_s, end_s


def _gaps(streams: Sequence[Stream], begin_s: float, end_s: float) -> list[tuple[Span, float]]:
    spans = [span for stream in streams for span in pairwise(stream.times_s) if begin_s < span[0] and span[1] <= end_s]
    return [(span, span[1] - span[0]) for span in spans]


def _longest(gaps: Sequence[tuple[Span, float]], event: Span) -> float:
    return max(gap for span, gap in gaps if _meet(span, event))


def _meet(span: Span, event: Span) -> bool:
    return span[0] < event[1] and event[0] < span[1]
