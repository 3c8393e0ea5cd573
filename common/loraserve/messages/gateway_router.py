"""Gateway -> router: route a request, or announce one."""

from loraserve.messages.base import AdapterRef, Message
from loraserve.messages.sampling import SamplingParams


class Route(Message, frozen=True, tag=True, kw_only=True):
    """Request: choose an engine for this request and admit it there. Answered by Routed or Rejected.

    ``gateway`` is the name of the process to which the engine sends the tokens. If the request was migrated, the last
    ``generated`` tokens of ``prompt_tokens`` are output of earlier attempts. The engines in ``avoid`` failed the
    request, so they are asked only if no other engine is ready.
    """

    request_id: str
    gateway: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    generated: int = 0
    avoid: tuple[str, ...] = ()


class Routed(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Route: the engine has admitted the request. ``why`` names the rule that selected the engine."""

    request_id: str
    engine: str
    incarnation: str
    why: str


class Rejected(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Route: no engine admitted the request.

    The usual values of ``code`` are ``no_engine`` and ``adapter_unavailable`` (HTTP status 503), ``overloaded`` (429),
    ``bad_request`` and ``context_length`` (400).
    """

    request_id: str
    code: str
    message: str
    retry_after_s: float = 1.0


class Expect(Message, frozen=True, tag=True, kw_only=True):
    """Announces a request for this adapter with an estimated number of ``prompt_tokens``. No answer."""

    adapter: AdapterRef
    prompt_tokens: int
