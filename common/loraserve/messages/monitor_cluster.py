"""Monitor -> router, planner and gateways (publications ``load`` and ``statistics``): the whole cluster."""

import msgspec

from loraserve.messages.base import Message
from loraserve.messages.engine_monitor import EngineCapabilities, EngineCounters, EngineLoad


class EngineSeen(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's last load, ``age_s`` old when published. It is not ``alive`` if that is too old."""

    load: EngineLoad
    capabilities: EngineCapabilities
    age_s: float
    alive: bool

    @property
    def engine(self) -> str:
        return self.load.engine


class AdapterDemand(msgspec.Struct, frozen=True, kw_only=True):
    """Demand for one adapter: measured over the monitor's window, and forecast.

    ``forecast_std_tokens_per_s`` is the standard deviation of the forecast's past errors.
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
    """Publication ``load``, every ``monitor.publish_interval_s`` and when an engine appears, restarts or dies.

    ``sequence`` grows within one ``incarnation`` of the monitor.
    """

    incarnation: str
    sequence: int
    engines: tuple[EngineSeen, ...]
    demand: tuple[AdapterDemand, ...] = ()


class ClusterStatistics(Message, frozen=True, tag=True, kw_only=True):
    """Publication ``statistics``, every ``engine.statistics_interval_s``: the counters of each live engine."""

    engines: dict[str, EngineCounters]
