"""Running one HTTP request's choices on engines: routed, read as one sequence of pieces, given up when nobody reads."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.context import ROUTER, Gateway
from loraserve.gateway.errors import refused, unavailable
from loraserve.gateway.streams import Stream
from loraserve.gateway.text.output import OutputAssembler, OutputChunk, StopRules
from loraserve.messages import Rejected, Route, Routed

ROUTER_ANSWER: Any = Routed | Rejected


class ChoiceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One choice: what the router gets, and how its tokens become text.

    ``prompt`` is the prompt's number, ``param`` the field it came in.
    """

    prompt: int
    param: str
    route: Route
    rules: StopRules
    skip_special_tokens: bool


class Mailbox:
    """Streams that have something to take, in the order in which they got it. One reader."""

    def __init__(self) -> None:
        self._ready: deque[Stream] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, stream: Stream) -> None:
        if stream not in self._ready:
            self._ready.append(stream)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Stream:
        while not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._ready.popleft()


class Generation:
    """The choices of one request in flight."""

    def __init__(self, gateway: Gateway, jobs: Sequence[ChoiceRequest], arrived_s: float) -> None:
        self._gateway = gateway
        self._jobs = jobs
        self._arrived_s = arrived_s
        self._mailbox = Mailbox()
        self._last_token_s = [0.0] * len(jobs)
        self._first_token_s = [0.0] * len(jobs)
        self._unfinished = len(jobs)
        self._streams = [
            gateway.streams.open(job.route.request_id, index, self._mailbox.put) for index, job in enumerate(jobs)
        ]
        detokenizer = gateway.tokenizer.pieces.detokenizer
        self._choices = [
            OutputAssembler(index, detokenizer(job.skip_special_tokens), job.rules) for index, job in enumerate(jobs)
        ]

    @property
    def engines(self) -> list[str]:
        return sorted({stream.engine for stream in self._streams})

    def usage(self) -> dict[str, Any]:
        """Prompts count once, however many choices continue them."""
        prompts = {job.prompt: len(job.route.prompt_tokens) for job in self._jobs}
        cached = dict.fromkeys(prompts, 0)
        for job, stream in zip(self._jobs, self._streams, strict=True):
            cached[job.prompt] = max(cached[job.prompt], stream.cached_tokens)
        completion_tokens = sum(choice.completion_tokens for choice in self._choices)
        prompt_tokens = sum(prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    async def route(self) -> None:
        """Every choice to an engine. Raises ApiError when one finds none."""
        pairs = list(zip(self._jobs, self._streams, strict=True))
        if len(pairs) == 1:
            await self._route(*pairs[0])
            return
        tasks = [asyncio.create_task(self._route(*pair)) for pair in pairs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def next(self) -> OutputChunk | None:
        """What is ready next of any choice, None when all have finished. Raises ApiError when one fails."""
        while self._unfinished:
            stream = await self._mailbox.get()
            choice = self._choices[stream.choice]
            if choice.finished:
                continue
            progress = stream.take()
            self._note_tokens(stream.choice, len(progress.tokens))
            piece = choice.feed(progress.tokens, progress.logprobs, progress.finish, progress.stop_reason)
            if piece.finish is not None:
                self._finish(stream, choice, piece.finish)
            if not piece.is_empty:
                return piece
        return None

    def close(self) -> None:
        """Give up what has not finished, and forget all."""
        now = self._gateway.clock.monotonic_s()
        for stream, choice in zip(self._streams, self._choices, strict=True):
            if stream.engine and not choice.finished and stream.finish is None:
                reason = stream.failure.code or "" if stream.failure else "nobody_waits"
                self._gateway.abort(stream.engine, stream.request_id, reason)
            if stream.failure:
                self._gateway.stories.story.tell(stream.request_id, now, f"failed: {stream.failure.message}")
            self._gateway.streams.close(stream, now)

    async def _route(self, job: ChoiceRequest, stream: Stream) -> None:
        gateway = self._gateway
        asked_s = gateway.clock.monotonic_s()
        timeout_s = gateway.config.gateway.route_timeout_s
        asking = asyncio.create_task(_ask_router(gateway, job, timeout_s))
        try:
            routed = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The request may still get to an engine: that one has to hear that nobody waits any more.
            asking.add_done_callback(partial(_abort_if_routed, gateway))
            raise
        now = gateway.clock.monotonic_s()
        gateway.metrics.route_s.observe(now - asked_s)
        gateway.stories.story.tell(stream.request_id, now, f"accepted by {routed.engine}, {routed.why}")
        for other in stream.routed(routed.engine, routed.incarnation, now):
            gateway.abort(other, stream.request_id, "routed_elsewhere")

    def _note_tokens(self, index: int, tokens: int) -> None:
        if not tokens:
            return
        metrics = self._gateway.metrics
        now = self._gateway.clock.monotonic_s()
        last = self._last_token_s[index]
        self._last_token_s[index] = now
        metrics.generation_tokens.inc(tokens)
        if last:
            for _ in range(tokens):
                metrics.inter_token_s.observe((now - last) / tokens)
        else:
            self._first_token_s[index] = now
            self._gateway.stories.story.tell(self._streams[index].request_id, now, "first token received")
            metrics.ttft_s.observe(now - self._arrived_s)

    def _finish(self, stream: Stream, choice: OutputAssembler, reason: str) -> None:
        gateway, metrics = self._gateway, self._gateway.metrics
        now = gateway.clock.monotonic_s()
        if choice.needs_abort and stream.finish is None:
            gateway.abort(stream.engine, stream.request_id, "stop_string")
        gateway.streams.close(stream, now)
        text = f"finished: {reason}, {choice.completion_tokens} tokens"
        gateway.stories.story.tell(stream.request_id, now, text)
        self._unfinished -= 1
        metrics.finished.labels(metrics.model_name, reason).inc()
        metrics.e2e_s.observe(now - self._arrived_s)
        metrics.prompt_length.observe(len(self._jobs[choice.index].route.prompt_tokens))
        metrics.output_length.observe(choice.completion_tokens)
        first = self._first_token_s[choice.index]
        if first and choice.completion_tokens > 1:
            metrics.per_token_s.observe((now - first) / (choice.completion_tokens - 1))


@asynccontextmanager
async def generation(gateway: Gateway, jobs: Sequence[ChoiceRequest], arrived_s: float) -> AsyncIterator[Generation]:
    """The jobs running on engines; whatever ends the block, nothing of them stays behind."""
    run = Generation(gateway, jobs, arrived_s)
    try:
        await run.route()
        gateway.metrics.prompt_tokens.inc(run.usage()["prompt_tokens"])
        yield run
    finally:
        run.close()


async def _ask_router(gateway: Gateway, job: ChoiceRequest, timeout_s: float) -> Routed:
    """Raises ApiError where no engine takes the request."""
    try:
        answer = await _ask_twice(gateway, job.route, timeout_s)
    except RequestTimeoutError as error:
        message = f"The router gave no answer ({error}); try again"
        raise unavailable(message, "router_unavailable") from error
    except PeerError as error:
        raise refused(error.code, error.message, param=job.param) from error
    match answer:
        case Routed():
            return answer
        case Rejected():
            raise refused(answer.code, answer.message, answer.retry_after_s, job.param)
    raise TypeError(f"the router answered {type(answer).__name__}")


async def _ask_twice(gateway: Gateway, route: Route, timeout_s: float) -> Any:
    """The router's answer. One that died is asked again, in the time that is left: it is soon restarted.

    An engine that took the request from the first router is told to stop once it sends tokens nobody waits for.
    """
    deadline_s = gateway.clock.monotonic_s() + timeout_s
    try:
        return await gateway.bus.request(ROUTER, route, ROUTER_ANSWER, timeout_s)
    except RequestTimeoutError:
        left_s = deadline_s - gateway.clock.monotonic_s()
        if left_s <= 0:
            raise
    return await gateway.bus.request(ROUTER, route, ROUTER_ANSWER, left_s)


def _abort_if_routed(gateway: Gateway, asking: "asyncio.Task[Routed]") -> None:
    if not asking.cancelled() and asking.exception() is None:
        routed = asking.result()
        gateway.abort(routed.engine, routed.request_id, "nobody_waits")
