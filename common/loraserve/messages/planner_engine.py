"""Planner -> engine: make the plan true here, before it is published; drop what it no longer wants, after."""

from loraserve.messages.base import AdapterRef, Message


class PreparePlan(Message, frozen=True, tag=True, kw_only=True):
    """Load and pin these copies. Answered by Prepared when all are resident or have failed."""

    epoch: int
    adapters: tuple[AdapterRef, ...]


class Prepared(Message, frozen=True, tag=True, kw_only=True):
    """``failed`` maps versions that could not be loaded to the reason in words."""

    engine: str
    incarnation: str
    epoch: int
    failed: dict[str, str]


class RetireCopies(Message, frozen=True, tag=True, kw_only=True):
    """Unpin everything but ``keep`` (versions); it goes when memory is wanted and nobody runs it."""

    epoch: int
    keep: tuple[str, ...]


class RetireDone(Message, frozen=True, tag=True, kw_only=True):
    """How many copies lost their pin."""

    epoch: int
    unpinned: int
