"""Engine -> gateway: the tokens of each step, one message per gateway, and failures."""

import msgspec

from loraserve.messages.base import Message


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request.

    ``index`` is the output index of the first token, so that the gateway notices a lost message. ``finish`` is None
    while the request runs, else ``stop``, ``length`` or ``abort``; ``stop_reason`` is the stop token of the request
    that ended it (see ``loraserve.messages.stop``). ``logprobs`` is empty or has one entry a token: its own
    log-probability, then (token, log-probability) of the most likely tokens.
    """

    request_id: str
    index: int
    tokens: tuple[int, ...]
    finish: str | None = None
    cached_tokens: int = 0
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    stop_reason: int | None = None


class TokenBatch(Message, frozen=True, tag=True, kw_only=True):
    """Sent by an engine after each step, to each gateway with tokens in it. No answer."""

    engine: str
    incarnation: str
    deltas: tuple[TokenDelta, ...]


class Failed(Message, frozen=True, tag=True, kw_only=True):
    """Sent by an engine when a request fails. No answer.

    ``code`` is ``adapter_unavailable``, ``engine_error``, ``overloaded`` or another.
    """

    request_id: str
    engine: str
    code: str
    message: str
