"""What the planner is told beside demand and load. Plain data."""

from collections.abc import Mapping

import msgspec


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``pins``: adapter name to the engines its copies are on, whatever is asked for. ``drained``: engines that are to
    end empty. ``interval_s``: until the next plan, the time over which a move has to pay."""

    min_copies: int = 1
    slo_ttft_s: float = 10.0
    interval_s: float = 30.0
    pins: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    drained: frozenset[str] = frozenset()
