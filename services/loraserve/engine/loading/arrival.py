"""A slab on its way into the pool, for steps that compute with its first layers while the last are still being read."""

from collections.abc import Mapping
from threading import Condition
from time import monotonic

from loraserve.adapter.format import SlabHeader
from loraserve.engine.schedule.events import StepBatch

PATIENCE_S = 0.005
"""A step waits for late layers for so long in all, a fraction of a step with prefill: it may hold other requests."""


class Arrival:
    """The progress of one read. The event loop reports it; the thread that computes waits for it."""

    def __init__(self, header: SlabHeader) -> None:
        self._header = header
        self._changed = Condition()
        self._arrived_bytes = 0
        self._abandoned = False

    def advance(self, slab_bytes: int) -> None:
        """Report that the first ``slab_bytes`` of the slab have arrived."""
        with self._changed:
            self._arrived_bytes = slab_bytes
            self._changed.notify_all()

    def abandon(self) -> None:
        """Report that the read failed, or that another read overwrites what it brought."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def wait_for(self, layer: int, until_s: float) -> bool:
        """Return whether a layer has arrived by the time ``until_s`` of the monotonic clock, as soon as it is known."""
        end = self._header.layer(layer).stop
        with self._changed:
            while not self._abandoned and self._arrived_bytes < end:
                if not self._changed.wait(until_s - monotonic()):
                    break
            return not self._abandoned and self._arrived_bytes >= end


class Gate:
    """Holds one step until the layers of its arriving slabs are there, by slot.

    Layers that are late are used all the same: the result concerns only the requests of that adapter, and is discarded.
    """

    def __init__(self, arrivals: Mapping[int, Arrival], patience_s: float) -> None:
        self._arrivals = dict(arrivals)
        self._patience_s = patience_s
        self.late: set[int] = set()

    def wait(self, layer: int) -> None:
        """Wait for a layer of every arriving slab, within the patience that the step has left."""
        for slot, arrival in list(self._arrivals.items()):
            began_s = monotonic()
            if not arrival.wait_for(layer, began_s + self._patience_s):
                self.late.add(slot)
                del self._arrivals[slot]
            self._patience_s -= monotonic() - began_s


def make_gate(batch: StepBatch, arrivals: Mapping[int, Arrival]) -> Gate | None:
    """Return a gate for the slots of this step that are arriving; None if all are resident, as is usual."""
    if not arrivals:
        return None
    # Each slot is looked up once: the event loop's thread removes arrivals at any time.
    by_slot = {s.slot: arrivals.get(s.slot) for s in batch.sequences}
    arriving = {slot: arrival for slot, arrival in by_slot.items() if arrival is not None}
    return Gate(arriving, PATIENCE_S) if arriving else None


def late_requests(batch: StepBatch, gate: Gate | None) -> tuple[str, ...]:
    return tuple(s.request_id for s in batch.sequences if s.slot in gate.late) if gate is not None else ()
