"""Ways to route, by the name that the configuration gives them. Pure."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from loraserve.cost import CostModel
from loraserve.messages import Rejected, Route
from loraserve.router.by_shares import route_by_shares
from loraserve.router.choice import Choice, Rng, Slo
from loraserve.router.policy import route
from loraserve.router.shares import PlannedCopies
from loraserve.router.view import ClusterView

Router: TypeAlias = Callable[[Route, ClusterView, PlannedCopies | None, CostModel, Slo, Rng], Choice | Rejected]

ROUTERS: Mapping[str, Router] = {"predicted": route, "shares": route_by_shares}
