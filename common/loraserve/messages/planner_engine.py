"""Planner -> engine: make the plan true here, before it is published; drop what it no longer wants, after."""

from loraserve.messages.base import AdapterRef, Message


class PreparePlan(Message, frozen=True, tag=True, kw_only=True):
    """Load and pin these copies. Answered by Prepared when all are resident or have failed.

    Epochs are a fence: an older one than an engine has heard of is refused, copy by copy.
    """

    epoch: int
    adapters: tuple[AdapterRef, ...]


class Prepared(Message, frozen=True, tag=True, kw_only=True):
    """``failed`` maps versions that could not be loaded to the reason in words."""

    engine: str
    incarnation: str
    epoch: int
    failed: dict[str, str]


class RetireCopies(Message, frozen=True, tag=True, kw_only=True):
    """Unpin everything prepared up to ``epoch`` except the versions in ``keep``.

    Unpinned adapters can be evicted once no request runs with them. Copies prepared for newer epochs stay pinned, so
    that a late message does no harm.
    """

    epoch: int
    keep: tuple[str, ...]


class RetireDone(Message, frozen=True, tag=True, kw_only=True):
    """How many copies lost their pin."""

    epoch: int
    unpinned: int
