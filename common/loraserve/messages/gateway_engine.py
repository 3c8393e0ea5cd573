"""Gateway (or router) -> engine: abort a request."""

from loraserve.messages.base import Message


class Abort(Message, frozen=True, tag=True, kw_only=True):
    """Stop a request, free its KV blocks and release its adapter within a step. Unknown ids are ignored. No answer."""

    request_id: str
