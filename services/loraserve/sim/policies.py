"""The policies that are compared, each a way to place and a way to route."""

import msgspec

from loraserve.errors import ConfigError
from loraserve.planner.policies import PLANNERS, Planner
from loraserve.router.policies import ROUTERS, Router
from loraserve.sim import baselines


class Policy(msgspec.Struct, frozen=True):
    """``everywhere``: every engine holds every adapter, at no cost."""

    name: str
    place: Planner
    route: Router
    everywhere: bool = False


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("slora-random", baselines.place_at_random, baselines.route_to_copy),
        Policy("slora-contiguous", baselines.place_contiguously, baselines.route_to_copy),
        Policy("toppings", baselines.place_everywhere, baselines.route_to_least_finish, everywhere=True),
        Policy("dynamo", baselines.place_by_rendezvous, baselines.route_to_least_requests),
        Policy("loraserve", PLANNERS["loraserve"], ROUTERS["shares"]),
        Policy("ours", PLANNERS["ours"], ROUTERS["predicted"]),
    )
}


def policy_named(name: str) -> Policy:
    """Raises ConfigError naming those that there are."""
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is not known; there are {', '.join(POLICIES)}")
    return POLICIES[name]
