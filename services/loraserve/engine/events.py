"""What the scheduler is told, and what it tells the engine to do. Plain data, no behaviour."""

import msgspec

from loraserve.engine.batch import StepBatch, StepResult
from loraserve.messages import AdapterRef, Admit, TokenDelta

CANCELLED = "cancelled"
"""The code of a load that ended because nobody wanted it: no failure of its adapter."""


class RequestArrived(msgspec.Struct, frozen=True):
    admit: Admit


class RequestAborted(msgspec.Struct, frozen=True):
    request_id: str


class StepDone(msgspec.Struct, frozen=True):
    result: StepResult


class StepFailed(msgspec.Struct, frozen=True):
    """The model could not compute the step; what it wrote to the KV cache is not to be trusted."""

    step_id: int
    message: str


class AdapterArriving(msgspec.Struct, frozen=True):
    """Some of an adapter that loads is there, by the read of this number, and the runner knows its layout.

    A step of at least ``least_tokens`` prefill tokens is expected to last until all of it is verified; None: no step
    is, or it is not worth it. Read numbers are never used again, and a read that fails is followed by another number.
    """

    version: str
    read: int
    least_tokens: int | None


class AdapterLoaded(msgspec.Struct, frozen=True):
    """``read`` is the one that was verified, 0 where nobody was told that it arrives."""

    version: str
    read: int = 0


class AdapterLoadFailed(msgspec.Struct, frozen=True):
    version: str
    code: str
    message: str


class AdapterDamaged(msgspec.Struct, frozen=True):
    """What lies in the extent of a resident adapter is not its slab any more: nothing computed with it is right."""

    version: str


class PlanPrepared(msgspec.Struct, frozen=True):
    """The planner wants these copies here."""

    epoch: int
    adapters: tuple[AdapterRef, ...]


class CopiesRetired(msgspec.Struct, frozen=True):
    """The planner no longer wants any copy of plans up to ``epoch`` but ``keep`` (versions)."""

    epoch: int
    keep: tuple[str, ...]


class AdapterExpected(msgspec.Struct, frozen=True):
    """A request for it is about to come, as far as the router can tell."""

    adapter: AdapterRef


class LeasesEnded(msgspec.Struct, frozen=True):
    """Peers do not read any more what they had leases on: there may be room."""


Event = (
    RequestArrived
    | RequestAborted
    | StepDone
    | StepFailed
    | AdapterArriving
    | AdapterLoaded
    | AdapterLoadFailed
    | AdapterDamaged
    | PlanPrepared
    | CopiesRetired
    | AdapterExpected
    | LeasesEnded
)


class RunStep(msgspec.Struct, frozen=True):
    """Compute this batch after those before it, and come back with StepDone or StepFailed, in the same order."""

    batch: StepBatch


class LoadAdapter(msgspec.Struct, frozen=True):
    """Fill the extent at ``offset_bytes`` of the pool, make it the adapter of ``slot``, report AdapterLoaded."""

    adapter: AdapterRef
    slot: int
    offset_bytes: int


class CancelLoad(msgspec.Struct, frozen=True):
    """Nobody wants it any more: end it soon. Report AdapterLoadFailed with CANCELLED once nothing writes to its extent,
    or however it ended before; its extent stays its own until then."""

    version: str


class LeftSlab(msgspec.Struct, frozen=True):
    """A verified slab that lies in an extent which is nobody's, until that is filled anew."""

    adapter: AdapterRef
    offset_bytes: int


class EvictAdapter(msgspec.Struct, frozen=True):
    """The slot and its extent belong to nobody any more. ``left`` is None where the adapter never was all there, or
    was damaged there."""

    version: str
    slot: int
    left: LeftSlab | None = None


class Emit(msgspec.Struct, frozen=True):
    gateway: str
    delta: TokenDelta


class Reject(msgspec.Struct, frozen=True):
    """The request ended without finishing; it holds nothing any more."""

    request_id: str
    gateway: str
    code: str
    message: str


class PlanReady(msgspec.Struct, frozen=True):
    """Every copy of the epoch is resident and pinned, or is in ``failed`` (version -> reason)."""

    epoch: int
    failed: dict[str, str]


Instruction = RunStep | LoadAdapter | CancelLoad | EvictAdapter | Emit | Reject | PlanReady
