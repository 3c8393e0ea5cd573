"""The events that a roll-out handles, and the instructions that it returns."""

from collections.abc import Mapping

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Placement, Plan


class Begin(msgspec.Struct, frozen=True):
    """Roll out these placements as a new plan, and end any earlier roll-out. Not allowed in phase ``WRITING``."""

    placements: tuple[Placement, ...]
    adapters: Mapping[str, AdapterRef]
    drained: frozenset[str]
    unix_s: float


class Cancel(msgspec.Struct, frozen=True):
    """Cancel the roll-out if engines are still preparing. In any other phase this has no effect."""


class EnginesSeen(msgspec.Struct, frozen=True):
    """The engines that are alive and READY. An engine that is missing here or has a new incarnation was lost."""

    engines: tuple[EngineLoad, ...]
    adapters: Mapping[str, AdapterRef]


class PrepareAnswered(msgspec.Struct, frozen=True):
    """An engine answered a ``Prepare``. ``failed`` maps the adapter versions that it could not load to reasons."""

    engine: str
    incarnation: str
    epoch: int
    failed: Mapping[str, str]


class PrepareFailed(msgspec.Struct, frozen=True):
    """An engine refused a ``Prepare`` or did not answer. Only copies pinned in its last report count as prepared."""

    engine: str
    epoch: int
    reason: str


class Written(msgspec.Struct, frozen=True):
    """The plan is on disk."""

    epoch: int


class WriteFailed(msgspec.Struct, frozen=True):
    """The plan could not be written. The file still holds the earlier plan."""

    epoch: int
    reason: str


class RetireEnded(msgspec.Struct, frozen=True):
    """A Retire request was answered or failed. After a failure, the engine's reports show the pins that remain."""

    engine: str
    epoch: int


Event = Begin | Cancel | EnginesSeen | PrepareAnswered | PrepareFailed | Written | WriteFailed | RetireEnded


class Prepare(msgspec.Struct, frozen=True):
    """Ask an engine to load and pin adapters. PrepareAnswered or PrepareFailed follows."""

    engine: str
    epoch: int
    adapters: tuple[AdapterRef, ...]


class Write(msgspec.Struct, frozen=True):
    """Write the plan to disk. ``Written`` or ``WriteFailed`` must follow before any ``Begin``."""

    plan: Plan


class Publish(msgspec.Struct, frozen=True):
    """Send the plan to the routers."""

    plan: Plan


class Retire(msgspec.Struct, frozen=True):
    """Ask an engine to unpin all adapter versions except ``keep``. RetireEnded follows."""

    engine: str
    epoch: int
    keep: tuple[str, ...]


class RolloutEnded(msgspec.Struct, frozen=True):
    """A roll-out ended. ``applied``: its plan is in force. ``failed``: descriptions of the failures."""

    epoch: int
    applied: bool
    failed: tuple[str, ...]


class Replan(msgspec.Struct, frozen=True):
    """Make a new plan, because an engine that an earlier roll-out left out has restarted."""

    engine: str


Instruction = Prepare | Write | Publish | Retire | RolloutEnded | Replan
