"""A plan as the router looks it up. Pure."""

from collections.abc import Mapping

from loraserve.messages import Plan, Route

_NOWHERE: Mapping[str, float] = {}


class PlannedCopies:
    """The share of traffic of each copy."""

    def __init__(self, plan: Plan) -> None:
        self.epoch = plan.epoch
        self._shares: dict[str, dict[str, float]] = {}
        for copy in plan.placements:
            self._shares.setdefault(copy.version, {})[copy.engine] = copy.share

    def of(self, version: str) -> Mapping[str, float]:
        """Share by engine of one adapter's copies."""
        return self._shares.get(version, _NOWHERE)


def shares_of(plan: PlannedCopies | None, request: Route) -> Mapping[str, float]:
    """Share by engine of the copies of the request's adapter; empty without a plan or an adapter."""
    return plan.of(request.adapter.version) if plan is not None and request.adapter is not None else _NOWHERE
