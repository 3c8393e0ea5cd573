"""Monitor -> router, planner and gateways: the publications ``load`` and ``statistics`` about the whole cluster."""

import msgspec

from loraserve.messages.base import Message
from loraserve.messages.engine_monitor import EngineCapabilities, EngineCounters, EngineLoad


class EngineSeen(msgspec.Struct, frozen=True, kw_only=True):
    """The last load report of an engine. ``age_s`` is its age at publication.

    ``alive`` is False if the report is too old or the process ended. ``ended`` is True only if the process certainly
    ended; otherwise the engine may run without a connection to the monitor.
    """

    load: EngineLoad
    capabilities: EngineCapabilities
    age_s: float
    alive: bool
    ended: bool = False

    @property
    def engine(self) -> str:
        return self.load.engine


class AdapterDemand(msgspec.Struct, frozen=True, kw_only=True):
    """The demand for one adapter, measured over the monitor's window, and its forecast.

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

    ``sequence`` increases within an ``incarnation`` of the monitor.
    """

    incarnation: str
    sequence: int
    engines: tuple[EngineSeen, ...]
    demand: tuple[AdapterDemand, ...] = ()


class ClusterStatistics(Message, frozen=True, tag=True, kw_only=True):
    """Publication ``statistics``, every ``engine.statistics_interval_s``: the counters of each live engine."""

    engines: dict[str, EngineCounters]
