"""Any process -> any process: is it alive and ready, and what does it know of a request or an adapter?"""

import msgspec

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


class TellStory(Message, frozen=True, tag=True, kw_only=True):
    """Asks for everything the process knows of these request ids, adapter names or versions. Answer: StoryTold."""

    subjects: tuple[str, ...]


class StoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One event. ``unix_s`` is the process's wall clock, so that lines of several processes can be merged."""

    unix_s: float
    subject: str
    text: str


class StoryTold(Message, frozen=True, tag=True, kw_only=True):
    """The process's lines about the subjects, oldest first for each subject."""

    lines: tuple[StoryLine, ...]
