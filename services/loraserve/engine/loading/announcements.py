"""Announces running reads to the runner and the scheduler, so that a step can start before its slab is complete."""

from collections.abc import Callable, Iterator
from itertools import count

from loraserve.adapter.format import ITEM_BYTES, SlabHeader
from loraserve.engine.compute.protocol import LayeredRunner, Runner
from loraserve.engine.loading.arrival import Arrival
from loraserve.engine.schedule.early import min_prefill_tokens
from loraserve.engine.schedule.events import AdapterArriving, LoadAdapter
from loraserve.engine.schedule.report import SpeedMeter


class AnnouncedLoad:
    """Tells the runner and the scheduler how far one load is; implements `ReadProgress`.

    If a source fails, the attempt with the next source is a new read with a new number.
    """

    def __init__(
        self,
        load: LoadAdapter,
        runner: LayeredRunner,
        speed: SpeedMeter,
        report: Callable[[AdapterArriving], None],
        numbers: Iterator[int],
    ) -> None:
        self._load = load
        self._runner = runner
        self._speed = speed
        self._report = report
        self._numbers = numbers
        self._arrival: Arrival | None = None
        self._reported_tokens: int | None = None
        self.read_number = 0
        """The number of the current or finished read; 0 if there is no announced read."""

    def begin(self, header: SlabHeader) -> None:
        arrival = Arrival(header)
        try:
            self._runner.arrive(self._load.slot, header, base_elements(self._load, header), arrival)
        except ValueError:
            # The slab is unusable. The loader reports the error when it installs the slab.
            return
        self._arrival, self.read_number, self._reported_tokens = arrival, next(self._numbers), None

    def advance(self, slab_bytes: int, remaining_s: float) -> None:
        """Report the arrived bytes to the runner. Tell the scheduler how many prefill tokens an early step needs."""
        if self._arrival is None:
            return
        self._arrival.advance(slab_bytes)
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

    def __init__(self, runner: Runner, speed: SpeedMeter, report: Callable[[AdapterArriving], None]) -> None:
        # If the runner steps ahead, the next step would build on a step that may be discarded.
        self._runner = runner if isinstance(runner, LayeredRunner) and not runner.steps_ahead else None
        self._speed = speed
        self._report = report
        self._numbers = count(1)

    def follow(self, load: LoadAdapter) -> AnnouncedLoad | None:
        """Return the announcer of one load; None if the runner cannot compute with incomplete slabs."""
        if self._runner is None:
            return None
        return AnnouncedLoad(load, self._runner, self._speed, self._report, self._numbers)


def base_elements(load: LoadAdapter, header: SlabHeader) -> int:
    return load.offset_bytes // ITEM_BYTES[header.dtype]
