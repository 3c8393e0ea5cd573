"""Anyone -> any process: is it alive and ready?"""

from loraserve.messages.base import Message


class Ping(Message, frozen=True, tag=True, kw_only=True):
    """Answered by the service base class of every process."""


class Pong(Message, frozen=True, tag=True, kw_only=True):
    """``state`` is STARTING, READY, DRAINING or STOPPED; ``detail`` says in words what it waits for or holds."""

    name: str
    state: str
    incarnation: str
    pid: int
    protocol: int
    detail: str = ""
