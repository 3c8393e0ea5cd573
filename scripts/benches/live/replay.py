"""Replays a workload over HTTP. Each request is sent at its time, even if earlier requests are slow or failed."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import aiohttp
import msgspec

from live.scene import prompt_of
from loraserve.sim.outcome import percentile
from loraserve.sim.workload import SimRequest, Workload

TIMEOUT_S = 60.0


class Served(msgspec.Struct):
    """The outcome of a request; times are in seconds since the replay began.

    ``due_s`` is when the request should be sent. ``error`` is "" if it succeeded.
    """

    due_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    end_s: float | None = None
    engine: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Return the time since ``due_s``, so that a late client does not improve it; infinite on failure."""
        return inf if self.first_s is None or self.error else self.first_s - self.due_s


class Replayed(NamedTuple):
    """The counted requests in order of arrival, without those of the warm-up."""

    served: Sequence[Served]

    def ttft_s(self, share: float) -> float | None:
        """Return a percentile of TTFT, or None if too many requests failed."""
        found = percentile((s.ttft_s for s in self.served), share)
        return found if isfinite(found) else None

    def goodput_rps(self, slo_s: float) -> float | None:
        """Return the requests per second whose first token came within ``slo_s``."""
        if len(self.served) < 2:
            return None
        met = sum(s.ttft_s <= slo_s for s in self.served)
        return met / (self.served[-1].due_s - self.served[0].due_s)

    @property
    def errors(self) -> int:
        return sum(bool(s.error) for s in self.served)

    @property
    def late_s(self) -> float:
        """Return the P95 of the delays with which the load generator sent requests."""
        return percentile((s.sent_s - s.due_s for s in self.served), 0.95)

    @property
    def engines(self) -> dict[str, int]:
        """Return the number of requests by engine."""
        found: dict[str, int] = {}
        for one in self.served:
            found[one.engine] = found.get(one.engine, 0) + 1
        return dict(sorted(found.items()))


async def replay(
    url: str, workload: Workload, vocab: int, warmup: float, progress: Callable[[int], None] = lambda ended: None
) -> Replayed:
    """Stream all requests. The first ``warmup`` fraction is not counted. ``progress`` gets the number of ended ones."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as http:
        began_s = time.perf_counter()
        ended = 0

        async def one(index: int, request: SimRequest) -> Served:
            nonlocal ended
            served = Served(due_s=request.time_s)
            await asyncio.sleep(began_s + request.time_s - time.perf_counter())
            body = body_of(index, request, workload, vocab)
            await stream(http, url, body, served, lambda: time.perf_counter() - began_s)
            ended += 1
            progress(ended)
            return served

        served = await asyncio.gather(*(one(index, request) for index, request in enumerate(workload.requests)))
    return Replayed(served[int(len(served) * warmup) :])


def body_of(index: int, request: SimRequest, workload: Workload, vocab: int) -> dict[str, Any]:
    return {
        "model": workload.adapters[request.adapter].name,
        "prompt": prompt_of(index, request.prompt_tokens, vocab),
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }


async def stream(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any], served: Served, now_s: Callable[[], float]
) -> None:
    """Stream one request and write its outcome to ``served``. Server errors do not raise."""
    served.sent_s = now_s()
    try:
        async with http.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                served.error = f"{response.status}: {(await response.text())[:200]}"
                return
            served.engine = response.headers.get("x-loraserve-engine", "")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _note(line, served, now_s())
    except (aiohttp.ClientError, TimeoutError) as error:
        served.error = f"{type(error).__name__}: {error}"
    if served.end_s is None and not served.error:
        served.error = "the stream ended without a finish_reason"


def _note(line: bytes, served: Served, now_s: float) -> None:
    # Only the first and the last piece are parsed, to keep the load generator fast.
    if served.first_s is None or b'"error"' in line or b'"finish_reason":null' not in line:
        event = json.loads(line[6:])
        if event.get("error"):
            served.error = str(event["error"])[:200]
        for choice in event.get("choices", ()):
            if choice["text"] and served.first_s is None:
                served.first_s = now_s
            if choice["finish_reason"]:
                served.end_s = now_s
