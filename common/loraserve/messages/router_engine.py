"""Router -> engine: run this request, or one is to come."""

from loraserve.messages.base import AdapterRef, Message
from loraserve.messages.sampling import SamplingParams


class Admit(Message, frozen=True, tag=True, kw_only=True):
    """Tokens go to the process named ``gateway``. Repeating a request id that is live changes nothing."""

    request_id: str
    gateway: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None


class Admitted(Message, frozen=True, tag=True, kw_only=True):
    """``ok`` False: refused for good (``code``, ``message`` as in Rejected); another engine may be tried."""

    request_id: str
    incarnation: str
    ok: bool = True
    code: str = ""
    message: str = ""


class ExpectAdapter(Message, frozen=True, tag=True, kw_only=True):
    """A request for this adapter is about to come: have it there, if that costs nobody anything. No answer."""

    adapter: AdapterRef
