"""Streams completions over HTTP and measures tokens/s and the time to the first token of any server."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import aiohttp

from harness.report import BenchError

MAX_TOKENS = 24
DECODE_TOKENS = 64
TIMEOUT_S = 300.0

Body = Callable[[str], dict[str, Any]]
"""Returns the request fields that select an adapter ("" is the base model)."""


class Stream(NamedTuple):
    """One stream: its start, the time of each piece, and ``tokens`` as counted by the server."""

    tokens: int
    started_s: float
    times_s: list[float]

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.started_s

    @property
    def decode_tok_s(self) -> float:
        """Return the tokens/s after the first token."""
        return (self.tokens - 1) / (self.times_s[-1] - self.times_s[0])


class LoadResult(NamedTuple):
    tok_s: float
    ttft_s: float
    decode_tok_s: float
    """Mean over the streams."""


async def complete(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any], prompt: str | Sequence[int], tokens: int
) -> Stream:
    """Stream exactly ``tokens`` greedy tokens. Raises BenchError with the server's answer on failure."""
    request = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    started_s = time.perf_counter()
    times_s: list[float] = []
    counted = 0
    async with http.post(f"{url}/v1/completions", json=request) as response:
        if response.status != 200:
            raise BenchError(f"{url} answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("error"):
                raise BenchError(f"{url} failed in a stream: {event['error']}")
            if event.get("choices") and event["choices"][0].get("text"):
                times_s.append(time.perf_counter())
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if counted != tokens or not times_s:
        raise BenchError(f"{url} returned {counted} tokens in {len(times_s)} pieces, expected {tokens}")
    return Stream(counted, started_s, times_s)


def session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))


async def load(url: str, bodies: Sequence[dict[str, Any]], first_prompt: int, tokens: int) -> LoadResult:
    """Run one stream for each body concurrently, each with its own prompt."""
    async with session() as http:
        started_s = time.perf_counter()
        streams = await asyncio.gather(
            *(complete(http, url, body, prompt(first_prompt + i), tokens) for i, body in enumerate(bodies))
        )
        took_s = time.perf_counter() - started_s
    total = sum(stream.tokens for stream in streams)
    count = len(streams)
    return LoadResult(
        total / took_s, sum(s.ttft_s for s in streams) / count, sum(s.decode_tok_s for s in streams) / count
    )


def prompt(number: int) -> str:
    """Return a prompt of about 40 tokens. It begins with the number, so that no prefix cache applies."""
    return (
        f"{number} is the number of this letter. Dear friend, last week I walked through the old harbour town and "
        "saw the fishing boats come home in the evening light. Then"
    )
