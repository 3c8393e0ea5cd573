"""Planner -> engine: load the copies of a plan before its publication, and unpin older copies after it."""

from loraserve.messages.base import AdapterRef, Message


class PreparePlan(Message, frozen=True, tag=True, kw_only=True):
    """Request: load and pin these copies. Answered by Prepared when each is resident or has failed.

    All copies fail if the engine has received a newer epoch.
    """

    epoch: int
    adapters: tuple[AdapterRef, ...]


class Prepared(Message, frozen=True, tag=True, kw_only=True):
    """Answer to PreparePlan. ``failed`` maps the versions that could not be loaded to the reasons in words."""

    engine: str
    incarnation: str
    epoch: int
    failed: dict[str, str]


class RetireCopies(Message, frozen=True, tag=True, kw_only=True):
    """Request: unpin all copies prepared up to ``epoch`` except ``keep`` (versions). Answered by RetireDone.

    The engine evicts unpinned copies when it needs memory and no request uses them. Copies of newer epochs stay pinned,
    so a late message has no effect on them.
    """

    epoch: int
    keep: tuple[str, ...]


class RetireDone(Message, frozen=True, tag=True, kw_only=True):
    """Answer to RetireCopies. ``unpinned`` is the number of copies unpinned."""

    epoch: int
    unpinned: int
