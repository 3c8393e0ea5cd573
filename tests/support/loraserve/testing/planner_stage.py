"""A planner on an in-memory bus, with the buses of the processes that report to it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraserve.config import ClusterConfig, Config, PlannerConfig
from loraserve.messages import AdapterRef, EngineSeen, Ping, RebalanceDone, RegistryChanged, ToPlanner
from loraserve.planner.service import PlannerService
from loraserve.testing.clock import LoopClock
from loraserve.testing.memory_bus import FaultRule, MemoryNetwork
from loraserve.testing.reports import adapter_ref, asked_for, picture

ADAPTERS = tuple(adapter_ref(n) for n in range(4))


class PlannerStage:
    """The buses of an operator, the monitor and the store, and a configuration with two engines.

    ``settings`` are fields of PlannerConfig. By default the planner makes no plan by itself during a test.
    """

    def __init__(self, data_dir: Path, faults: FaultRule | None = None, **settings: Any) -> None:
        self.config = Config(
            cluster=ClusterConfig(data_dir=str(data_dir), engines=2),
            planner=PlannerConfig(**{"interval_s": 1000.0, **settings}),
        )
        self.network = MemoryNetwork(faults)
        self.operator, self.monitor, self.store = (self.network.bus(n, Ping) for n in ("gateway-0", "monitor", "store"))
        self.sequence = 0

    def new_planner(self, **parts: Any) -> PlannerService:
        return PlannerService(self.config, self.network.bus("planner", ToPlanner), LoopClock(), **parts)

    def publish_registry(self, adapters: Iterable[AdapterRef] = ADAPTERS) -> None:
        self.store.publish("registry", RegistryChanged(revision=1, adapters=tuple(adapters)))

    def publish_load(
        self, loads: Iterable[EngineSeen], asked: Iterable[AdapterRef] = ADAPTERS, dead: Iterable[str] = ()
    ) -> None:
        """Publish the engines' reports, with equal demand for the adapters ``asked``."""
        self.sequence += 1
        demand = [asked_for(adapter, 10.0) for adapter in asked]
        self.monitor.publish("load", picture(*loads, sequence=self.sequence, dead=dead, demand=demand))

    async def ask(self, message: Any, answer: type[Any] = RebalanceDone, timeout_s: float = 600.0) -> Any:
        return await self.operator.request("planner", message, answer, timeout_s)
