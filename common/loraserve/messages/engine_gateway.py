"""Engine -> gateway: the tokens of each step, one message per gateway, and failures."""

import msgspec

from loraserve.messages.base import Message


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request.

    ``index`` is the output index of the first token. The gateway detects lost messages with it. ``finish`` is None
    while the request runs, then ``stop`` or ``length``. If an id in ``stop_token_ids`` ended the output,
    ``stop_reason`` is that id. ``logprobs`` is empty or has one entry per token: the token's log-probability, then
    (token, log-probability) pairs of the most likely tokens.
    """

    request_id: str
    index: int
    tokens: tuple[int, ...]
    finish: str | None = None
    cached_tokens: int = 0
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    stop_reason: int | None = None


class TokenBatch(Message, frozen=True, tag=True, kw_only=True):
    """The new tokens of one step for one gateway. Sent by an engine after each step. No answer."""

    engine: str
    incarnation: str
    deltas: tuple[TokenDelta, ...]


class Failed(Message, frozen=True, tag=True, kw_only=True):
    """Reports that a request failed. No answer.

    The usual values of ``code`` are ``adapter_unavailable``, ``adapter_damaged`` (the output so far may be wrong),
    ``draining``, ``engine_error`` and ``overloaded``.
    """

    request_id: str
    engine: str
    code: str
    message: str
