"""The prices of all engines as columns, so that a request is priced at all of them at once. Pure."""

from collections.abc import Sequence

import numpy as np

from loraserve.cost import CostModel
from loraserve.router.engine_view import EngineView
from loraserve.router.prices import Array, Common, Prices, fitting_tokens, prices_of, sequences_at, slowness_of

FIELDS = len(Prices._fields)


class PriceTable:
    """The engines that take requests; their prices are up to date whenever ``refresh`` was called."""

    def __init__(self) -> None:
        self.engines: list[EngineView] = []
        self.columns: Prices[Array] = Prices(*np.zeros((FIELDS, 0)))
        self.least_longest_tokens = 0.0
        self.least_extent_bytes = 0.0
        self.least_room_bytes = 0.0
        self.fitting_tokens = 0.0
        """Prompts up to this length wait for room in the KV cache nowhere; perhaps longer ones do not either."""
        self.suspects = 0
        """0 where no engine is to be asked after all others."""
        self._values = np.zeros((FIELDS, 0))
        self._slowness: list[float] = []
        self._common: Common | None = None
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

    def refresh(self, cost: CostModel, output_tokens: float) -> None:
        """``output_tokens``: mean of a request."""
        common = self._common
        if common is None or common.cost is not cost or common.output_tokens != output_tokens:
            self._make(cost, output_tokens)
        elif self._changed:
            for column in self._changed:
                self._renew(column, common)
        self._changed.clear()

    def _make(self, cost: CostModel, output_tokens: float) -> None:
        sequences = sum(sequences_at(engine) for engine in self.engines) / max(1, len(self.engines))
        common = self._common = Common(cost, output_tokens, sequences)
        self._slowness = [slowness_of(engine, cost) for engine in self.engines]
        priced = zip(self.engines, self._slowness, strict=True)
        rows = [prices_of(engine, common, slowness) for engine, slowness in priced]
        self._values = np.array(rows, dtype=np.float64).reshape(-1, FIELDS).T.copy()
        columns = self.columns = Prices(*self._values)
        self.least_longest_tokens = float(columns.longest_tokens.min(initial=np.inf))
        self.least_extent_bytes = float(columns.largest_extent_bytes.min(initial=np.inf))
        self.least_room_bytes = float(columns.room_bytes.min(initial=np.inf))
        self.fitting_tokens = min((fitting_tokens(row) for row in rows), default=0.0)
        self.suspects = int(columns.avoided.sum())

    def _renew(self, column: int, common: Common) -> None:
        prices = prices_of(self.engines[column], common, self._slowness[column])
        self.suspects += int(prices.avoided - self.columns.avoided.item(column))
        self.fitting_tokens = min(self.fitting_tokens, fitting_tokens(prices))
        self._values[:, column] = prices

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
                assert kept == list(fresh), f"{engine.name}: its prices are out of date"
                assert self.fitting_tokens <= fitting_tokens(fresh), f"{engine.name}: its KV cache was overlooked"
        assert self._changed or self.suspects == self.columns.avoided.sum(), "suspects were overlooked"
