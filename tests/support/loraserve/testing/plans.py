"""Inputs of placement policies for tests, and helpers that evaluate plans."""

from collections.abc import Iterable, Sequence

import msgspec

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterDemand, AdapterRef, EngineCapabilities, Placement
from loraserve.planner.placement import PLACEMENT_POLICIES
from loraserve.planner.placement.balancing import split_traffic
from loraserve.planner.placement.problem import POOL_FRACTION, PlanInput, PlanSettings, Problem, build_problem
from loraserve.planner.placement.utilisation import engine_work, mean_ttft_s

Placements = tuple[Placement, ...]


def plan_input(
    demand: Sequence[AdapterDemand],
    adapters: Iterable[AdapterRef],
    engines: Sequence[EngineCapabilities],
    cost: CostModel | None = None,
    current: Sequence[Placement] = (),
    settings: PlanSettings | None = None,
) -> PlanInput:
    """Return the input of a policy. Cost model and settings have defaults."""
    return PlanInput(
        demand=demand,
        adapters={ref.version: ref for ref in adapters},
        engines=engines,
        current=current,
        cost=cost or CostModel(),
        settings=settings or PlanSettings(),
    )


class Situation(msgspec.Struct):
    """A PlanInput that a test can change."""

    demand: list[AdapterDemand]
    adapters: dict[str, AdapterRef]
    engines: list[EngineCapabilities]
    current: Placements = ()
    cost: CostModel = CostModel()
    settings: PlanSettings = PlanSettings()

    def inputs(self, current: Placements | None = None) -> PlanInput:
        """Return the PlanInput, with ``current`` in place of the current placements if given."""
        current = self.current if current is None else current
        return plan_input(self.demand, self.adapters.values(), self.engines, self.cost, current, self.settings)

    def plan(self, current: Placements | None = None, policy: str = "ours") -> Placements:
        """Return the plan of the policy, with ``current`` in place of the current placements if given."""
        return PLACEMENT_POLICIES[policy](self.inputs(current))

    def room(self, placements: Placements) -> dict[str, int]:
        """Return for each engine that is not drained the bytes that the plan may use and the placements leave free."""
        drained = self.settings.drained
        room = {e.engine: int(e.pool_bytes * POOL_FRACTION) for e in self.engines if e.engine not in drained}
        for p in placements:
            room[p.engine] -= extent_bytes(self.adapters[p.version].slab_bytes)
        return room

    def problem(self, placements: Placements) -> Problem:
        """Return the placement problem with these placements as the current ones."""
        return build_problem(self.inputs(placements))

    def utilisation(self, placements: Placements) -> list[float]:
        """Return the predicted utilisation of each engine."""
        problem = self.problem(placements)
        found: list[float] = engine_work(problem, split_traffic(problem, problem.current)).utilisation().tolist()
        return found

    def ttft_s(self, placements: Placements) -> float:
        """Return the predicted mean TTFT."""
        problem = self.problem(placements)
        return mean_ttft_s(problem, split_traffic(problem, problem.current))


def copy(number: int, engine: str, share: float = 1.0) -> Placement:
    """Return a copy of ``adapter_ref(number)``."""
    return Placement(version=f"v{number}", name=f"adapter-{number}", engine=engine, share=share)


def engines_by_version(placements: Placements) -> dict[str, list[str]]:
    """Return the engines of each adapter's copies."""
    engines: dict[str, list[str]] = {}
    for p in placements:
        engines.setdefault(p.version, []).append(p.engine)
    return engines


def count_new(before: Placements, after: Placements) -> int:
    """Return how many copies of ``after`` are not in ``before``."""
    return len({(p.version, p.engine) for p in after} - {(p.version, p.engine) for p in before})
