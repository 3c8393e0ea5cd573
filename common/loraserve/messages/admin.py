"""Any process -> any process: ask for its state, or for the events of requests and adapters that it recorded."""

import msgspec

from loraserve.messages.base import Message


class Ping(Message, frozen=True, tag=True, kw_only=True):
    """Request: report the process's state. Answered by Pong."""


class Pong(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Ping. ``state`` is STARTING, READY, DRAINING or STOPPED. ``detail`` describes it in words."""

    name: str
    state: str
    incarnation: str
    pid: int
    protocol: int
    detail: str = ""


class TellStory(Message, frozen=True, tag=True, kw_only=True):
    """Request: return the recorded events of these request ids, adapter names or versions. Answered by StoryTold."""

    subjects: tuple[str, ...]


class StoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One event. ``unix_s`` is its wall-clock time, by which lines of several processes can be merged."""

    unix_s: float
    subject: str
    text: str


class StoryTold(Message, frozen=True, tag=True, kw_only=True):
    """Answer to TellStory. The events of each subject are in order, oldest first."""

    lines: tuple[StoryLine, ...]
