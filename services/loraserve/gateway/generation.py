"""Runs the choices of one HTTP request on engines: routes them, reads their tokens, aborts unfinished choices."""

import asyncio
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
    """One choice: the message for the router, and the rules for turning its tokens into text.

    ``prompt`` is the index of the prompt within the HTTP request. ``param`` is the field that held the prompt.
    """

    prompt: int
    param: str
    route: Route
    rules: StopRules
    skip_special_tokens: bool


class Generation:
    """The running choices of one HTTP request."""

    def __init__(self, gateway: Gateway, choices: Sequence[ChoiceRequest], arrived_s: float) -> None:
        self._gateway = gateway
        self._choices = choices
        self._arrived_s = arrived_s
        self._ready: asyncio.Queue[Stream] = asyncio.Queue()
        """Streams with new output. If a stream is queued several times, the first ``take`` returns all its output."""
        self._last_token_s = [0.0] * len(choices)
        self._first_token_s = [0.0] * len(choices)
        self._unfinished = len(choices)
        # Open the streams before asking the router, so that every token finds its stream.
        self._streams = [
            gateway.streams.open(choice.route.request_id, index, self._ready.put_nowait)
            for index, choice in enumerate(choices)
        ]
        detokenizer = gateway.tokenizer.token_bytes.detokenizer
        self._outputs = [
            OutputAssembler(index, detokenizer(choice.skip_special_tokens), choice.rules)
            for index, choice in enumerate(choices)
        ]

    @property
    def engines(self) -> list[str]:
        return sorted({stream.engine for stream in self._streams})

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` object for the output so far. A prompt with several choices counts once."""
        prompts = {choice.prompt: len(choice.route.prompt_tokens) for choice in self._choices}
        cached = dict.fromkeys(prompts, 0)
        for choice, stream in zip(self._choices, self._streams, strict=True):
            cached[choice.prompt] = max(cached[choice.prompt], stream.cached_tokens)
        completion_tokens = sum(output.completion_tokens for output in self._outputs)
        prompt_tokens = sum(prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    async def route(self) -> None:
        """Ask the router for an engine for every choice. Raises ApiError if any choice gets none."""
        pairs = list(zip(self._choices, self._streams, strict=True))
        if len(pairs) == 1:
            await self._route(*pairs[0])
            return
        tasks = [asyncio.create_task(self._route(*pair)) for pair in pairs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def next_chunk(self) -> OutputChunk | None:
        """Return the next output of any choice, or None after all have finished. Raises ApiError if one fails."""
        while self._unfinished:
            stream = await self._ready.get()
            output = self._outputs[stream.choice]
            if output.finished:
                continue
            received = stream.take()
            self._observe_tokens(stream.choice, len(received.tokens))
            chunk = output.feed(received.tokens, received.logprobs, received.finish, received.stop_reason)
            if chunk.finish is not None:
                self._finish(stream, output, chunk.finish)
            if not chunk.is_empty:
                return chunk
        return None

    def close(self) -> None:
        """Abort the unfinished requests and close all streams."""
        now = self._gateway.clock.monotonic_s()
        for stream, output in zip(self._streams, self._outputs, strict=True):
            if stream.engine and not output.finished and stream.finish is None:
                reason = stream.failure.code or "" if stream.failure else "nobody_waits"
                self._gateway.abort(stream.engine, stream.request_id, reason)
            if stream.failure:
                self._gateway.tell_story(stream.request_id, f"failed: {stream.failure.message}")
            self._gateway.streams.close(stream, now)

    async def _route(self, choice: ChoiceRequest, stream: Stream) -> None:
        gateway = self._gateway
        asked_s = gateway.clock.monotonic_s()
        asking = asyncio.create_task(_ask_router(gateway, choice))
        try:
            routed = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The router may still send the request to an engine. That engine must then drop it.
            asking.add_done_callback(partial(_abort_if_routed, gateway))
            raise
        now = gateway.clock.monotonic_s()
        gateway.metrics.route_s.observe(now - asked_s)
        gateway.tell_story(stream.request_id, f"accepted by {routed.engine}, {routed.why}")
        for other in stream.set_engine(routed.engine, routed.incarnation, now):
            gateway.abort(other, stream.request_id, "routed_elsewhere")

    def _observe_tokens(self, index: int, tokens: int) -> None:
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
            self._gateway.tell_story(self._streams[index].request_id, "first token received")
            metrics.ttft_s.observe(now - self._arrived_s)

    def _finish(self, stream: Stream, output: OutputAssembler, reason: str) -> None:
        gateway, metrics = self._gateway, self._gateway.metrics
        now = gateway.clock.monotonic_s()
        if output.needs_abort and stream.finish is None:
            gateway.abort(stream.engine, stream.request_id, "stop_string")
        gateway.streams.close(stream, now)
        gateway.tell_story(stream.request_id, f"finished: {reason}, {output.completion_tokens} tokens")
        self._unfinished -= 1
        metrics.finished.labels(metrics.model_name, reason).inc()
        metrics.e2e_s.observe(now - self._arrived_s)
        metrics.prompt_length.observe(len(self._choices[output.index].route.prompt_tokens))
        metrics.output_length.observe(output.completion_tokens)
        first = self._first_token_s[output.index]
        if first and output.completion_tokens > 1:
            metrics.per_token_s.observe((now - first) / (output.completion_tokens - 1))


@asynccontextmanager
async def generation(gateway: Gateway, choices: Sequence[ChoiceRequest], arrived_s: float) -> AsyncIterator[Generation]:
    """Route the choices and yield their Generation. Requests unfinished at the end of the block are aborted."""
    run = Generation(gateway, choices, arrived_s)
    try:
        await run.route()
        gateway.metrics.prompt_tokens.inc(run.usage()["prompt_tokens"])
        yield run
    finally:
        run.close()


async def _ask_router(gateway: Gateway, choice: ChoiceRequest) -> Routed:
    try:
        answer = await _ask_twice(gateway, choice.route)
    except RequestTimeoutError as error:
        raise unavailable(f"The router did not answer ({error}); try again", "router_unavailable") from error
    except PeerError as error:
        raise refused(error.code, error.message, param=choice.param) from error
    match answer:
        case Routed():
            return answer
        case Rejected():
            raise refused(answer.code, answer.message, answer.retry_after_s, choice.param)
    raise TypeError(f"the router answered {type(answer).__name__}")


async def _ask_twice(gateway: Gateway, route: Route) -> Any:
    """Return the router's answer. If the router dies, ask again in the remaining time: the router restarts soon.

    The dead router may have sent the request to an engine. When its tokens arrive, that engine is told to abort.
    """
    timeout_s = gateway.config.gateway.route_timeout_s
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
