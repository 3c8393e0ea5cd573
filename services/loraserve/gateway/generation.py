"""Runs the choices of one HTTP request on engines: routes them, reads their tokens, migrates and aborts them.

``loraserve.gateway.migration`` decides which interrupted requests are migrated to another engine. The client does not
notice a migration: the next attempt continues the output after the tokens that were received.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec

from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.context import ROUTER, Gateway
from loraserve.gateway.errors import ApiError, refused, unavailable
from loraserve.gateway.migration import Cause, Verdict, quarantined
from loraserve.gateway.streams import Stream, StreamState
from loraserve.gateway.text.output import OutputAssembler, OutputChunk, StopRules
from loraserve.messages import Rejected, Route, Routed

ROUTER_ANSWER: Any = Routed | Rejected
FIRST_RETRY_S, LONGEST_RETRY_S = 0.05, 1.0
"""Time between two requests to the router for the same attempt, and before later attempts. It doubles each time."""
DEADLINE_MARGIN_S = 0.1
"""The wait for the router ends this long before the request's deadline, so that the error names the router."""
TRIAL_S = 10.0
"""Longest time for which one suspect keeps others from being tried."""
TEMPORARY = frozenset(("no_engine", "overloaded", "starting", "timeout", "draining", "adapter_unavailable"))
"""Codes of refusals after which a migrated request asks the router again."""


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
        self._migrations: dict[Stream, asyncio.Task[None]] = {}
        self._trials: dict[Stream, asyncio.Event] = {}
        self._engines: set[str] = set()
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
        """All engines that ran a part of the request."""
        return sorted(self._engines)

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
        for choice in self._choices:
            self._gateway.quarantine.check(choice.route, self._arrived_s)
        if len(pairs) == 1:
            await self._route(*pairs[0], self._choices[0].route)
            return
        tasks = [asyncio.create_task(self._route(*pair, pair[0].route)) for pair in pairs]
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
            if stream in self._trials and (received.tokens or stream.state is not StreamState.RUNNING):
                self._trials[stream].set()
            if chunk.finish is not None:
                self._finish(stream, output, chunk.finish)
            elif stream.state is StreamState.INTERRUPTED:
                self._migrate(self._choices[stream.choice], stream)
            if not chunk.is_empty:
                return chunk
        return None

    def close(self) -> None:
        """Abort the unfinished requests and close all streams."""
        now = self._gateway.clock.monotonic_s()
        for task in self._migrations.values():
            task.cancel()
        for stream, output in zip(self._streams, self._outputs, strict=True):
            if stream.engine and not output.finished and stream.finish is None:
                reason = stream.failure.code or "" if stream.failure else "nobody_waits"
                self._gateway.abort(stream.engine, stream.request_id, reason)
            if stream.failure:
                self._gateway.tell_story(stream.request_id, f"failed: {stream.failure.message}")
            self._gateway.streams.close(stream, now)

    def _migrate(self, choice: ChoiceRequest, stream: Stream) -> None:
        """Begin the next attempt of an interrupted stream, or fail it."""
        gateway, interruption = self._gateway, stream.interruption
        assert interruption is not None, "only interrupted streams are migrated"
        verdict, now = stream.decide(), gateway.clock.monotonic_s()
        gateway.metrics.interruptions.labels(interruption.cause.value, verdict.value).inc()
        gateway.tell_story(
            stream.request_id,
            f"interrupted after {stream.received_tokens} tokens, {verdict.value}: {interruption.error.message}",
        )
        if interruption.cause in (Cause.SILENT, Cause.LOST):
            gateway.abort(stream.engine, stream.request_id, "migrated")
        if verdict is Verdict.QUARANTINE:
            gateway.quarantine.add(choice.route, now)
            gateway.log.error("request_quarantined", request=stream.first_id, engine=interruption.engine)
            stream.fail(quarantined())
        elif verdict is Verdict.GIVE_UP:
            stream.fail(interruption.error)
        else:
            gateway.streams.begin_attempt(stream, now)
            gateway.stories.add_attempt(stream.first_id, stream.request_id)
            attempt = self._attempt(choice, stream, alone=verdict is Verdict.TRY_ALONE)
            self._migrations[stream] = asyncio.create_task(attempt)

    async def _attempt(self, choice: ChoiceRequest, stream: Stream, alone: bool) -> None:
        route = msgspec.structs.replace(
            choice.route,
            request_id=stream.request_id,
            prompt_tokens=(*choice.route.prompt_tokens, *stream.output),
            generated=stream.received_tokens,
            avoid=stream.attempts.avoid,
        )
        if stream.attempts.failed > 1:
            await asyncio.sleep(min(FIRST_RETRY_S * 2 ** (stream.attempts.failed - 2), LONGEST_RETRY_S))
        try:
            await (self._try_alone if alone else self._route_again)(choice, stream, route)
        except ApiError as error:
            interruption = stream.interruption
            stream.fail(interruption.error if interruption and error.code in TEMPORARY else error)

    async def _try_alone(self, choice: ChoiceRequest, stream: Stream, route: Route) -> None:
        """Run the attempt of a suspect while no other suspect of this gateway runs, until its first token."""
        async with self._gateway.trial:
            self._gateway.quarantine.check(choice.route, self._gateway.clock.monotonic_s())
            tried = self._trials[stream] = asyncio.Event()
            stream.attempts.on_trial = True
            try:
                await self._route_again(choice, stream, route)
                with suppress(TimeoutError):
                    await asyncio.wait_for(tried.wait(), TRIAL_S)
            finally:
                stream.attempts.on_trial = False
                del self._trials[stream]

    async def _route_again(self, choice: ChoiceRequest, stream: Stream, route: Route) -> None:
        """Route the next attempt. While no engine takes it, ask again until gateway.migrate_timeout_s have passed."""
        clock, timeout_s = self._gateway.clock, self._gateway.config.gateway.migrate_timeout_s
        deadline_s, wait_s = clock.monotonic_s() + timeout_s, FIRST_RETRY_S
        while True:
            try:
                await self._route(choice, stream, route)
                return
            except ApiError as error:
                if error.code not in TEMPORARY or clock.monotonic_s() + wait_s > deadline_s:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    async def _route(self, choice: ChoiceRequest, stream: Stream, route: Route) -> None:
        gateway = self._gateway
        asked_s = gateway.clock.monotonic_s()
        deadline_s = self._arrived_s + gateway.config.gateway.request_timeout_s - DEADLINE_MARGIN_S
        abandoned = asyncio.Event()
        asking = asyncio.create_task(_ask_router(gateway, route, choice.param, deadline_s, abandoned))
        try:
            routed = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The router may still send the request to an engine. That engine must then drop it.
            abandoned.set()
            asking.add_done_callback(partial(_abort_if_routed, gateway))
            raise
        now = gateway.clock.monotonic_s()
        gateway.metrics.route_s.observe(now - asked_s)
        gateway.tell_story(stream.request_id, f"accepted by {routed.engine}, {routed.why}")
        self._engines.add(routed.engine)
        for other in gateway.streams.set_engine(stream, routed.engine, routed.incarnation, now):
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


async def _ask_router(
    gateway: Gateway, route: Route, param: str, deadline_s: float, abandoned: asyncio.Event
) -> Routed:
    """Return the router's answer. Raises ApiError if the router refuses, or does not answer until the deadline."""
    try:
        answer = await _ask_until_answered(gateway, route, deadline_s, abandoned)
    except RequestTimeoutError as error:
        raise unavailable(f"The router did not answer ({error}); try again", "router_unavailable") from error
    except PeerError as error:
        raise refused(error.code, error.message, param=param) from error
    match answer:
        case Routed():
            return answer
        case Rejected():
            raise refused(answer.code, answer.message, answer.retry_after_s, param)
    raise TypeError(f"the router answered {type(answer).__name__}")


async def _ask_until_answered(gateway: Gateway, route: Route, deadline_s: float, abandoned: asyncio.Event) -> Any:
    """Ask the router, and ask again if it dies or its answer is lost. A router that restarts needs a few seconds.

    After ``abandoned`` is set, it is not asked again. Otherwise the router would start all requests whose clients left
    during its absence. While the router routes a request, it gives the same answer to all questions about it. A router
    that died may have sent the request to an engine. That engine is told to abort it when its tokens arrive.
    """
    wait_s = FIRST_RETRY_S
    while True:
        left_s = deadline_s - gateway.clock.monotonic_s()
        timeout_s = max(0.0, min(gateway.config.gateway.route_timeout_s, left_s))
        try:
            return await gateway.bus.request(ROUTER, route, ROUTER_ANSWER, timeout_s)
        except (RequestTimeoutError, PeerError) as error:
            is_refusal = isinstance(error, PeerError) and error.code != "starting"
            if is_refusal or gateway.clock.monotonic_s() + wait_s >= deadline_s:
                raise
            await asyncio.sleep(wait_s)
            if abandoned.is_set():
                raise
        wait_s = min(2 * wait_s, LONGEST_RETRY_S)


def _abort_if_routed(gateway: Gateway, asking: "asyncio.Task[Routed]") -> None:
    if not asking.cancelled() and asking.exception() is None:
        routed = asking.result()
        gateway.abort(routed.engine, routed.request_id, "nobody_waits")
