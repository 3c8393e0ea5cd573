"""The planner's view of the cluster: engines and demand from the monitor, adapters from the store."""

from collections.abc import Iterable, Sequence

import msgspec

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, ClusterLoad, EngineLoad, EngineSeen, Placement
from loraserve.planner.placement.problem import PlanInput, PlanSettings

FORGET_ENGINE_S = 5.0
"""Seconds to keep an engine that the monitor no longer reports. A monitor that has just started reports few engines."""


class ClusterReports:
    """The last reports of monitor and store. Updates replace ``adapters`` (by version) and never change it in place."""

    def __init__(self) -> None:
        self.demand: tuple[AdapterDemand, ...] = ()
        self.adapters: dict[str, AdapterRef] = {}
        self._registry_known = False
        self._named_s: dict[str, float] = {}
        self._ready: dict[str, EngineSeen] = {}

    def take_load(self, load: ClusterLoad, now: float) -> None:
        self.demand = load.demand
        for seen in load.engines:
            name = seen.load.engine
            self._named_s[name] = now
            if seen.alive and seen.load.state == "READY":
                self._ready[name] = seen
            else:
                self._ready.pop(name, None)
        for name in [name for name, named_s in self._named_s.items() if now - named_s > FORGET_ENGINE_S]:
            del self._named_s[name]
            self._ready.pop(name, None)

    def take_registry(self, adapters: Iterable[AdapterRef]) -> None:
        self.adapters = {adapter.version: adapter for adapter in adapters}
        self._registry_known = True

    def ready_engines(self) -> list[EngineLoad]:
        """Return the last ``EngineLoad`` of each engine last reported alive and READY, sorted by engine name."""
        return [seen.load for _, seen in sorted(self._ready.items())]

    def engine_names(self) -> set[str]:
        """Return the names of engines, ready or not, reported at most ``FORGET_ENGINE_S`` before the last report."""
        return set(self._named_s)

    def missing(self) -> str:
        """Return the reason why no plan can be made yet, or "" if a plan can be made."""
        if not self._ready:
            return "no engine is ready"
        # If the registry is unknown, every planned adapter looks unregistered.
        return "" if self._registry_known else "the store has not sent its adapters yet; ask again"

    def plan_input(
        self, current: Sequence[Placement], cost: CostModel, settings: PlanSettings
    ) -> tuple[PlanInput, str]:
        """Return the input of the placement policy, and the description of a problem ("" if there is none).

        If all ready engines are drained, the input treats them as not drained.
        """
        engines, problem = [seen.capabilities for _, seen in sorted(self._ready.items())], ""
        if all(engine.engine in settings.drained for engine in engines):
            names = ", ".join(engine.engine for engine in engines)
            problem = f"only drained engines are ready ({names}); they serve until another is"
            settings = msgspec.structs.replace(settings, drained=frozenset())
        inputs = PlanInput(
            demand=self.demand,
            adapters=self.adapters,
            engines=engines,
            current=current,
            cost=cost,
            settings=settings,
        )
        return inputs, problem
