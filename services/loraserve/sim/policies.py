"""The policies that are compared, each a way to place and a way to route."""

from functools import partial

import msgspec

from loraserve.errors import ConfigError
from loraserve.planner.placement.policies import PLANNERS, Planner
from loraserve.router.policies import ROUTERS, Router
from loraserve.sim import baselines


class Policy(msgspec.Struct, frozen=True):
    """``everywhere``: every engine holds every adapter, at no cost. ``drawn``: its placement hangs on the seed."""

    name: str
    place: Planner
    route: Router
    everywhere: bool = False
    drawn: bool = False


NAMES = ("slora-random", "slora-contiguous", "toppings", "dynamo", "loraserve", "ours")


def policy_named(name: str, seed: int = 0) -> Policy:
    """``seed`` is of placements at random. Raises ConfigError naming the policies that there are."""
    match name:
        case "slora-random":
            return Policy(name, partial(baselines.place_at_random, seed), baselines.route_to_copy, drawn=True)
        case "slora-contiguous":
            return Policy(name, baselines.place_contiguously, baselines.route_to_copy)
        case "toppings":
            return Policy(name, baselines.place_everywhere, baselines.route_to_least_finish, everywhere=True)
        case "dynamo":
            return Policy(name, baselines.place_by_rendezvous, baselines.route_to_least_requests)
        case "loraserve":
            return Policy(name, PLANNERS["loraserve"], ROUTERS["shares"])
        case "ours":
            return Policy(name, PLANNERS["ours"], ROUTERS["predicted"])
    raise ConfigError(f"policy {name!r} is not known; there are {', '.join(NAMES)}")
