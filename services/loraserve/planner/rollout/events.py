"""What the roll-out of plans is told, and what it tells the planner to do. Plain data, no behaviour."""

from collections.abc import Mapping

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Placement, Plan


class Begin(msgspec.Struct, frozen=True):
    """Make this the plan. One that is still being prepared is given up for it."""

    placements: tuple[Placement, ...]
    adapters: Mapping[str, AdapterRef]
    drained: frozenset[str]
    unix_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """A plan that is still being prepared is not wanted any more; one that is written stays."""


class EnginesSeen(msgspec.Struct, frozen=True):
    """The engines that are alive and READY now; one that is not among them, or is another incarnation, was lost."""

    engines: tuple[EngineLoad, ...]
    adapters: Mapping[str, AdapterRef]


class PrepareAnswered(msgspec.Struct, frozen=True):
    engine: str
    incarnation: str
    epoch: int
    failed: Mapping[str, str]


class PrepareFailed(msgspec.Struct, frozen=True):
    """Silence or a refusal: of its copies those are there that its last report says it holds."""

    engine: str
    epoch: int
    reason: str


class Written(msgspec.Struct, frozen=True):
    epoch: int


class WriteFailed(msgspec.Struct, frozen=True):
    epoch: int
    reason: str


class RetireEnded(msgspec.Struct, frozen=True):
    """Answered or not: a pin too many costs memory only, and is seen in the engine's reports."""

    engine: str
    epoch: int


Event = Begin | GiveUp | EnginesSeen | PrepareAnswered | PrepareFailed | Written | WriteFailed | RetireEnded


class Prepare(msgspec.Struct, frozen=True):
    """Answered by PrepareAnswered or PrepareFailed."""

    engine: str
    epoch: int
    adapters: tuple[AdapterRef, ...]


class Write(msgspec.Struct, frozen=True):
    """Answered by Written or WriteFailed before any other event."""

    plan: Plan


class Publish(msgspec.Struct, frozen=True):
    plan: Plan


class Retire(msgspec.Struct, frozen=True):
    """Answered by RetireEnded."""

    engine: str
    epoch: int
    keep: tuple[str, ...]


class Ended(msgspec.Struct, frozen=True):
    """A roll-out is over. ``failed`` says in words what was not done."""

    epoch: int
    applied: bool
    failed: tuple[str, ...]


class Replan(msgspec.Struct, frozen=True):
    """An engine that a plan had to do without is back."""

    engine: str


Instruction = Prepare | Write | Publish | Retire | Ended | Replan
