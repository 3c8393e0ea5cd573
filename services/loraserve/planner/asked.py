"""What engines were last asked for, so that they are asked again in time and not more often. Pure."""

from collections.abc import Mapping

import msgspec

from loraserve.messages import EngineLoad

RETRY_S = 5.0
"""An engine that does not hold what it should is asked again after this long; reports are late by less."""


class Asked(msgspec.Struct, frozen=True):
    """``ended_s`` is infinite while there is no answer."""

    incarnation: str
    epoch: int
    ended_s: float


def due(asked: Mapping[str, Asked], load: EngineLoad, now: float) -> bool:
    """An engine that was restarted at once, else a while after it answered or did not."""
    last = asked.get(load.engine)
    return last is None or last.incarnation != load.incarnation or now - last.ended_s >= RETRY_S
