"""The life of an adapter in one engine: its states, the events that change them, and what the pool knows about it.

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

The state says where the bytes of the slab are. Who wants the adapter is kept beside it: requests that run with it,
leases of peers, the plan's pin, and, for adapters that are absent too, waiting requests, the plan being prepared and
the prefetch candidates.
"""

from enum import Enum

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.engine.adapters.prefetch import PrefetchKind
from loraserve.engine.loading.speeds import ReadSource
from loraserve.messages import AdapterRef


class LifecycleState(Enum):
    ABSENT = "absent"
    """It has no extent in the pool."""
    LOADING = "loading"
    """It has an extent, and its load has begun or is about to."""
    ARRIVING = "arriving"
    """As LOADING; steps may begin with the layers that the announced read has brought so far."""
    CANCELLED = "cancelled"
    """Nothing wanted it while it loaded: the load is being ended. Its extent stays taken until the load has ended."""
    RESIDENT = "resident"
    """All of its slab was verified in its extent; requests may run with it and peers may lease it."""
    DAMAGED = "damaged"
    """It was resident and its bytes have changed. Nothing begins to use it, and it leaves with its last user."""
    FAILED = "failed"
    """Its load failed or was cancelled. It leaves at once, or with the last step that began with its first layers."""


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
"""Every pair that is not listed is an error of the caller."""

LOADING_STATES = frozenset({_S.LOADING, _S.ARRIVING, _S.CANCELLED})
"""A load of the adapter is under way."""
WANTED_LOADS = frozenset({_S.LOADING, _S.ARRIVING})
"""A load of the adapter is under way and is expected to make it resident."""
COMPLETE_STATES = frozenset({_S.RESIDENT, _S.DAMAGED})
"""All of the slab was verified in its extent once."""
LEAVING_STATES = frozenset({_S.DAMAGED, _S.FAILED})
"""The adapter leaves once nothing uses it any more."""


def next_state(state: LifecycleState, event: LifecycleEvent) -> LifecycleState:
    """Return the state after ``event``. Raises ValueError for an event that ``state`` does not allow."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"an adapter that is {state.value} cannot become: {event.value}") from None


class LoadedSlab(msgspec.Struct, frozen=True):
    """A verified slab: its header, the source that it was read from, and how long the read took.

    ``own_s`` is the time that the read would have taken alone: seconds shared with other loads count in parts.
    """

    header: SlabHeader
    source: ReadSource
    own_s: float


class AnnouncedRead(msgspec.Struct):
    """A read under way that steps may begin with. Read numbers are never used twice in one engine.

    ``least_tokens`` is the number of prefill tokens whose step is expected to last until the slab is verified; None
    where no step is, or where starting early does not pay. ``failed_once``: a step that started with it was discarded.
    """

    number: int
    least_tokens: int | None
    failed_once: bool = False


class PoolEntry(msgspec.Struct):
    adapter: AdapterRef
    slot: int
    offset_bytes: int
    generation: int = 0
    """Numbers all placements: another entry of the same version, or in the same extent, has another number."""
    state: LifecycleState = LifecycleState.LOADING
    announced: AnnouncedRead | None = None
    """Set while the state is ARRIVING."""
    verified_read: int = 0
    """The number of the read that was verified; 0 if that read was never announced."""
    slab: LoadedSlab | None = None
    """Set when a real load has ended; a simulated engine has none."""
    running: int = 0
    leases: int = 0
    plan_epoch: int | None = None
    """The epoch of the plan that pins it."""
    used_s: float = 0.0
    prefetch: PrefetchKind | None = None
    """Why it was loaded, if no request waited for it then."""
    ran: bool = False
    """A request has run with it."""

    @property
    def is_complete(self) -> bool:
        """Whether all of the slab was verified in its extent."""
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
        """Change the state. Raises ValueError for an event that the state does not allow."""
        self.state = next_state(self.state, event)
        if self.state is not LifecycleState.ARRIVING:
            self.announced = None

    def announce_read(self, number: int, least_tokens: int | None) -> None:
        """Take note of a read, or of a new estimate for the read that was announced last."""
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
