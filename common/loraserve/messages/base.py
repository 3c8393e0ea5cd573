"""What all messages share: the protocol version, the base class and the values that several directions carry."""

import msgspec

PROTOCOL_VERSION = 6


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of every message; the class name is the tag."""


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a named adapter. ``version`` is the slab's digest, ``rank`` its largest rank."""

    name: str
    version: str
    rank: int
    slab_bytes: int


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How output tokens are drawn. Field names and meaning are OpenAI's and vLLM's.

    ``temperature`` 0 is greedy. ``seed`` None is replaced by the gateway, so that engines are always deterministic:
    the token at output index i depends on (seed, i) and the logits alone. ``logprobs`` None returns none, 0 only the
    drawn token's, n > 0 also the n most likely. Stop strings are the gateway's business.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
