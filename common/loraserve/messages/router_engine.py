"""Router -> engine: run a request; load an adapter for one that will follow."""

from loraserve.messages.base import AdapterRef, Message
from loraserve.messages.sampling import SamplingParams


class Admit(Message, frozen=True, tag=True, kw_only=True):
    """Request: run this request and send its tokens to ``gateway``. Answered by Admitted.

    Repeating the id of a request that is still running changes nothing.
    """

    request_id: str
    gateway: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None


class Admitted(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Admit. If not ``ok``, the engine refused; ``code`` and ``message`` are as in Rejected."""

    request_id: str
    incarnation: str
    ok: bool = True
    code: str = ""
    message: str = ""


class ExpectAdapter(Message, frozen=True, tag=True, kw_only=True):
    """Announces a request for this adapter: load it if no other request is delayed by that. No answer."""

    adapter: AdapterRef
