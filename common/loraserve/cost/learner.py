"""Keeps a cost model up to date with what the engines measure. Each measurement is used once."""

from collections.abc import Collection, Iterable

import msgspec

from loraserve.cost.model import CostModel
from loraserve.messages import EngineLoad, MeasuredSpeed


class _Learned(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of one incarnation of an engine that the model has already learned from."""

    incarnation: str
    speed: MeasuredSpeed = MeasuredSpeed()


class CostLearner:
    """Holds ``cost``, the model as learned so far.

    Engines report the same means again and again, an idle engine those of its last steps. If each report counted, one
    slow first step of an idle engine would outweigh everything that busy engines measure.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._learned: dict[str, _Learned] = {}

    def learn(self, loads: Iterable[EngineLoad], engines: Collection[str]) -> None:
        """Learn what is new in these reports, and forget engines that are not in ``engines`` (all known ones)."""
        for load in loads:
            self.cost = self.cost.observe(self._new_in(load))
            self._learned[load.engine] = _Learned(incarnation=load.incarnation, speed=load.speed)
        for name in self._learned.keys() - engines:
            del self._learned[name]

    def known_engines(self) -> set[str]:
        """Return the engines whose measurements it remembers."""
        return set(self._learned)

    def _new_in(self, load: EngineLoad) -> MeasuredSpeed:
        """Return the measured speed without the means that contain nothing new."""
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
