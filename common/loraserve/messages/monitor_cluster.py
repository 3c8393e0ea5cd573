"""Monitor -> router, planner, gateway (publication ``load``): the whole cluster's load."""

import msgspec

from loraserve.messages.base import Message
from loraserve.messages.engine_monitor import EngineLoad


class EngineSeen(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's last report, ``age_s`` old at the time of publication; not ``alive`` when too old."""

    load: EngineLoad
    age_s: float
    alive: bool


class AdapterDemand(msgspec.Struct, frozen=True, kw_only=True):
    """Demand seen and expected for one adapter over the monitor's window.

    ``forecast_std_tokens_per_s`` is how far the forecast has been off (one standard deviation).
    """

    version: str
    name: str
    rank: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    requests_per_s: float
    forecast_tokens_per_s: float
    forecast_std_tokens_per_s: float = 0.0


class ClusterLoad(Message, frozen=True, tag=True, kw_only=True):
    """Published every interval of the monitor. ``sequence`` grows within one ``incarnation`` of the monitor."""

    incarnation: str
    sequence: int
    engines: tuple[EngineSeen, ...]
    demand: tuple[AdapterDemand, ...] = ()
