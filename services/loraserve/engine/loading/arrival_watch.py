"""Tells runner and scheduler how far a slab is that is being read, so that a step may begin before it is all there."""

from collections.abc import Callable, Iterator
from itertools import count

from loraserve.adapter.format import ITEM_BYTES, SlabHeader
from loraserve.engine.compute.protocol import LayeredRunner, Runner
from loraserve.engine.loading.arrival import Arrival
from loraserve.engine.schedule.early import min_prefill_tokens
from loraserve.engine.schedule.events import AdapterArriving, Event, LoadAdapter
from loraserve.engine.schedule.report import Rates


class ArrivalWatch:
    """See Watch. Of one load."""

    def __init__(
        self,
        load: LoadAdapter,
        runner: LayeredRunner,
        rates: Rates,
        tell: Callable[[Event], None],
        numbers: Iterator[int],
    ) -> None:
        self._load = load
        self._runner = runner
        self._rates = rates
        self._tell = tell
        self._numbers = numbers
        self._arrival: Arrival | None = None
        self._told: int | None = None
        self.read = 0
        """The read that goes on or is done, 0 where there is none or nobody was told of it."""

    def begins(self, header: SlabHeader) -> None:
        arrival = Arrival(header)
        try:
            self._runner.arrive(self._load.slot, header, base_elements(self._load, header), arrival)
        except ValueError:
            # It cannot be used at all, which its load tells once it is there.
            return
        self._arrival, self.read, self._told = arrival, next(self._numbers), None

    def landed(self, slab_bytes: int, left_s: float) -> None:
        if self._arrival is None:
            return
        self._arrival.landed(slab_bytes)
        tokens = min_prefill_tokens(left_s, self._rates.measured())
        if tokens != self._told:
            self._told = tokens
            self._tell(AdapterArriving(self._load.adapter.version, self.read, tokens))

    def broken(self) -> None:
        if self._arrival is not None:
            self._arrival.give_up()
        self._arrival, self.read = None, 0


class ArrivalWatches:
    """Numbers all reads of an engine. A runner whose steps use whole slabs alone has none watched."""

    def __init__(self, runner: Runner, rates: Rates, tell: Callable[[Event], None]) -> None:
        # A step that is taken ahead would go on from one that may come to nothing.
        self._runner = runner if isinstance(runner, LayeredRunner) and not runner.steps_ahead else None
        self._rates = rates
        self._tell = tell
        self._numbers = count(1)

    def watch(self, load: LoadAdapter) -> ArrivalWatch | None:
        if self._runner is None:
            return None
        return ArrivalWatch(load, self._runner, self._rates, self._tell, self._numbers)


def base_elements(load: LoadAdapter, header: SlabHeader) -> int:
    """Where a load's slab begins, in elements of the pool."""
    return load.offset_bytes // ITEM_BYTES[header.dtype]
