"""Sends requests for random adapters to the gateway, and checks every text."""

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import aiohttp

from chaotic.counts import Counts
from chaotic.routing import Routing
from chaotic.truth import Case

DEADLINE_S = 180.0
"""For one request with all its attempts. A request waits while each engine that may run its adapter restarts, which
takes a minute on a busy machine."""


class Traffic:
    """Writes outcomes to ``counts``. Every request is sent once."""

    def __init__(
        self, http: aiohttp.ClientSession, routing: Routing, cases: Sequence[Case], rng: Random, counts: Counts
    ) -> None:
        self._http = http
        self._routing = routing
        self._cases = cases
        self._by_adapter = _by_adapter(cases)
        self._rng = rng
        self._counts = counts
        self._seeds = itertools.count(1)

    async def keep_asking(self, until: asyncio.Event) -> None:
        """Send requests one after the other until the event is set."""
        while not until.is_set():
            await self.serve(self._rng.choice(self._cases))

    async def serve_for(self, adapter: str, engine: str) -> None:
        """Send a random prompt for this adapter, whose first attempt runs on this engine."""
        await self.serve(self._rng.choice(self._by_adapter[adapter]), engine)

    def may_run(self, engine: str, adapter: str) -> bool:
        """Return whether a request for the adapter may run on the engine."""
        return self._routing.may_run((engine, adapter))

    async def serve(self, case: Case, first: str = "", deadline_s: float = DEADLINE_S) -> None:
        """Send a request, wait for its end and check its text."""
        self._counts.requests += 1
        seed = next(self._seeds)
        self._routing.expect(seed, first)
        text: list[str] = []
        error = ""
        try:
            async with asyncio.timeout(deadline_s):
                error = await self._ask(case, seed, text)
        except TimeoutError:
            self._counts.stuck_requests += 1
            self._counts.note(f"a request for {case.adapter} had not ended after {deadline_s:.0f} s")
            error = "stuck"
        except aiohttp.ClientError as lost:
            error = f"{type(lost).__name__} {lost}"
            self._fail(case, error)
        finally:
            self._routing.forget(seed)
        self._check(case, "".join(text), finished=not error)

    async def _ask(self, case: Case, seed: int, text: list[str]) -> str:
        """Add the pieces of the answer to ``text``. Returns the error with which the request ended, or ""."""
        async with self._http.post("/v1/completions", json=_body(case, seed)) as response:
            if response.status != 200:
                return self._fail(case, f"{response.status} {(await response.text())[:200]}")
            finish = None
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("error"):
                    return self._fail(case, str(event["error"].get("message")))
                for choice in event["choices"]:
                    text.append(choice["text"])
                    finish = choice["finish_reason"] or finish
            if finish is None:
                return self._fail(case, "the stream ended early")
            self._counts.tokens += len(case.tokens)
            return ""

    def _check(self, case: Case, text: str, finished: bool) -> None:
        """Count a wrong text. An unfinished text must be a prefix of the right one."""
        if not (text == case.text if finished else case.text.startswith(text)):
            self._counts.wrong_texts += 1
            self._counts.note(f"{case.adapter} answered {text!r}, should answer {case.text!r}")

    def _fail(self, case: Case, error: str) -> str:
        self._counts.failed_requests += 1
        self._counts.note(f"a request for {case.adapter} failed: {error}")
        return error


def _body(case: Case, seed: int) -> dict[str, Any]:
    return {
        "model": case.adapter,
        "prompt": list(case.prompt),
        "max_tokens": len(case.tokens),
        "temperature": 0,
        "ignore_eos": True,
        "seed": seed,
        "stream": True,
    }


def _by_adapter(cases: Sequence[Case]) -> Mapping[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.adapter, []).append(case)
    return found
