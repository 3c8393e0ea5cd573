"""Events that a roll-out takes, and instructions that it returns. Plain data."""

from collections.abc import Mapping

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Placement, Plan


class Begin(msgspec.Struct, frozen=True):
    """Make these placements the plan. A roll-out that is still being prepared is cancelled for it."""

    placements: tuple[Placement, ...]
    adapters: Mapping[str, AdapterRef]
    drained: frozenset[str]
    unix_s: float


class Cancel(msgspec.Struct, frozen=True):
    """Cancel the roll-out if it is still being prepared; once a plan is being written it stays."""


class EnginesSeen(msgspec.Struct, frozen=True):
    """The engines that are alive and READY. Any other, or another incarnation of one, was lost."""

    engines: tuple[EngineLoad, ...]
    adapters: Mapping[str, AdapterRef]


class PrepareAnswered(msgspec.Struct, frozen=True):
    """An engine prepared its copies, except the versions in ``failed``, which have reasons."""

    engine: str
    incarnation: str
    epoch: int
    failed: Mapping[str, str]


class PrepareFailed(msgspec.Struct, frozen=True):
    """An engine refused or did not answer in time. Only the copies in its last report count as prepared."""

    engine: str
    epoch: int
    reason: str


class Written(msgspec.Struct, frozen=True):
    """The plan is on disk."""

    epoch: int


class WriteFailed(msgspec.Struct, frozen=True):
    """The plan could not be written; the file holds the plan before."""

    epoch: int
    reason: str


class RetireEnded(msgspec.Struct, frozen=True):
    """An engine answered a Retire or did not. Superfluous pins cost memory only, and its reports show them."""

    engine: str
    epoch: int


Event = Begin | Cancel | EnginesSeen | PrepareAnswered | PrepareFailed | Written | WriteFailed | RetireEnded


class Prepare(msgspec.Struct, frozen=True):
    """Ask an engine to load and pin adapters. The answer is PrepareAnswered or PrepareFailed."""

    engine: str
    epoch: int
    adapters: tuple[AdapterRef, ...]


class Write(msgspec.Struct, frozen=True):
    """Write the plan to disk. The answer is Written or WriteFailed; no Begin may come before it."""

    plan: Plan


class Publish(msgspec.Struct, frozen=True):
    """Send the plan to the routers."""

    plan: Plan


class Retire(msgspec.Struct, frozen=True):
    """Ask an engine to unpin everything but ``keep``. The answer is RetireEnded."""

    engine: str
    epoch: int
    keep: tuple[str, ...]


class RolloutEnded(msgspec.Struct, frozen=True):
    """A roll-out is over. ``failed`` lists in words what was not done."""

    epoch: int
    applied: bool
    failed: tuple[str, ...]


class Replan(msgspec.Struct, frozen=True):
    """Make a new plan: an engine that the last one had to do without is back."""

    engine: str


Instruction = Prepare | Write | Publish | Retire | RolloutEnded | Replan
