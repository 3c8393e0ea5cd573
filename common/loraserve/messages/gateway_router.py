"""Gateway -> router: choose an engine for one request; the router admits it there and answers. Or one is to come."""

from loraserve.messages.base import AdapterRef, Message
from loraserve.messages.sampling import SamplingParams


class Route(Message, frozen=True, tag=True, kw_only=True):
    """A request ready to run. Its tokens go from the engine to ``gateway`` directly."""

    request_id: str
    gateway: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None


class Routed(Message, frozen=True, tag=True, kw_only=True):
    """The engine has the request. ``why`` says which rule chose it."""

    request_id: str
    engine: str
    incarnation: str
    why: str


class Rejected(Message, frozen=True, tag=True, kw_only=True):
    """No engine took it. ``code`` is ``no_engine`` (503), ``overloaded`` (429) or ``bad_request`` (400)."""

    request_id: str
    code: str
    message: str
    retry_after_s: float = 1.0


class Expect(Message, frozen=True, tag=True, kw_only=True):
    """A request for this adapter is about to come, of about so many tokens; no answer."""

    adapter: AdapterRef
    prompt_tokens: int
