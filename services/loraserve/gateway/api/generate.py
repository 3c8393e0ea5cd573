"""Answering a generation request, whole or as a stream of events; the endpoints differ in a Format."""

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from loraserve.gateway.api.schema import (
    INT64,
    MAX_CHOICES,
    GenerationRequest,
    output_limit,
    sampling_params,
    stop_rules,
)
from loraserve.gateway.context import ARRIVED_S, REQUEST_ID, Gateway, ServedModel
from loraserve.gateway.errors import ApiError, bad_request, context_exceeded, timed_out
from loraserve.gateway.generation import ChoiceRequest, Generation, generation
from loraserve.gateway.text.output import OutputChunk
from loraserve.messages import Route

Choices = list[dict[str, Any]]

CLIENT_LEFT = 499
"""Nobody reads it; it is what logs and metrics call a client that closed its connection."""


class Format(Protocol):
    """How pieces of choices look in one endpoint's answers."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def chunks(self, piece: OutputChunk) -> list[Choices]:
        """The ``choices`` of each event for this piece."""

    def whole(self, piece: OutputChunk) -> dict[str, Any]:
        """One finished choice, its pieces joined."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request ready to run."""

    id: str
    target: ServedModel
    jobs: list[ChoiceRequest]
    format: Format
    request: GenerationRequest


class Prompting(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint found out about its request: ``param`` names the prompt's field in error messages."""

    prompts: Sequence[Sequence[int]]
    param: str
    max_tokens: int | None
    logprobs: int | None


def plan_call(
    gateway: Gateway, request: GenerationRequest, target: ServedModel, format_: Format, prompting: Prompting
) -> Call:
    """The jobs of all choices. Raises ApiError 400 where prompt and output do not fit or choices are too many."""
    n = request.n or 1
    if n * len(prompting.prompts) > MAX_CHOICES:
        message = f"n: {n} choices of {len(prompting.prompts)} prompts are more than {MAX_CHOICES} in one request"
        raise bad_request(message, "n", "invalid_value")
    id_ = f"{format_.id_prefix}{secrets.token_hex(16)}"
    seed = secrets.randbelow(INT64) if request.seed is None else request.seed
    context, default = gateway.context_tokens(), gateway.config.gateway.default_max_tokens
    rules = stop_rules(request)
    jobs: list[ChoiceRequest] = []
    for number, prompt in enumerate(prompting.prompts):
        limit = output_limit(prompting.max_tokens, len(prompt), context, default, prompting.param)
        for choice in range(n):
            route = Route(
                request_id=f"{id_}-{len(jobs)}",
                gateway=gateway.bus.name,
                prompt_tokens=tuple(prompt),
                sampling=sampling_params(request, limit, prompting.logprobs, seed, choice),
                adapter=target.adapter,
            )
            skip = request.skip_special_tokens is not False
            job = ChoiceRequest(
                prompt=number, param=prompting.param, route=route, rules=rules, skip_special_tokens=skip
            )
            jobs.append(job)
    return Call(id=id_, target=target, jobs=jobs, format=format_, request=request)


def check_length(gateway: Gateway, characters: int, param: str) -> None:
    """Raises ApiError 400 for a text that cannot fit, before the work of tokenizing it."""
    context, fewest = gateway.context_tokens(), gateway.tokenizer.fewest_tokens(characters)
    if fewest >= context:
        raise context_exceeded(context, fewest, 1, param)


def check_count(gateway: Gateway, tokens: int, param: str) -> None:
    """Raises ApiError 400 for more token ids than fit, before the work of looking at each."""
    context = gateway.context_tokens()
    if tokens >= context:
        raise context_exceeded(context, tokens, 1, param)


async def answer(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """Run it and answer. Raises ApiError while nothing has been sent yet."""
    outcome, run = "cancelled", None
    timeout_s = gateway.config.gateway.request_timeout_s
    sending = Sending(request)
    send = _stream if call.request.stream else _whole
    ids = [job.route.request_id for job in call.jobs]
    gateway.stories.begin(request[REQUEST_ID], call.id, ids, gateway.clock.monotonic_s())
    try:
        try:
            async with asyncio.timeout(timeout_s), generation(gateway, call.jobs, request[ARRIVED_S]) as run:
                await send(gateway, call, run, sending)
        except TimeoutError as error:
            raise timed_out(timeout_s) from error
        outcome = "ok"
    except ApiError as error:
        outcome = error.code or "error"
        if sending.response is None:
            raise
        await fail_stream(request, sending.response, error)
    except ConnectionError:
        # The client left while something was written to it; engines have been told already.
        pass
    finally:
        gateway.metrics.requests.labels(call.target.name, outcome).inc()
        log_request(gateway, request, call, run, outcome)
        for id_ in ids:
            gateway.stories.story.tell(id_, gateway.clock.monotonic_s(), f"HTTP request ended: {outcome}")
    return sending.response or web.Response(status=CLIENT_LEFT)


def log_request(gateway: Gateway, request: web.Request, call: Call, run: Generation | None, outcome: str) -> None:
    """One line a request, whatever became of it."""
    usage = run.usage() if run else {}
    gateway.log.info(
        "request",
        request_id=request[REQUEST_ID],
        id=call.id,
        model=call.target.name,
        version=call.target.version,
        engines=run.engines if run else [],
        outcome=outcome,
        choices=len(call.jobs),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        duration_s=round(gateway.clock.monotonic_s() - request[ARRIVED_S], 4),
    )


class Sending:
    """The response as far as it got; headers wait for the first token, until then an error gets its own status."""

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self.response: web.StreamResponse | None = None

    async def write(self, data: bytes, headers: Mapping[str, str]) -> None:
        if self.response is None:
            self.response = await open_stream(self.request, headers)
        await self.response.write(data)


async def _whole(gateway: Gateway, call: Call, run: Generation, sending: Sending) -> None:
    pieces: list[list[OutputChunk]] = [[] for _ in call.jobs]
    while (piece := await run.next()) is not None:
        pieces[piece.choice].append(piece)
    choices = [call.format.whole(join(parts)) for parts in pieces]
    body = envelope(gateway, call, call.format.whole_object, choices) | {"usage": run.usage()}
    sending.response = web.Response(
        body=msgspec.json.encode(body), content_type="application/json", headers=answer_headers(call, run)
    )


async def _stream(gateway: Gateway, call: Call, run: Generation, sending: Sending) -> None:
    writer = ChunkWriter(gateway, call, run)
    headers = answer_headers(call, run)
    while (piece := await run.next()) is not None:
        await sending.write(writer.piece(piece), headers)
    await sending.write(writer.end(), headers)


class ChunkWriter:
    """Pieces to events."""

    def __init__(self, gateway: Gateway, call: Call, run: Generation) -> None:
        self._format = call.format
        self._run = run
        options = call.request.stream_options
        self._usage = bool(options and options.include_usage)
        self._running_usage = bool(options and options.continuous_usage_stats) and self._usage
        self._envelope = envelope(gateway, call, call.format.chunk_object, [])

    def piece(self, piece: OutputChunk) -> bytes:
        usage = self._usage_field(self._run.usage() if self._running_usage else None)
        return events([self._envelope | {"choices": choices} | usage for choices in self._format.chunks(piece)])

    def end(self) -> bytes:
        if not self._usage:
            return DONE
        return events([self._envelope | self._usage_field(self._run.usage())]) + DONE

    def _usage_field(self, usage: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"usage": usage} if self._usage else {}


def envelope(gateway: Gateway, call: Call, object_: str, choices: Choices) -> dict[str, Any]:
    """What every answer and every chunk of it has. ``system_fingerprint`` is the adapter version applied."""
    return {
        "id": call.id,
        "object": object_,
        "created": int(gateway.clock.unix_s()),
        "model": call.target.name,
        "system_fingerprint": call.target.version,
        "choices": choices,
    }


def answer_headers(call: Call, run: Generation) -> dict[str, str]:
    headers = {"x-loraserve-engine": ",".join(run.engines)}
    if call.target.version:
        headers["x-loraserve-adapter-version"] = call.target.version
    return headers


def join(parts: Sequence[OutputChunk]) -> OutputChunk:
    """All pieces of one finished choice as one."""
    return OutputChunk(
        parts[0].choice,
        "".join(part.text for part in parts),
        tuple(scored for part in parts for scored in part.scored),
        parts[-1].finish,
        parts[-1].stop_reason,
    )


# MERGED: loraserve.gateway.api.generate
# """Server-sent events, as OpenAI's clients read them."""


DONE = b"data: [DONE]\n\n"
LAST_WORDS_S = 1.0

_encoder = msgspec.json.Encoder()


def events(payloads: Iterable[Mapping[str, Any]]) -> bytes:
    """One event a payload, to be written together."""
    return b"".join([b"data: " + _encoder.encode(payload) + b"\n\n" for payload in payloads])


async def open_stream(request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
    """Status and headers go out; what fails from now on is told by an event."""
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    response.charset = "utf-8"
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    await response.prepare(request)
    return response


async def fail_stream(request: web.Request, response: web.StreamResponse, error: ApiError) -> None:
    """The error as the last event; a client that does not read even that is cut off."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            await response.write(events([error.body]) + DONE)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
