"""Gateway -> engine: nobody waits for this request any more."""

from loraserve.messages.base import Message


class Abort(Message, frozen=True, tag=True, kw_only=True):
    """Frees the request's blocks and pin within a step; unknown ids are ignored."""

    request_id: str
