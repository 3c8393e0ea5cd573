"""The cost model as it follows the engines: each measurement teaches once, however often it is reported. Pure."""

from collections.abc import Collection, Iterable

import msgspec

from loraserve.cost.model import CostModel
from loraserve.messages import EngineLoad


class _Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What one incarnation of an engine had counted when it was learned from."""

    incarnation: str
    decode_steps: int = 0
    prefill_steps: int = 0
    loads: int = 0


class CostLearner:
    """Holds ``cost``, the model as learned so far.

    Reports come again and again, of an idle engine with the means of its last steps: taken each time, one slow first
    step there would outweigh all that busy engines measure.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._learned: dict[str, _Learned] = {}

    def learn(self, loads: Iterable[EngineLoad], engines: Collection[str]) -> None:
        """From what is new in these reports. ``engines``: all that there are, also those that do not report; others
        are forgotten."""
        for load in loads:
            self.cost = self.cost.observe(self._news(load))
            self._learned[load.engine] = _Learned(
                incarnation=load.incarnation,
                decode_steps=load.decode_steps,
                prefill_steps=load.prefill_steps,
                loads=load.loads,
            )
        for name in self._learned.keys() - engines:
            del self._learned[name]

    def remembered(self) -> set[str]:
        """The engines that it keeps counts of."""
        return set(self._learned)

    def _news(self, load: EngineLoad) -> EngineLoad:
        """The report without the means that nothing was added to."""
        before = self._learned.get(load.engine)
        if before is None or before.incarnation != load.incarnation:
            before = _Learned(incarnation=load.incarnation)
        return msgspec.structs.replace(
            load,
            decode_step=load.decode_step if load.decode_steps > before.decode_steps else None,
            prefill_step=load.prefill_step if load.prefill_steps > before.prefill_steps else None,
            load_bytes=load.load_bytes if load.loads > before.loads else 0.0,
        )
