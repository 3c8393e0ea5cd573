"""Engine -> gateway: tokens as they come, one message a gateway a step."""

import msgspec

from loraserve.messages.base import Message


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request.

    ``index`` is the output index of the first, so that a lost message is seen as a gap. ``finish`` is None while it
    runs, else ``stop``, ``length`` or ``abort``. ``logprobs`` has, per token, its own log-probability first and then
    (token, log-probability) of the most likely, or is empty.
    """

    request_id: str
    index: int
    tokens: tuple[int, ...]
    finish: str | None = None
    cached_tokens: int = 0
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()


class TokenBatch(Message, frozen=True, tag=True, kw_only=True):
    """Everything one step brought for one gateway. ``incarnation`` tells a restarted engine from its past self."""

    engine: str
    incarnation: str
    deltas: tuple[TokenDelta, ...]


class Failed(Message, frozen=True, tag=True, kw_only=True):
    """The request ended without finishing. ``code``: ``adapter_unavailable``, ``engine_error``, ``overloaded``, ..."""

    request_id: str
    engine: str
    code: str
    message: str
