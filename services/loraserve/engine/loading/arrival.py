"""A slab on its way into the pool, for a step that computes with its first layers while the last are still read."""

from collections.abc import Mapping
from threading import Condition
from time import monotonic

from loraserve.adapter.format import SlabHeader
from loraserve.engine.schedule.events import StepBatch

PATIENCE_S = 0.005
"""A step waits so long in all, a fraction of one with prefill: others may be in it."""


class Arrival:
    """One read of a slab. Told by the event loop how far it is, and asked by the thread that computes."""

    def __init__(self, header: SlabHeader) -> None:
        self._header = header
        self._changed = Condition()
        self._landed_bytes = 0
        self._given_up = False

    def landed(self, slab_bytes: int) -> None:
        """So many bytes from its beginning on are there."""
        with self._changed:
            self._landed_bytes = slab_bytes
            self._changed.notify_all()

    def give_up(self) -> None:
        """It failed, or another read takes its place: what it brought may be overwritten by now."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def has(self, layer: int, until_s: float) -> bool:
        """Whether this layer is there, by a moment of the monotonic clock at the latest."""
        end = self._header.layer(layer).stop
        with self._changed:
            while not self._given_up and self._landed_bytes < end:
                if not self._changed.wait(until_s - monotonic()):
                    break
            return not self._given_up and self._landed_bytes >= end


class Gate:
    """Keeps one step from using layers that are not there, by slot. Those that are late it uses all the same: what
    comes of them concerns nobody but the requests whose adapter it is."""

    def __init__(self, arrivals: Mapping[int, Arrival], patience_s: float) -> None:
        self._arrivals = dict(arrivals)
        self._patience_s = patience_s
        self.late: set[int] = set()

    def wait(self, layer: int) -> None:
        for slot, arrival in list(self._arrivals.items()):
            began_s = monotonic()
            if not arrival.has(layer, began_s + self._patience_s):
                self.late.add(slot)
                del self._arrivals[slot]
            self._patience_s -= monotonic() - began_s


def gate_of(batch: StepBatch, arrivals: Mapping[int, Arrival]) -> Gate | None:
    """For the slots of this step that are on their way; None where all are there, as mostly."""
    if not arrivals:
        return None
    # Asked for once each: the event loop's thread takes out what is all there, between two looks too.
    asked = {s.slot: arrivals.get(s.slot) for s in batch.sequences}
    found = {slot: arrival for slot, arrival in asked.items() if arrival is not None}
    return Gate(found, PATIENCE_S) if found else None


def late_of(batch: StepBatch, gate: Gate | None) -> tuple[str, ...]:
    """The requests whose adapters were late."""
    return tuple(s.request_id for s in batch.sequences if s.slot in gate.late) if gate is not None else ()
