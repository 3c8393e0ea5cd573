"""The steps of answering a generation request.

The endpoints differ in steps 1 and 2, which are in ``api/chat.py`` and ``api/completions.py``. Steps 3 to 5 are here.

1. The endpoint checks the body, finds the model and checks the sizes.
2. The endpoint turns the prompts into tokens. The result is a ``Call``.
3. ``choice_requests`` gives each choice its output limit and its sampling parameters.
4. ``Generation`` (``gateway/generation.py``) routes the choices to engines and returns their output in chunks.
5. ``Answer`` writes the chunks as server-sent events, or joins them into one JSON body.
"""

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from loraserve.gateway.api.limits import output_limit
from loraserve.gateway.api.schema import INT64, GenerationRequest, sampling_params, stop_rules
from loraserve.gateway.context import ARRIVED_S, REQUEST_ID, Gateway, ServedModel
from loraserve.gateway.errors import ApiError, timed_out
from loraserve.gateway.generation import ChoiceRequest, Generation, generation
from loraserve.gateway.text.output import OutputChunk
from loraserve.messages import Route

Choices = list[dict[str, Any]]

CLIENT_LEFT = 499
"""Status in metrics for a request whose client closed the connection. The client never receives it."""

LEAST_LOGPROB = -9999.0
"""Lower bound of log-probabilities in answers, because JSON cannot represent minus infinity."""

DONE = b"data: [DONE]\n\n"
LAST_EVENT_TIMEOUT_S = 1.0

_encoder = msgspec.json.Encoder()


class Format(Protocol):
    """Converts output chunks to the answer format of one endpoint."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def events(self, chunk: OutputChunk) -> list[Choices]:
        """Return the server-sent events for this chunk, each as the value of its ``choices`` field."""

    def whole(self, output: OutputChunk) -> dict[str, Any]:
        """Return the entry in ``choices`` for one finished choice, given all its output."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A checked and tokenized request. ``param`` is the request field that held the prompt, for error messages."""

    request: GenerationRequest
    model: ServedModel
    format: Format
    prompts: Sequence[tuple[int, ...]]
    param: str
    logprobs: int | None


def choice_requests(gateway: Gateway, call: Call, answer_id: str) -> list[ChoiceRequest]:
    """Return a request for each choice. Raises ApiError 400 for empty prompts and unusable token limits."""
    request = call.request
    seed = secrets.randbelow(INT64) if request.seed is None else request.seed
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    context, default = gateway.context_tokens(), gateway.config.gateway.default_max_tokens
    rules = stop_rules(request)
    choices: list[ChoiceRequest] = []
    for number, prompt in enumerate(call.prompts):
        limit = output_limit(asked, len(prompt), context, default, call.param)
        for choice in range(request.n or 1):
            route = Route(
                request_id=f"{answer_id}-{len(choices)}",
                gateway=gateway.bus.name,
                prompt_tokens=prompt,
                sampling=sampling_params(request, limit, call.logprobs, seed, choice),
                adapter=call.model.adapter,
            )
            choices.append(
                ChoiceRequest(
                    prompt=number,
                    param=call.param,
                    route=route,
                    rules=rules,
                    skip_special_tokens=request.skip_special_tokens is not False,
                )
            )
    return choices


async def answer(gateway: Gateway, http: web.Request, call: Call) -> web.StreamResponse:
    """Run the call on engines and send the answer. After the headers are sent, an ApiError becomes the last event."""
    answer_id = f"{call.format.id_prefix}{secrets.token_hex(16)}"
    choices = choice_requests(gateway, call, answer_id)
    reply = Answer(gateway, http, call, answer_id)
    request_ids = [choice.route.request_id for choice in choices]
    gateway.stories.begin(http[REQUEST_ID], answer_id, request_ids, gateway.clock.monotonic_s())
    outcome, run = "cancelled", None
    timeout_s = gateway.config.gateway.request_timeout_s
    try:
        try:
            async with asyncio.timeout(timeout_s), generation(gateway, choices, http[ARRIVED_S]) as run:
                await (reply.stream(run) if call.request.stream else reply.send_whole(run))
        except TimeoutError as error:
            raise timed_out(timeout_s) from error
        outcome = "ok"
    except ApiError as error:
        outcome = error.code or "error"
        if reply.response is None:
            raise
        await reply.send_error(reply.response, error)
    except ConnectionError:
        # The client closed the connection during a write. ``generation`` has aborted the requests.
        pass
    finally:
        gateway.metrics.requests.labels(call.model.name, outcome).inc()
        reply.log(run, outcome, len(choices))
        for request_id in request_ids:
            gateway.tell_story(request_id, f"HTTP request ended: {outcome}")
    return reply.response or web.Response(status=CLIENT_LEFT)


class Answer:
    """The HTTP answer to one call. Headers are sent with the first chunk, so that earlier errors can set the status."""

    def __init__(self, gateway: Gateway, http: web.Request, call: Call, answer_id: str) -> None:
        self.response: web.StreamResponse | None = None
        self._gateway = gateway
        self._http = http
        self._call = call
        self._id = answer_id
        options = call.request.stream_options
        self._sends_usage = bool(options and options.include_usage)
        self._sends_running_usage = self._sends_usage and bool(options and options.continuous_usage_stats)

    async def send_whole(self, run: Generation) -> None:
        """Wait until all choices finish, then set ``response`` to one JSON body."""
        chunks: dict[int, list[OutputChunk]] = {}
        while (chunk := await run.next_chunk()) is not None:
            chunks.setdefault(chunk.choice, []).append(chunk)
        format_ = self._call.format
        choices = [format_.whole(join(chunks[index])) for index in sorted(chunks)]
        body = self._envelope(format_.whole_object, choices) | {"usage": run.usage()}
        self.response = web.Response(
            body=_encoder.encode(body), content_type="application/json", headers=self._headers(run)
        )

    async def stream(self, run: Generation) -> None:
        """Send each chunk as a server-sent event when it arrives."""
        format_ = self._call.format
        envelope = self._envelope(format_.chunk_object, [])
        while (chunk := await run.next_chunk()) is not None:
            usage = self._usage_field(run.usage() if self._sends_running_usage else None)
            data = encode_events([envelope | {"choices": choices} | usage for choices in format_.events(chunk)])
            await self._write(data, run)
        last = encode_events([envelope | self._usage_field(run.usage())]) if self._sends_usage else b""
        await self._write(last + DONE, run)

    async def send_error(self, response: web.StreamResponse, error: ApiError) -> None:
        """Send the error as the last event. Aborts the connection if the client does not read it in time."""
        try:
            async with asyncio.timeout(LAST_EVENT_TIMEOUT_S):
                await response.write(encode_events([error.body]) + DONE)
        except TimeoutError:
            if self._http.transport is not None:
                self._http.transport.abort()

    def log(self, run: Generation | None, outcome: str, choices: int) -> None:
        usage = run.usage() if run else {}
        self._gateway.log.info(
            "request",
            request_id=self._http[REQUEST_ID],
            id=self._id,
            model=self._call.model.name,
            version=self._call.model.version,
            engines=run.engines if run else [],
            outcome=outcome,
            choices=choices,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            duration_s=round(self._gateway.clock.monotonic_s() - self._http[ARRIVED_S], 4),
        )

    async def _write(self, data: bytes, run: Generation) -> None:
        if self.response is None:
            response = web.StreamResponse(headers=self._headers(run))
            response.content_type = "text/event-stream"
            response.charset = "utf-8"
            response.headers["Cache-Control"] = "no-cache"
            response.headers["X-Accel-Buffering"] = "no"
            await response.prepare(self._http)
            self.response = response
        await self.response.write(data)

    def _envelope(self, object_: str, choices: Choices) -> dict[str, Any]:
        """Return the fields common to whole answers and events. ``system_fingerprint`` is the adapter version."""
        return {
            "id": self._id,
            "object": object_,
            "created": int(self._gateway.clock.unix_s()),
            "model": self._call.model.name,
            "system_fingerprint": self._call.model.version,
            "choices": choices,
        }

    def _usage_field(self, usage: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"usage": usage} if self._sends_usage else {}

    def _headers(self, run: Generation) -> dict[str, str]:
        headers = {"x-loraserve-engine": ",".join(run.engines)}
        if self._call.model.version:
            headers["x-loraserve-adapter-version"] = self._call.model.version
        return headers


def encode_events(payloads: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join([b"data: " + _encoder.encode(payload) + b"\n\n" for payload in payloads])


def join(chunks: Sequence[OutputChunk]) -> OutputChunk:
    """Merge all chunks of one finished choice into one."""
    return OutputChunk(
        choice=chunks[0].choice,
        text="".join(chunk.text for chunk in chunks),
        scored=tuple(scored for chunk in chunks for scored in chunk.scored),
        finish=chunks[-1].finish,
        stop_reason=chunks[-1].stop_reason,
    )
