"""The prices of all engines as columns, so that a request is priced at all of them at once. Pure."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import astuple

from loraserve.cost import MIN_EXTENT_BYTES, CostModel
from loraserve.router.engine_view import EngineView
from loraserve.router.prices import Array, Common, Prices, fitting_tokens, prices_of, sequences_at, slowness_of

FIELDS = len(Prices.__struct_fields__)
BEHIND_WEIGHT = 1.0
"""What a second of an engine's time is worth, beside its ``harm_weight``, for each request that comes before the queue
there is gone: it waits that second longer."""


class PriceTable:
    """The engines that take requests; their prices are up to date whenever ``refresh`` was called."""

    def __init__(self) -> None:
        self.engines: list[EngineView] = []
        self.columns: Prices[Array] = Prices(*np.zeros((FIELDS, 0)))
        self.least_longest_tokens = 0.0
        self.least_extent_bytes = 0.0
        self.fitting_tokens = self.fitting_slab_bytes = 0.0
        """Prompts up to this length wait for room in the KV cache nowhere, and adapters up to this size for room in the
        pool; perhaps larger ones do not either."""
        self.ones: Array = np.ones(0)
        self.output_tokens = 0.0
        """Mean of a request."""
        self.harm_weight: Array = np.zeros(0)
        """By column. Time that an engine loses delays all who arrive there while its queue lasts, and fills it sooner:
        nearly nobody where it is idle, and many near the limit, where only what a request costs decides how much can be
        served."""
        self.suspects: set[int] = set()
        """Columns of engines that are asked after all others."""
        self._values = np.zeros((FIELDS + 1, 0))
        self._slowness: list[float] = []
        self._common: Common | None = None
        self._requests_per_s = self._behind = 0.0
        self._changed: set[int] = set()

    def begin(self, engines: Sequence[EngineView]) -> None:
        """These take requests now, and reports have changed them all."""
        for engine in self.engines:
            engine.column = -1
        self.engines = list(engines)
        for column, engine in enumerate(self.engines):
            engine.column = column
        self._common = None

    def changed(self, engine: EngineView) -> None:
        """Requests were sent there or have ended, or it is trusted more or less."""
        if engine.column >= 0:
            self._changed.add(engine.column)

    def refresh(self, cost: CostModel, output_tokens: float, requests_per_s: float) -> None:
        """``output_tokens``: mean of a request. ``requests_per_s``: of all engines."""
        common = self._common
        if (
            common is None
            or common.cost is not cost
            or common.output_tokens != output_tokens
            or self._requests_per_s != requests_per_s
        ):
            self._make(cost, output_tokens, requests_per_s)
        elif self._changed:
            for column in self._changed:
                self._renew(column, common)
        self._changed.clear()

    def _make(self, cost: CostModel, output_tokens: float, requests_per_s: float) -> None:
        sequences = sum(sequences_at(engine) for engine in self.engines) / max(1, len(self.engines))
        common = self._common = Common(cost, output_tokens, sequences)
        self.output_tokens = output_tokens
        self._slowness = [slowness_of(engine, cost) for engine in self.engines]
        priced = zip(self.engines, self._slowness, strict=True)
        rows = [prices_of(engine, common, slowness) for engine, slowness in priced]
        self._requests_per_s = requests_per_s
        self._behind = BEHIND_WEIGHT * (requests_per_s / max(1, len(self.engines)))
        values = np.array([self._values_of(row) for row in rows], dtype=np.float64)
        self._values = values.reshape(-1, FIELDS + 1).T.copy()
        columns = self.columns = Prices(*self._values[:-1])
        self.harm_weight = self._values[-1]
        self.least_longest_tokens = float(columns.longest_tokens.min(initial=np.inf))
        self.least_extent_bytes = float(columns.largest_extent_bytes.min(initial=np.inf))
        self.fitting_slab_bytes = float(columns.room_bytes.min(initial=np.inf)) - MIN_EXTENT_BYTES
        self.fitting_tokens = min((fitting_tokens(row) for row in rows), default=0.0)
        self.ones = np.ones(len(self.engines))
        self.suspects = set(columns.avoided.nonzero()[0].tolist())

    def _values_of(self, prices: Prices[float]) -> tuple[float, ...]:
        """What is kept of an engine: its prices, and its ``harm_weight`` with those who arrive there."""
        return *astuple(prices), prices.queue_s * self._behind + prices.harm_weight

    def _renew(self, column: int, common: Common) -> None:
        prices = prices_of(self.engines[column], common, self._slowness[column])
        if prices.avoided:
            self.suspects.add(column)
        else:
            self.suspects.discard(column)
        fitting = fitting_tokens(prices)
        if fitting < self.fitting_tokens:
            self.fitting_tokens = fitting
        self._values[:, column] = self._values_of(prices)

    def validate(self) -> None:
        """What is kept is what would be made now; raises AssertionError naming the engine."""
        for column, engine in enumerate(self.engines):
            assert engine.column == column, f"{engine.name} is in another column"
        if self._common is None:
            return
        for column, engine in enumerate(self.engines):
            if column not in self._changed:
                fresh = prices_of(engine, self._common, slowness_of(engine, self._common.cost))
                kept = self._values[:, column].tolist()
                assert kept == list(self._values_of(fresh)), f"{engine.name}: its prices are out of date"
                assert self.fitting_tokens <= fitting_tokens(fresh), f"{engine.name}: its KV cache was overlooked"
                room_bytes = fresh.room_bytes - MIN_EXTENT_BYTES
                assert self.fitting_slab_bytes <= room_bytes, f"{engine.name}: its pool was overlooked"
        suspects = set(self.columns.avoided.nonzero()[0].tolist())
        assert self._changed or self.suspects == suspects, "suspects were overlooked"
