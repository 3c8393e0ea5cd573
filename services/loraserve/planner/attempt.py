"""One roll-out under way, as the machine in rollout.py keeps it. Pure."""

from enum import StrEnum

import msgspec

from loraserve.messages import Plan
from loraserve.planner.copies import Copy
from loraserve.planner.events import Begin


class Phase(StrEnum):
    IDLE = "IDLE"
    PREPARING = "PREPARING"
    WRITING = "WRITING"
    RETIRING = "RETIRING"


class Attempt(msgspec.Struct):
    """``incarnations`` are of engines that were asked and not lost since, ``silent`` those of them that did not answer
    in time, ``absent`` copies not there, with reasons."""

    epoch: int
    begin: Begin
    incarnations: dict[str, str]
    waiting: set[str]
    absent: dict[Copy, str]
    silent: set[str] = msgspec.field(default_factory=set)
    phase: Phase = Phase.PREPARING
    plan: Plan | None = None
    applied: bool = False
    refused: str = ""

    @property
    def failed(self) -> tuple[str, ...]:
        failed = [f"{engine}: {reason}" for (engine, _), reason in sorted(self.absent.items())]
        return (*failed, self.refused) if self.refused else tuple(failed)
