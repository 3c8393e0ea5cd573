"""Planner -> engine: load the copies of a plan before it is published, and unpin those of older plans after."""

from loraserve.messages.base import AdapterRef, Message


class PreparePlan(Message, frozen=True, tag=True, kw_only=True):
    """Request: load and pin these copies. Answered by Prepared when all are resident or have failed.

    If the engine has seen a newer epoch, all copies fail.
    """

    epoch: int
    adapters: tuple[AdapterRef, ...]


class Prepared(Message, frozen=True, tag=True, kw_only=True):
    """Answer to PreparePlan. ``failed`` maps versions that could not be loaded to the reason in words."""

    engine: str
    incarnation: str
    epoch: int
    failed: dict[str, str]


class RetireCopies(Message, frozen=True, tag=True, kw_only=True):
    """Request: unpin all copies prepared up to ``epoch`` except ``keep`` (versions). Answered by RetireDone.

    They are evicted when memory is needed and no request uses them. Copies prepared for newer epochs stay pinned, so a
    late message does no harm.
    """

    epoch: int
    keep: tuple[str, ...]


class RetireDone(Message, frozen=True, tag=True, kw_only=True):
    """Answer to RetireCopies: how many copies were unpinned."""

    epoch: int
    unpinned: int
