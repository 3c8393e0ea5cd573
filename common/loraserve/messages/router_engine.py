"""Router -> engine: run a request, or load an adapter for an expected request."""

from loraserve.messages.base import AdapterRef, Message
from loraserve.messages.sampling import SamplingParams


class Admit(Message, frozen=True, tag=True, kw_only=True):
    """Request: run this request and send its tokens to ``gateway``. Answered by Admitted.

    An Admit for a request that is still running changes nothing. The last ``generated`` tokens of ``prompt_tokens``
    are output of earlier attempts on other engines. The engine computes their KV and continues the output after them.
    """

    request_id: str
    gateway: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    generated: int = 0


class Admitted(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Admit. If ``ok`` is False, the engine refused for the reason in ``code`` and ``message``."""

    request_id: str
    incarnation: str
    ok: bool = True
    code: str = ""
    message: str = ""


class ExpectAdapter(Message, frozen=True, tag=True, kw_only=True):
    """Announces a request for this adapter. The engine loads it if that delays no other request. No answer."""

    adapter: AdapterRef
