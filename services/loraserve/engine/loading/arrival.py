"""Lets steps compute with the first layers of a slab while its last layers are still being read.

`AnnouncedLoad` tells the runner and the scheduler how far a read is. `Arrival` holds this progress for the compute
thread, and `Gate` makes a step wait for late layers.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from threading import Condition
from time import monotonic
from typing import Protocol, runtime_checkable

from loraserve.adapter.format import ITEM_BYTES, SlabHeader
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds, ReadSource
from loraserve.engine.schedule.early import min_prefill_tokens, remaining_read_s
from loraserve.engine.schedule.events import AdapterArriving, LoadAdapter, StepBatch
from loraserve.engine.schedule.report import SpeedMeter

PATIENCE_S = 0.005
"""Maximum total wait of a step for late layers. It is short because the wait delays all requests in the step."""


class Arrival:
    """The progress of one read. The event loop reports the progress, and the compute thread waits for it."""

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
        """Wait for a layer until ``until_s`` on the monotonic clock and return whether it arrived."""
        end = self._header.layer(layer).stop
        with self._changed:
            while not self._abandoned and self._arrived_bytes < end:
                if not self._changed.wait(until_s - monotonic()):
                    break
            return not self._abandoned and self._arrived_bytes >= end


class Gate:
    """Makes one step wait for the layers of its arriving slabs. ``arrivals`` maps adapter slots to their reads.

    If a layer is late, the step computes with its incomplete bytes. The results of requests that use the adapter are
    then wrong and are discarded. Other requests are not affected.
    """

    def __init__(self, arrivals: Mapping[int, Arrival], patience_s: float) -> None:
        self._arrivals = dict(arrivals)
        self._patience_s = patience_s
        self.late: set[int] = set()

    def wait(self, layer: int) -> None:
        """Wait for a layer of every arriving slab. All waits of the step together last at most ``patience_s``."""
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


@runtime_checkable
class LayeredRunner(Runner, Protocol):
    """A Runner whose steps can use the first layers of a slab while later layers are still loading.

    ``StepResult.late`` lists the requests for which a step computed a layer before that layer had been read.
    """

    def arrive(self, slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        """Make later steps use a slab that is still loading for tokens of ``slot``.

        Until ``install`` is called, steps ask ``arrival`` whether each layer has arrived. May be called again, even
        while steps use the slot, if the same slab is read again to the same place.
        """
        ...


class AnnouncedLoad:
    """Reports the progress of one load's reads to the runner and the scheduler.

    Each attempt to read the slab is a read with a new number. Its bytes overwrite those of the previous read.
    """

    def __init__(
        self,
        load: LoadAdapter,
        runner: LayeredRunner,
        speed: SpeedMeter,
        links: LinkSpeeds,
        report: Callable[[AdapterArriving], None],
        numbers: Iterator[int],
    ) -> None:
        self._load = load
        self._runner = runner
        self._speed = speed
        self._links = links
        self._report = report
        self._numbers = numbers
        self._arrival: Arrival | None = None
        self._source = FROM_STORE
        self._began_s = 0.0
        self._reported_tokens: int | None = None
        self.read_number = 0
        """The number of the current or finished read; 0 if there is no announced read."""

    def begin(self, header: SlabHeader, source: ReadSource, began_s: float) -> None:
        """Announce a read from ``source`` that began at ``began_s`` on the monotonic clock."""
        arrival = Arrival(header)
        try:
            self._runner.arrive(self._load.slot, header, base_elements(self._load, header), arrival)
        except ValueError:
            # The slab is unusable. The loader reports the error when it installs the slab.
            return
        self._source, self._began_s = source, began_s
        self._arrival, self.read_number, self._reported_tokens = arrival, next(self._numbers), None

    def arrived(self, slab_bytes: int) -> None:
        """Tell the runner how many bytes have arrived, and the scheduler how many tokens an early step needs."""
        if self._arrival is None:
            return
        self._arrival.advance(slab_bytes)
        total_bytes = self._load.adapter.slab_bytes
        expected_s = self._links.predict_under_way(self._source, total_bytes)
        remaining_s = remaining_read_s(expected_s, monotonic() - self._began_s, slab_bytes / total_bytes)
        tokens = min_prefill_tokens(remaining_s, self._speed.measured())
        if tokens != self._reported_tokens:
            self._reported_tokens = tokens
            self._report(AdapterArriving(self._load.adapter.version, self.read_number, tokens))

    def abandon(self) -> None:
        """Make steps stop waiting for the read, because it failed or was cancelled."""
        if self._arrival is not None:
            self._arrival.abandon()
        self._arrival, self.read_number = None, 0


class ReadAnnouncer:
    """Announces the reads of an engine's loads and numbers them. ``report`` sends events to the scheduler."""

    def __init__(
        self, runner: Runner, speed: SpeedMeter, links: LinkSpeeds, report: Callable[[AdapterArriving], None]
    ) -> None:
        # If the runner steps ahead, the next step would build on a step that may be discarded.
        self._runner = runner if isinstance(runner, LayeredRunner) and not runner.steps_ahead else None
        self._speed = speed
        self._links = links
        self._report = report
        self._numbers = count(1)

    def follow(self, load: LoadAdapter) -> AnnouncedLoad | None:
        """Return an AnnouncedLoad; None if the runner accepts steps ahead or cannot use incomplete slabs."""
        if self._runner is None:
            return None
        return AnnouncedLoad(load, self._runner, self._speed, self._links, self._report, self._numbers)


def base_elements(load: LoadAdapter, header: SlabHeader) -> int:
    return load.offset_bytes // ITEM_BYTES[header.dtype]
