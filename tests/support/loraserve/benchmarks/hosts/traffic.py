"""Steady streams of known greedy text against a gateway, and what happened to each of them."""

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from loraserve.errors import LoraServeError

STREAM_TIMEOUT_S = 90.0
"""A stream that has not ended after this time counts as failed."""
READY_TIMEOUT_S = 120.0
POLL_S = 0.2
INTERRUPTIONS = "loraserve_gateway_interruptions_total{"


class Question(NamedTuple):
    """A request with one possible answer, because it is greedy."""

    model: str
    prompt: str
    max_tokens: int


class Asked(NamedTuple):
    """The outcome of one stream. ``status`` is 0 if the connection failed."""

    question: Question
    began_s: float
    ended_s: float
    status: int
    text: str
    error: str
    retry_after: bool
    times_s: tuple[float, ...]
    """When each piece of text arrived."""
    engine: str

    @property
    def longest_gap_s(self) -> float:
        """Return the longest time without new text, from the request to its end."""
        times = (self.began_s, *self.times_s, self.ended_s)
        return max(after - before for before, after in itertools.pairwise(times))


class Counts(msgspec.Struct):
    """The outcomes of all streams of one cell.

    ``refused`` streams got status 503 with Retry-After. ``failed`` streams got any other error, ended early or did not
    end. ``corrupted`` streams returned text that is not the known text, or not its beginning if they failed.
    """

    sent: int = 0
    failed: int = 0
    corrupted: int = 0
    refused: int = 0
    longest_gap_s: float = 0.0
    notes: list[str] = msgspec.field(default_factory=list)

    def add(self, asked: Asked, expected: str) -> None:
        self.sent += 1
        self.longest_gap_s = max(self.longest_gap_s, asked.longest_gap_s)
        whole = not asked.error
        if asked.text != expected if whole else not expected.startswith(asked.text):
            self.corrupted += 1
            self.notes.append(f"corrupted: {asked.question} on {asked.engine}: {asked.text!r}")
        elif asked.status == 503 and asked.retry_after:
            self.refused += 1
            self.notes.append(f"refused: {asked.error}")
        elif not whole:
            self.failed += 1
            self.notes.append(f"failed on {asked.engine or 'no engine'}, status {asked.status}: {asked.error}")


async def ask(http: aiohttp.ClientSession, question: Question) -> Asked:
    """Send one greedy stream and read it to its end. Never raises for a fault of the cluster."""
    body = {
        "model": question.model,
        "prompt": question.prompt,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began_s = time.monotonic()
    text: list[str] = []
    times_s: list[float] = []
    status, error, retry_after, engine, finished = 0, "", False, "", False
    try:
        async with asyncio.timeout(STREAM_TIMEOUT_S), http.post("/v1/completions", json=body) as response:
            status, engine = response.status, response.headers.get("x-loraserve-engine", "")
            retry_after = "Retry-After" in response.headers
            if status != 200:
                error = (await response.text())[:300]
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    error = str(event["error"])[:300]
                for choice in event.get("choices", ()):
                    if choice["text"]:
                        text.append(choice["text"])
                        times_s.append(time.monotonic())
                    finished = finished or choice["finish_reason"] is not None
        if not finished and not error:
            error = "the stream ended without a finish reason"
    except TimeoutError:
        error = f"the stream did not end within {STREAM_TIMEOUT_S:.0f} s"
    except aiohttp.ClientError as fault:
        error = f"{type(fault).__name__}: {fault}"
    return Asked(question, began_s, time.monotonic(), status, "".join(text), error, retry_after, tuple(times_s), engine)


class Traffic:
    """``streams`` clients, each of which asks one question after the other. Sends nothing again."""

    def __init__(
        self, http: aiohttp.ClientSession, known: Mapping[Question, str], streams: int, counts: Counts
    ) -> None:
        self._http = http
        self._known = known
        self._questions = list(known)
        self._streams = streams
        self._counts = counts

    async def run(self, over: asyncio.Event) -> None:
        """Ask until ``over`` is set and all streams have ended."""
        await asyncio.gather(*(self._keep_asking(number, over) for number in range(self._streams)))

    async def _keep_asking(self, number: int, over: asyncio.Event) -> None:
        while not over.is_set():
            question = self._questions[number % len(self._questions)]
            number += self._streams + 1
            asked = await ask(self._http, question)
            self._counts.add(asked, self._known[question])
            if asked.status != 200:
                await asyncio.sleep(POLL_S)


async def learn_answers(http: aiohttp.ClientSession, questions: Sequence[Question]) -> dict[Question, str]:
    """Return the text of each question from the undisturbed cluster. Raises LoraServeError if two answers differ."""
    known: dict[Question, str] = {}
    for _ in range(2):
        for asked in await asyncio.gather(*(ask(http, question) for question in questions)):
            if asked.error:
                raise LoraServeError(f"{asked.question} failed without any disturbance: {asked.error}")
            if known.setdefault(asked.question, asked.text) != asked.text:
                raise LoraServeError(f"{asked.question} has two different greedy answers")
    if len(set(known.values())) < len(questions):
        raise LoraServeError("two questions have the same answer, so a mix-up would not be noticed")
    return known


async def cluster_state(http: aiohttp.ClientSession) -> dict[str, Any] | None:
    """Return the answer of /admin/cluster, or None if there is none."""
    try:
        async with http.get("/admin/cluster", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
            content: dict[str, Any] = await response.json()
            return content if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None


async def count_migrations(http: aiohttp.ClientSession) -> int:
    """Return how many attempts of streams ended early since the gateway's start."""
    async with http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(INTERRUPTIONS))


async def wait_ready(http: aiohttp.ClientSession, engines: Sequence[str], timeout_s: float = READY_TIMEOUT_S) -> None:
    """Wait until the gateway sees all engines alive and ready. Raises LoraServeError after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        state = await cluster_state(http)
        seen = {engine["name"]: engine for engine in (state or {"engines": ()})["engines"]}
        ready = [name for name in engines if name in seen and is_usable(seen[name])]
        if len(ready) == len(engines):
            return
        if time.monotonic() > deadline_s:
            raise LoraServeError(f"after {timeout_s:.0f} s only these engines are ready: {', '.join(ready) or 'none'}")
        await asyncio.sleep(POLL_S)


def is_usable(engine: Mapping[str, Any]) -> bool:
    return bool(engine["alive"]) and engine["load"]["state"] == "READY"
