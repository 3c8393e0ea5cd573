"""Lets steps compute with the first layers of a slab while its last layers are still being read."""

from collections.abc import Mapping
from threading import Condition
from time import monotonic

from loraserve.adapter.format import SlabHeader
from loraserve.engine.schedule.events import StepBatch

PATIENCE_S = 0.005
"""Maximum total wait of a step for late layers. It is short because the wait delays all requests in the step."""


class Arrival:
    """The progress of one read. The event loop reports progress; the compute thread waits for it."""

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
        """Report that the read failed, or that another read overwrites its bytes."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def wait_for(self, layer: int, until_s: float) -> bool:
        """Wait for a layer until ``until_s`` on the monotonic clock; return whether it arrived."""
        end = self._header.layer(layer).stop
        with self._changed:
            while not self._abandoned and self._arrived_bytes < end:
                if not self._changed.wait(until_s - monotonic()):
                    break
            return not self._abandoned and self._arrived_bytes >= end


class Gate:
    """Makes one step wait for the layers of its arriving slabs. ``arrivals`` maps slots to reads.

    A step computes with late layers too, although their bytes are incomplete. The results of the requests with late
    adapters are wrong and are discarded; other requests are not affected.
    """

    def __init__(self, arrivals: Mapping[int, Arrival], patience_s: float) -> None:
        self._arrivals = dict(arrivals)
        self._patience_s = patience_s
        self.late: set[int] = set()

    def wait(self, layer: int) -> None:
        """Wait for a layer of every arriving slab. All waits of the step share ``patience_s``."""
        for slot, arrival in list(self._arrivals.items()):
            began_s = monotonic()
            if not arrival.wait_for(layer, began_s + self._patience_s):
                self.late.add(slot)
                del self._arrivals[slot]
            self._patience_s -= monotonic() - began_s


def make_gate(batch: StepBatch, arrivals: Mapping[int, Arrival]) -> Gate | None:
    """Return a gate for the arriving slabs that this step uses; None if all its slabs are resident."""
    if not arrivals:
        return None
    # Each slot is looked up only once, because the event loop may remove arrivals at any time.
    by_slot = {s.slot: arrivals.get(s.slot) for s in batch.sequences}
    arriving = {slot: arrival for slot, arrival in by_slot.items() if arrival is not None}
    return Gate(arriving, PATIENCE_S) if arriving else None


def late_requests(batch: StepBatch, gate: Gate | None) -> tuple[str, ...]:
    return tuple(s.request_id for s in batch.sequences if s.slot in gate.late) if gate is not None else ()
