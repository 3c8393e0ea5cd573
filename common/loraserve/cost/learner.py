"""Updates a cost model with the engines' measurements. Each measurement is used once."""

from collections.abc import Collection, Iterable

import msgspec

from loraserve.cost.model import CostModel
from loraserve.messages import EngineLoad, MeasuredSpeed


class _Learned(msgspec.Struct, frozen=True, kw_only=True):
    """The last measurements from which the cost model has learned, for one run of an engine process."""

    incarnation: str
    speed: MeasuredSpeed = MeasuredSpeed()


class CostLearner:
    """Learns the cost model ``cost`` from the load reports of all engines. Uses each measurement once.

    An idle engine reports the means of its last steps repeatedly. If every report counted, one slow step of an idle
    engine could outweigh all measurements of busy engines.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._learned: dict[str, _Learned] = {}

    def learn(self, loads: Iterable[EngineLoad], engines: Collection[str]) -> None:
        """Learn from the new measurements in ``loads``. Forget the engines that are not in ``engines``."""
        for load in loads:
            self.cost = self.cost.observe(self._new_in(load))
            self._learned[load.engine] = _Learned(incarnation=load.incarnation, speed=load.speed)
        for name in self._learned.keys() - engines:
            del self._learned[name]

    def known_engines(self) -> set[str]:
        """Return the engines whose last measurements are remembered."""
        return set(self._learned)

    def _new_in(self, load: EngineLoad) -> MeasuredSpeed:
        """Return the speeds in ``load``. A mean without new measurements is replaced by None."""
        learned = self._learned.get(load.engine)
        if learned is None or learned.incarnation != load.incarnation:
            learned = _Learned(incarnation=load.incarnation)
        speed, before = load.speed, learned.speed
        return msgspec.structs.replace(
            speed,
            decode_step=speed.decode_step if speed.decode_steps > before.decode_steps else None,
            prefill_step=speed.prefill_step if speed.prefill_steps > before.prefill_steps else None,
            load=speed.load if speed.loads > before.loads else None,
        )
