"""The states of an adapter in one engine, the events that change them, and the pool's entry for the adapter.

```mermaid
stateDiagram-v2
    absent --> loading: placed
    loading --> arriving: read announced
    arriving --> arriving: read announced
    loading --> cancelled: cancelled
    arriving --> cancelled: cancelled
    loading --> resident: loaded
    arriving --> resident: loaded
    cancelled --> resident: loaded
    loading --> failed: load failed
    arriving --> failed: load failed
    cancelled --> failed: load failed
    resident --> absent: evicted
    resident --> damaged: damage found
    damaged --> absent: released
    failed --> absent: released
```

The state describes the bytes of the slab. The users of the adapter are recorded separately. `PoolEntry` counts running
requests and peers' leases, and records the plan's pin. `Residency` records the plan being prepared and the prefetch
candidates, which can also name absent adapters.
"""

from enum import Enum

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.engine.adapters.prefetch import PrefetchKind
from loraserve.engine.loading.speeds import ReadSource
from loraserve.messages import AdapterRef


class LifecycleState(Enum):
    ABSENT = "absent"
    """The adapter has no extent in the pool."""
    LOADING = "loading"
    """The adapter has an extent. Its load has begun or is about to begin."""
    ARRIVING = "arriving"
    """A load is in progress and its read is announced. Steps may start with the layers that have arrived."""
    CANCELLED = "cancelled"
    """Nothing needs the adapter any more, so its load is being cancelled. It keeps its extent until the load ends."""
    RESIDENT = "resident"
    """The whole slab is verified in its extent. Requests may run with it and peers may lease it."""
    DAMAGED = "damaged"
    """The slab was resident, but its bytes have changed. It gets no new users and is removed after its last user."""
    FAILED = "failed"
    """The load failed or was cancelled. The adapter is removed as soon as no running request uses its layers."""


class LifecycleEvent(Enum):
    PLACED = "placed"
    READ_ANNOUNCED = "read announced"
    CANCELLED = "cancelled"
    LOADED = "loaded"
    LOAD_FAILED = "load failed"
    DAMAGE_FOUND = "damage found"
    EVICTED = "evicted"
    RELEASED = "released"


_S, _E = LifecycleState, LifecycleEvent

TRANSITIONS: dict[tuple[LifecycleState, LifecycleEvent], LifecycleState] = {
    (_S.ABSENT, _E.PLACED): _S.LOADING,
    (_S.LOADING, _E.READ_ANNOUNCED): _S.ARRIVING,
    (_S.ARRIVING, _E.READ_ANNOUNCED): _S.ARRIVING,
    (_S.LOADING, _E.CANCELLED): _S.CANCELLED,
    (_S.ARRIVING, _E.CANCELLED): _S.CANCELLED,
    (_S.LOADING, _E.LOADED): _S.RESIDENT,
    (_S.ARRIVING, _E.LOADED): _S.RESIDENT,
    (_S.CANCELLED, _E.LOADED): _S.RESIDENT,
    (_S.LOADING, _E.LOAD_FAILED): _S.FAILED,
    (_S.ARRIVING, _E.LOAD_FAILED): _S.FAILED,
    (_S.CANCELLED, _E.LOAD_FAILED): _S.FAILED,
    (_S.RESIDENT, _E.EVICTED): _S.ABSENT,
    (_S.RESIDENT, _E.DAMAGE_FOUND): _S.DAMAGED,
    (_S.DAMAGED, _E.RELEASED): _S.ABSENT,
    (_S.FAILED, _E.RELEASED): _S.ABSENT,
}
"""Pairs that are not listed raise ValueError in `next_state`."""

LOADING_STATES = frozenset({_S.LOADING, _S.ARRIVING, _S.CANCELLED})
"""A load of the adapter is in progress."""
WANTED_LOADS = frozenset({_S.LOADING, _S.ARRIVING})
"""A load of the adapter is in progress and has not been cancelled."""
COMPLETE_STATES = frozenset({_S.RESIDENT, _S.DAMAGED})
"""The whole slab has been verified in its extent."""
LEAVING_STATES = frozenset({_S.DAMAGED, _S.FAILED})
"""The adapter is removed as soon as nothing uses it."""


def next_state(state: LifecycleState, event: LifecycleEvent) -> LifecycleState:
    """Return the state after ``event``. Raises ValueError for an event that ``state`` does not allow."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"an adapter that is {state.value} cannot become: {event.value}") from None


class LoadedSlab(msgspec.Struct, frozen=True):
    """The header, source and read time of a verified slab.

    ``own_s`` estimates the seconds that the read would have taken without concurrent loads (see `SharedLink`).
    """

    header: SlabHeader
    source: ReadSource
    own_s: float


class AnnouncedRead(msgspec.Struct):
    """A read in progress. Steps may use its layers as they arrive. ``number`` is unique within the engine.

    A step with at least ``least_tokens`` prefill tokens is expected to last until the slab is verified. If it is None,
    no request may start before that time. ``failed_once`` is set when the result of a step with this read is discarded.
    """

    number: int
    least_tokens: int | None
    failed_once: bool = False


class PoolEntry(msgspec.Struct):
    adapter: AdapterRef
    slot: int
    offset_bytes: int
    generation: int = 0
    """The number of this placement, unique within the pool."""
    state: LifecycleState = LifecycleState.LOADING
    announced: AnnouncedRead | None = None
    """Set while the state is ARRIVING."""
    verified_read: int = 0
    """The number of the verified read; 0 if it was never announced."""
    slab: LoadedSlab | None = None
    """Set when a load succeeds. Always None in a simulated engine."""
    running: int = 0
    leases: int = 0
    placed_s: float = 0.0
    """The time at which the adapter got its extent and its load began."""
    plan_epoch: int | None = None
    """The epoch of the plan that pins the adapter."""
    used_s: float = 0.0
    prefetch: PrefetchKind | None = None
    """The kind of prefetch that loaded the adapter; None if a waiting request did."""
    ran: bool = False
    """Whether a request has run with the adapter."""

    @property
    def is_complete(self) -> bool:
        return self.state in COMPLETE_STATES

    @property
    def is_loading(self) -> bool:
        return self.state in LOADING_STATES

    @property
    def header(self) -> SlabHeader | None:
        return self.slab.header if self.slab is not None else None

    @property
    def planned(self) -> bool:
        return self.plan_epoch is not None

    @property
    def evictable(self) -> bool:
        return self.is_complete and not (self.running or self.planned or self.leases)

    def apply(self, event: LifecycleEvent) -> None:
        """Move to the state after ``event``. Raises ValueError for an event that the state does not allow."""
        self.state = next_state(self.state, event)
        if self.state is not LifecycleState.ARRIVING:
            self.announced = None

    def announce_read(self, number: int, least_tokens: int | None) -> None:
        """Record the read ``number`` as the current one. If it is already recorded, update its ``least_tokens``."""
        self.apply(LifecycleEvent.READ_ANNOUNCED)
        if self.announced is not None and self.announced.number == number:
            self.announced.least_tokens = least_tokens
        else:
            self.announced = AnnouncedRead(number, least_tokens)

    def validate(self) -> None:
        version, state = self.adapter.version, self.state
        assert state is not LifecycleState.ABSENT, f"{version} is in the pool and absent"
        assert self.running >= 0, f"{version} has {self.running} running requests"
        assert self.leases >= 0, f"{version} has {self.leases} leases"
        assert self.is_complete or not self.leases, f"{version} is leased before it is loaded"
        assert (state is LifecycleState.ARRIVING) == (self.announced is not None), f"{version} has a stray read"
        may_run = self.is_complete or state in (LifecycleState.ARRIVING, LifecycleState.FAILED)
        assert may_run or not self.running, f"{version} runs while it is {state.value}"
