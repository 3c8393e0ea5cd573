"""Sends greedy requests whose answers are known, and notes how each ends."""

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import aiohttp
from harness.report import BenchError

STREAMS, WHOLE = 8, 2
"""Requests that run at the same time, streamed and not streamed."""
MAX_TOKENS = 40
QUESTIONS = ("Tell me about the sea.", "Describe a winter evening.", "What does a baker do?")
REQUEST_TIMEOUT_S = 120.0
RETRY_S = 0.2


class Outcome(Enum):
    """How a request ended."""

    OK = "ok"
    FAILED = "failed"
    CORRUPTED = "corrupted"
    REFUSED = "refused"
    """503 with Retry-After, before the first token."""
    CUT = "cut"
    """The connection was lost, as it must be if its gateway is killed."""


class Case(NamedTuple):
    """A request and the text of its answer."""

    model: str
    question: str
    text: str = ""

    def body(self, stream: bool) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }


@dataclass
class Request:
    """One request: its times in seconds on the monotonic clock, and how it ended."""

    case: Case
    streamed: bool
    sent_s: float
    sender: int = 0
    outcome: Outcome = Outcome.FAILED
    why: str = ""
    engine: str = ""
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    def longest_wait_s(self) -> float:
        """Return the longest time without a token, also before the first."""
        times_s = [self.sent_s, *self.times_s, self.ended_s]
        return max(after - before for before, after in itertools.pairwise(times_s))

    def longest_gap_s(self) -> float | None:
        """Return the longest time between two tokens, or None if there are not two."""
        return max((after - before for before, after in itertools.pairwise(self.times_s)), default=None)


async def find_truth(http: aiohttp.ClientSession, models: Sequence[str], questions: int) -> list[Case]:
    """Ask each model the questions on the undisturbed cluster. Raises BenchError if one fails or two models agree."""
    cases = []
    for question in QUESTIONS[:questions]:
        requests = [Request(Case(model, question), False, time.monotonic()) for model in models]
        await asyncio.gather(*(ask(http, request) for request in requests))
        for request in requests:
            if not request.text:
                raise BenchError(f"{request.case.model} does not answer on the undisturbed cluster: {request.why}")
            cases.append(request.case._replace(text=request.text))
    if len({case.text for case in cases}) < len(cases):
        raise BenchError("two models give the same answer, so that a mix-up of adapters would not be seen")
    return cases


async def ask(http: aiohttp.ClientSession, request: Request) -> None:
    """Send a request, and note its outcome."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            body = request.case.body(request.streamed)
            async with http.post("/v1/chat/completions", json=body) as response:
                request.engine = response.headers.get("x-loraserve-engine", "")
                if response.status != 200:
                    _note_refusal(request, response, await response.text())
                elif request.streamed:
                    await _read_stream(request, response)
                else:
                    answer = await response.json()
                    request.text = answer["choices"][0]["message"]["content"]
                    _judge(request, finished=True)
    except aiohttp.ClientConnectorError as error:
        request.why = f"no connection: {error}"
    except (aiohttp.ClientError, ConnectionError) as error:
        request.outcome, request.why = Outcome.CUT, f"connection lost: {type(error).__name__} {error}"
    except TimeoutError:
        request.why = f"no end after {REQUEST_TIMEOUT_S:.0f} s, {len(request.text)} characters received"
    finally:
        request.ended_s = time.monotonic()


async def _read_stream(request: Request, response: aiohttp.ClientResponse) -> None:
    finish, error = None, None
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        error = event.get("error", error)
        for choice in event.get("choices", ()):
            finish = choice["finish_reason"] or finish
            if piece := choice["delta"].get("content"):
                request.text += piece
                request.times_s.append(time.monotonic())
    if error:
        request.why = f"{error.get('code')}: {error.get('message')}"
    elif not finish:
        request.outcome, request.why = Outcome.CUT, "the stream ended early"
    _judge(request, finished=bool(finish) and not error)


def _judge(request: Request, finished: bool) -> None:
    """Compare the text with the truth. An unfinished text must be a prefix of it."""
    if not request.case.text:
        return
    if finished and request.text == request.case.text:
        request.outcome = Outcome.OK
    elif finished or not request.case.text.startswith(request.text):
        request.outcome = Outcome.CORRUPTED
        request.why = f"{request.case.model}: {request.text!r} instead of {request.case.text!r}"


def _note_refusal(request: Request, response: aiohttp.ClientResponse, text: str) -> None:
    request.why = f"{response.status}: {text[:300]}"
    if response.status == 503 and "Retry-After" in response.headers:
        request.outcome = Outcome.REFUSED


class Traffic:
    """A steady load. ``requests`` are all requests since the last ``begin``."""

    def __init__(self, http: aiohttp.ClientSession, cases: Sequence[Case]) -> None:
        self.requests: list[Request] = []
        self._http = http
        self._cases = cases
        self._next = itertools.count()
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        self.requests = []
        self._over.clear()
        self._tasks = [asyncio.create_task(self._keep_asking(sender)) for sender in range(STREAMS + WHOLE)]

    async def end(self) -> None:
        """Send no more requests, and wait until all have ended."""
        self._over.set()
        await asyncio.gather(*self._tasks)

    def is_served_since(self, moment_s: float) -> bool:
        """Return whether each sender of streams got a token after ``moment_s``."""
        served = {each.sender for each in self.requests if each.times_s and each.times_s[-1] >= moment_s}
        return len(served) >= STREAMS

    async def _keep_asking(self, sender: int) -> None:
        while not self._over.is_set():
            case = self._cases[next(self._next) % len(self._cases)]
            request = Request(case, sender < STREAMS, time.monotonic(), sender)
            self.requests.append(request)
            await ask(self._http, request)
            if request.outcome is not Outcome.OK:
                await asyncio.sleep(RETRY_S)


async def post(http: aiohttp.ClientSession, path: str, body: Mapping[str, Any], timeout_s: float) -> tuple[int, str]:
    """Send an operator's command. Returns the status and the text; status 0 is no answer in time."""
    try:
        async with http.post(path, json=dict(body), timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return 0, str(error) or type(error).__name__
